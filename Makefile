# Each target does all its own set-up in .venv; Python 3.11 or newer and make are all a machine needs.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
DEEPSPEED ?= deepspeed==0.19.8
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test check teacher docs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

quickstart: $(STAMP)  ## run the whole pipeline on the embedded teacher and write a report
	HF_HUB_OFFLINE=1 $(BIN)/xlstm-distill run recipes/quickstart.yaml --run $(RUN)

test: $(STAMP) $(VENV)/deepspeed  ## run all tests that this machine can run
	HF_HUB_OFFLINE=1 PATH='$(abspath $(BIN)):'"$$PATH" $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)  ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

teacher: $(STAMP)  ## train the embedded teacher anew (about 15 minutes, one thread)
	$(BIN)/python -m xlstm_distill.embedded.train --out recipes/quickstart/teacher

docs: $(STAMP)  ## write the generated documents: recipe schema and reference
	$(BIN)/python -m xlstm_distill.recipe.reference

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs

# torch goes first: with a version that the rest accepts already there, nothing replaces it by a larger build.
$(STAMP): pyproject.toml
	@test -n '$(PYTHON)' && $(PYTHON) $(NEW_ENOUGH) || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

# DeepSpeed builds against the torch that is there; where it does not install, its tests are skipped.
$(VENV)/deepspeed: $(STAMP)
	@$(BIN)/pip install --quiet 'setuptools<82' wheel && \
		DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation '$(DEEPSPEED)' ninja || \
		echo "DeepSpeed was not installed: its tests are skipped"
	@touch $@

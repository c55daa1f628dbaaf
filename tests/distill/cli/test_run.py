"""`run` and the stages' commands: the order of stages, their options, and what is printed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from xlstm_distill.artifacts import Artifact
from xlstm_distill.cli.run import STAGES
from xlstm_distill.errors import UserError
from xlstm_eval.records import EvalError

Call = Callable[..., Result]
ErrorOf = Callable[[Result, int], str]


def test_run_goes_through_all_stages_and_shows_the_scores(
    call: Call, stages: dict[str, Any], tmp_path: Path
) -> None:
    stages["reused"] = {"align"}
    result = call("run", "small.yaml")
    assert result.exit_code == 0, result.output
    # The small recipe refines no expert.
    assert [name for name, _ in stages["calls"]] == [s for s in STAGES if s != "refine"]
    lines = result.stdout.splitlines()
    assert lines[0] == f"small: run directory {Path('runs/small')}"
    assert lines[1] == "stage 1 of 6: capture"
    assert lines[2].startswith("capture   done in ")
    assert lines[3:5] == ["stage 2 of 6: align", "align     already done"]
    words = [line.split() for line in lines]
    assert ["task", "teacher", "merged", "math"] in words
    assert ["add", "0.900", "0.900", "0.600"] in words
    assert ["mean", "0.850", "0.800", "0.500"] in words
    assert ["C", "at", "α", "=", "0.05", "0.50", "0.00"] in words
    assert ["α*", "0.000", "0.333"] in words
    # The paper's metric is never shown alone.
    assert ["worst", "drop", "0.125", "0.500"] in words
    assert ["decision", "inferior", "inferior"] in words
    assert any("Keeps 94 % of its teacher" in line for line in lines)
    assert lines[-1] == f"Report: {Path('runs/small/report/report.html')}"
    assert (tmp_path / "runs" / "small" / "artifacts").is_dir()
    assert "\x1b" not in result.stdout


def test_a_run_says_something_before_it_loads_its_libraries(small: Path) -> None:
    """The first line comes before the libraries that take seconds to load."""
    # `line` is called for the first line; what comes after it does not matter here.
    slow = ("torch", "transformers", "datasets", "accelerate", "lm_eval", "scipy", "matplotlib")
    code = (
        "import os, sys\n"
        "from xlstm_distill.cli.app import app\n"
        "from xlstm_distill.runtime.console import Console\n"
        "def line(self, text=''):\n"
        f"    print(text, [name for name in {slow} if name in sys.modules], flush=True)\n"
        "    os._exit(0)\n"
        "Console.line = line\n"
        "app(['run', 'small.yaml'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=small
    )
    assert done.stdout == "small: run directory runs/small []\n", done.stderr


def test_run_checks_the_evaluation_before_the_first_stage(
    call: Call, stages: dict[str, Any], error_of: ErrorOf
) -> None:
    assert call("run", "small.yaml").exit_code == 0
    assert stages["checked"] == [0]
    stages["calls"].clear()
    stages["check"] = EvalError("suite.tasks: unknown task 'qs_math_ad'.")
    assert (
        error_of(call("run", "small.yaml"), 2) == "error: suite.tasks: unknown task 'qs_math_ad'."
    )
    assert stages["calls"] == []


def test_run_directory_and_overrides_reach_the_stage(
    call: Call, stages: dict[str, Any], tmp_path: Path
) -> None:
    result = call("align", "small.yaml", "--run", "here", "--set", "name=other", "--set", "seed=3")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in stages["calls"]] == ["align"]
    assert (tmp_path / "here" / "artifacts").is_dir()


@pytest.mark.parametrize("command", ["run", "evaluate", "report"])
def test_full_takes_the_limit_of_items_away(
    call: Call, stages: dict[str, Any], tmp_path: Path, command: str
) -> None:
    for words, limit in (((), 2), (("--full",), None)):
        result = call(command, "small.yaml", "--set", "evaluate.limit=2", *words)
        assert result.exit_code == 0, result.output
        kept = yaml.safe_load((tmp_path / "runs" / "small" / "recipe.yaml").read_text())
        assert kept["evaluate"]["limit"] == limit


@pytest.mark.parametrize(("words", "expert"), [([], None), (["--expert", "math"], "math")])
def test_distill_passes_the_expert(
    call: Call, stages: dict[str, Any], words: list[str], expert: str | None
) -> None:
    assert call("distill", "small.yaml", *words).exit_code == 0
    assert stages["calls"] == [("distill", {"expert": expert})]


def test_shares_reach_the_stages_that_have_them(call: Call, stages: dict[str, Any]) -> None:
    for stage in ("prepare", "capture"):
        assert call(stage, "small.yaml", "--shard", "0/1").exit_code == 0
    assert stages["calls"] == [("prepare", {"shard": "0/1"}), ("capture", {"shard": "0/1"})]


def test_a_share_that_is_none_is_one_line(call: Call, error_of: ErrorOf) -> None:
    line = error_of(call("prepare", "small.yaml", "--shard", "3/3"), 2)
    assert line == ("error: --shard: '3/3' must be I/N with I from 0 to N - 1, for example 0/8.")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("prepare", "--shard", "3/3"), "--shard: '3/3' must be I/N"),
        (
            ("prepare", "--shard", "7/8"),
            "--shard: '7/8' asks for 8 shares. A share is whole domains",
        ),
        (("capture", "--shard", "x"), "--shard: 'x' must be I/N"),
        (
            ("capture", "--shard", "0/2", "--set", "capture.targets=online"),
            "--shard: capture.targets is 'online', so there is nothing to share",
        ),
        (("distill", "--expert", "maths"), "--expert: 'maths' is not in the recipe's distill"),
        (("refine",), "refine: the recipe has no such section"),
        (("evaluate", "--model", "7"), "--model: '7' is not in the recipe's models"),
    ],
)
def test_a_word_that_is_refused_leaves_the_run_as_it_was(
    call: Call, error_of: ErrorOf, small: Path, words: tuple[str, ...], expected: str
) -> None:
    stage, *options = words
    again = [*options, "--set", "align.lr=0.01"]
    assert error_of(call(stage, "small.yaml", *again), 2).startswith(f"error: {expected}")
    assert not (small / "runs").exists()


def test_an_expert_is_chosen_by_name_or_index() -> None:
    from xlstm_distill.stages.choices import choose_experts

    names = ["math", "code", "0"]
    assert choose_experts(names, None) == names
    assert [*choose_experts(names, "code"), *choose_experts(names, "1")] == ["code", "code"]
    assert choose_experts(names, "0") == ["0"]  # a name goes before an index
    for wrong in ("3", "-1", "1.0", "mat", "²", ""):
        with pytest.raises(UserError, match=r"it has math, code, 0 \(or by index: 0 to 2\)\.$"):
            choose_experts(names, wrong)


def test_capture_passes_its_share(call: Call, stages: dict[str, Any]) -> None:
    stages["capture"] = [None]  # shards of other shares are missing
    result = call("capture", "small.yaml", "--shard", "3/8")
    assert result.stdout.splitlines()[1].startswith("capture   done in ")
    assert stages["calls"] == [("capture", {"shard": "3/8"})]


def test_partly_done_and_empty_stages_say_so(
    call: Call, stages: dict[str, Any], tmp_path: Path
) -> None:
    stages["distill"] = [
        Artifact(tmp_path, {}, reused=True),
        Artifact(tmp_path, {}),
        Artifact(tmp_path, {}, reused=True),
    ]
    stages["capture"] = []
    assert call("distill", "small.yaml").stdout.strip().endswith(" s (2 of 3 already done)")
    assert call("capture", "small.yaml").stdout.splitlines()[-1] == "capture   nothing to do"

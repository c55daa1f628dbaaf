"""A small recipe, stages that only record their calls, and a call of the command line."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from xlstm_distill.artifacts import Artifact
from xlstm_distill.cli.app import STAGES, app

RECIPE = """\
name: small
teacher: {path: teacher}
student: {mixer: {window: 8}}
data:
  context: 64
  domains: {math: {sources: [{generator: math, documents: 100}]}}
align: {tokens: 4096, batch: 4}
distill: {batch: 4, lr: 1.0e-3, experts: {math: {phases: [{domain: math, tokens: 2048}]}}}
evaluate: {tasks: [{name: qs_math_add}]}
"""

REPORT = {
    "teacher": {"name": "teacher", "scores": {"add": 0.9, "sort": 0.8}},
    "models": [
        {
            "name": "merged",
            "scores": {"add": 0.9, "sort": 0.7},
            "win_and_tie": {"0.0": 0.5, "0.05": 0.5},
            "critical_tolerance": 0.0,
            "worst_drop": 0.125,
            "decision": "inferior",
            "sentence": "Keeps 94 % of its teacher; loses 10 points on sort.",
        },
        {
            "name": "math",
            "scores": {"add": 0.6, "sort": 0.4},
            "win_and_tie": {"0.0": 0.0, "0.05": 0.0},
            "critical_tolerance": 0.3333,
            "worst_drop": 0.5,
            "decision": "inferior",
            "sentence": "Keeps 59 % of its teacher.",
        },
    ],
}

Call = Callable[..., Result]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with the recipe `small.yaml` and an empty folder for its teacher."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def call(small: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the command line in the folder of a small recipe."""
    monkeypatch.chdir(small)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the stages by ones that record their calls under `calls`.

    An exception or a result put under a stage's name is what the stage raises or returns.
    """
    state: dict[str, Any] = {"calls": [], "reused": set(), "checked": []}

    def check() -> None:
        state["checked"].append(len(state["calls"]))
        if "check" in state:
            raise state["check"]

    def make(name: str) -> types.ModuleType:
        def run_stage(lineage: Any, run: Any, console: Any, **options: Any) -> Any:
            state["calls"].append((name, options))
            outcome = state.get(name)
            if isinstance(outcome, BaseException):
                raise outcome
            if name == "report":
                (run.directory / "report").mkdir(exist_ok=True)
                (run.directory / "report" / "report.json").write_text(json.dumps(REPORT))
                return run.directory / "report" / "report.html"
            artifact = Artifact(
                run.path(name), {"wall_seconds": 1.0}, reused=name in state["reused"]
            )
            return [artifact] if outcome is None else outcome

        module = types.ModuleType(f"xlstm_distill.stages.{name}")
        setattr(module, name, run_stage)
        if name == "merge":
            module.check = lambda lineage, run: None  # type: ignore[attr-defined]
        if name == "evaluate":
            module.check = lambda lineage, run: check()  # type: ignore[attr-defined]
        return module

    for name in ("prepare", *STAGES):
        monkeypatch.setitem(sys.modules, f"xlstm_distill.stages.{name}", make(name))
    return state


@pytest.fixture
def errors_of() -> Callable[[Result, int], list[str]]:
    """The lines on stderr of a call that must have failed with this exit code."""

    def lines(result: Result, code: int) -> list[str]:
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.stderr
        return result.stderr.splitlines()

    return lines


@pytest.fixture
def error_of(errors_of: Callable[[Result, int], list[str]]) -> Callable[[Result, int], str]:
    """The one line on stderr of a call that must have failed with this exit code."""

    def line(result: Result, code: int) -> str:
        (only,) = errors_of(result, code)
        return only

    return line

"""The command line: help without torch, the order of stages, and one line with an exit code for every failure."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from xlstm_distill import __version__
from xlstm_distill.artifacts import Artifact
from xlstm_distill.cli import preflight as batches
from xlstm_distill.cli.app import STAGES, app
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe.reference import json_schema
from xlstm_eval.records import EvalError

COMMANDS = (*STAGES, "run", "score", "plan", "schema")

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
        {"name": "merged", "scores": {"add": 0.9, "sort": 0.7}, "win_and_tie": {"0.0": 0.5, "0.05": 0.5},
         "critical_tolerance": 0.0},
        {"name": "math", "scores": {"add": 0.6, "sort": 0.4}, "win_and_tie": {"0.0": 0.0, "0.05": 0.0},
         "critical_tolerance": 0.3333},
    ],
}  # fmt: skip

Call = Callable[..., Result]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the command line in a folder with a small recipe."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "small.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stages that record their calls under `calls`; an exception or result put under a stage's name is its outcome."""
    state: dict[str, Any] = {"calls": [], "reused": set(), "checked": []}

    def check(run: Any) -> None:
        state["checked"].append(len(state["calls"]))
        if "check" in state:
            raise state["check"]

    def make(name: str) -> types.ModuleType:
        def run(recipe: Any, run: Any, console: Any, **options: Any) -> Any:
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
        module.run = run  # type: ignore[attr-defined]
        if name == "evaluate":
            module.check = lambda recipe, run: check(run)  # type: ignore[attr-defined]
        return module

    for name in STAGES:
        monkeypatch.setitem(sys.modules, f"xlstm_distill.stages.{name}", make(name))
    return state


def error_of(result: Result, code: int) -> str:
    """The one line on stderr of a call that must have failed with this exit code."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


# --- help, version, schema


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_instant(command: str) -> None:
    """Best of three under half a second, of processor time: what else the machine does shall not count."""
    seconds = []
    for _ in range(3):
        before = os.times()
        words = [sys.executable, "-m", "xlstm_distill", *([command] if command else []), "--help"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        assert "Usage: xlstm-distill" in done.stdout
        if min(seconds) < 0.5:
            break
    assert min(seconds) < 0.5


def test_help_and_schema_import_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from xlstm_distill.cli.app import app\n"
        "for words in (['--help'], ['run', '--help'], ['schema'], ['run', 'nope']): CliRunner().invoke(app, words)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets', 'lm_eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_and_schema(call: Call) -> None:
    assert call("--version").stdout.strip() == __version__
    assert json.loads(call("schema").stdout) == json_schema()


@pytest.mark.parametrize(
    "words",
    [["rn"], ["run"], ["run", "small.yaml", "--nope"], ["distill", "small.yaml", "--expert"]],
)
def test_bad_usage_exits_with_2(call: Call, words: list[str]) -> None:
    assert call(*words).exit_code == 2


# --- running stages


def test_run_goes_through_all_stages_and_shows_the_scores(
    call: Call, stages: dict[str, Any], tmp_path: Path
) -> None:
    stages["reused"] = {"align"}
    result = call("run", "small.yaml")
    assert result.exit_code == 0, result.output
    assert [name for name, _ in stages["calls"]] == list(STAGES)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("capture   done in ")
    assert lines[1] == "align     already done"
    words = [line.split() for line in lines]
    assert ["task", "teacher", "merged", "math"] in words
    assert ["add", "0.900", "0.900", "0.600"] in words
    assert ["mean", "0.850", "0.800", "0.500"] in words
    assert ["C", "at", "α", "=", "0.05", "0.50", "0.00"] in words
    assert ["α*", "0.000", "0.333"] in words
    assert lines[-1] == f"Report: {Path('runs/small/report/report.html')}"
    assert (tmp_path / "runs" / "small" / "artifacts").is_dir()
    assert "\x1b" not in result.stdout


def test_run_checks_the_evaluation_before_the_first_stage(
    call: Call, stages: dict[str, Any]
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


@pytest.mark.parametrize(("words", "expert"), [([], None), (["--expert", "math"], "math")])
def test_distill_passes_the_expert(
    call: Call, stages: dict[str, Any], words: list[str], expert: str | None
) -> None:
    assert call("distill", "small.yaml", *words).exit_code == 0
    assert stages["calls"] == [("distill", {"expert": expert})]


def test_an_expert_is_chosen_by_name_or_index() -> None:
    from xlstm_distill.stages.distill import choose_experts

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
    assert result.stdout.startswith("capture   done in ")
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
    assert call("capture", "small.yaml").stdout.strip() == "capture   nothing to do"


# --- failures


def test_bad_recipe_leaves_no_run_directory(
    call: Call, stages: dict[str, Any], tmp_path: Path
) -> None:
    line = error_of(call("run", "small.yaml", "--set", "align.lrr=1"), 2)
    assert line == "error: align.lrr: unknown key. Did you mean 'lr'?"
    assert not (tmp_path / "runs").exists()
    assert stages["calls"] == []


def test_missing_recipe_and_missing_teacher(call: Call, tmp_path: Path) -> None:
    assert error_of(call("run", "nope.yaml"), 2).startswith("error: nope.yaml: no such file")
    (tmp_path / "teacher").rmdir()
    assert error_of(call("run", "small.yaml"), 2).startswith(
        "error: teacher.path: 'teacher' does not exist"
    )


def test_run_directory_that_is_a_file(call: Call) -> None:
    assert error_of(call("run", "small.yaml", "--run", "small.yaml"), 2).startswith(
        "error: --run: small.yaml cannot"
    )


def raised_from(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "model.safetensors")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("teacher.path: bad"), 2, "error: teacher.path: bad"),
        (RunError("align: step 3:\n the loss is nan"), 1, "error: align: step 3: the loss is nan"),
        (NO_SPACE, 1, "error: disk full while writing model.safetensors: free some space"),
        (
            raised_from(RunError("cannot save"), NO_SPACE),
            1,
            "error: disk full while writing model.safetensors",
        ),
        (
            RuntimeError("Error: I/O error: No space left on device (os error 28)"),
            1,
            "error: disk full: free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            1,
            "error: runs: Permission denied",
        ),
        (TypeError("bad operand"), 1, "error: TypeError: bad operand (--debug shows where)"),
        (
            KeyboardInterrupt(),
            130,
            "Interrupted. Finished stages are kept: run the command again to go on.",
        ),
    ],
)
def test_failure_is_one_line_and_stops_the_run(
    call: Call, stages: dict[str, Any], error: BaseException, code: int, expected: str
) -> None:
    stages["align"] = error
    assert error_of(call("run", "small.yaml"), code).startswith(expected)
    assert [name for name, _ in stages["calls"]] == ["capture", "align"]


def test_debug_shows_the_traceback(call: Call, stages: dict[str, Any]) -> None:
    stages["align"] = RunError("the loss is nan")
    result = call("run", "small.yaml", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: the loss is nan"


# --- several processes


@pytest.mark.parametrize("command", ["run", "align", "distill"])
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_done(
    call: Call,
    stages: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    stage = "distill" if command == "distill" else "align"
    line = error_of(call(command, "small.yaml"), 2)
    assert line == (
        f"error: {stage}.batch: 4 rows cannot be shared by 3 processes; take 3 or 6, or a number of processes that "
        "divides it."
    )
    assert not (tmp_path / "runs").exists()
    assert stages["calls"] == []


def test_only_the_first_process_refuses_a_batch(
    call: Call, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(batches, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    try:
        result = call("run", "small.yaml")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.exit_code, result.output) == (2, "")
    assert stages["calls"] == []


def test_batches_do_not_matter_where_nothing_is_trained(
    call: Call, stages: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert call("capture", "small.yaml").exit_code == 0
    done = tmp_path / "runs" / "small" / "artifacts" / "align"
    done.mkdir()
    (done / "manifest.json").write_text("{}")
    assert call("align", "small.yaml").exit_code == 0
    assert error_of(call("run", "small.yaml"), 2).startswith("error: distill.batch: 4 rows")


def test_a_batch_that_aligns_nothing_needs_no_sharing(
    call: Call, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert call("align", "small.yaml", "--set", "student.mixer.branches=[window]").exit_code == 0


def test_a_launcher_s_processes_are_counted_before_they_start(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(__file__).parents[3] / "recipes" / "accelerate" / "ddp-cpu.yaml"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # which the configuration sets: to be undone
    line = error_of(
        call("run", "small.yaml", "--launch", config, "--launch-args", "--num_processes 3"), 2
    )
    assert line.startswith("error: align.batch: 4 rows cannot be shared by 3 processes")


# --- score


def test_score_prints_a_table_or_json(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"tasks": [{"task": "a", "teacher": 0.8, "student": 0.76}]}))
    assert "critical tolerance (rate 0.5)   0.0500" in call("score", file).stdout
    assert json.loads(call("score", file, "--json").stdout)["critical_tolerance"] == 0.05


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "error: scores.json: not JSON at line 1"),
        (
            '{"tasks": [{"task": "a", "teacher": NaN, "student": 1}]}',
            "error: tasks[0].teacher: nan is not a finite number.",
        ),
        ('{"tasks": []}', "error: tasks: empty."),
    ],
)
def test_bad_score_file_gives_one_line(
    call: Call, tmp_path: Path, text: str, expected: str
) -> None:
    (tmp_path / "scores.json").write_text(text)
    assert error_of(call("score", "scores.json"), 2).startswith(expected)
    assert error_of(call("score", "nope.json"), 2).startswith("error: nope.json: no such file.")

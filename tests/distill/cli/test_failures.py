"""Every failure is plain lines on stderr and an exit code."""

from __future__ import annotations

import errno
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from xlstm_distill.errors import RunError, UserError

Call = Callable[..., Result]
ErrorOf = Callable[[Result, int], str]


def test_bad_recipe_leaves_no_run_directory(
    call: Call, stages: dict[str, Any], tmp_path: Path, error_of: ErrorOf
) -> None:
    line = error_of(call("run", "small.yaml", "--set", "align.lrr=1"), 2)
    assert line == "error: align.lrr: unknown key. Did you mean 'lr'?"
    assert not (tmp_path / "runs").exists()
    assert stages["calls"] == []


def test_all_problems_of_a_recipe_are_printed(
    call: Call, stages: dict[str, Any], tmp_path: Path, errors_of: Callable[..., list[str]]
) -> None:
    words = ["--set", "align.lrr=1", "--set", "teacher.path=gone", "--set", "seed"]
    found = errors_of(call("run", "small.yaml", *words), 2)
    starts = (
        "error: --set seed: not of the form dotted.path=value",
        "error: align.lrr: unknown key. Did you mean 'lr'?",
        "error: teacher.path: 'gone' does not exist",
    )
    assert [
        line for line, start in zip(found, starts, strict=True) if not line.startswith(start)
    ] == []
    assert not (tmp_path / "runs").exists()


def test_missing_recipe_and_missing_teacher(call: Call, tmp_path: Path, error_of: ErrorOf) -> None:
    assert error_of(call("run", "nope.yaml"), 2).startswith("error: nope.yaml: no such file")
    (tmp_path / "teacher").rmdir()
    assert error_of(call("run", "small.yaml"), 2).startswith(
        "error: teacher.path: 'teacher' does not exist"
    )


def test_run_directory_that_is_a_file(call: Call, error_of: ErrorOf) -> None:
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
            "error: disk full (run directory runs/small, its file system has 5 bytes free): free",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            1,
            "error: runs: Permission denied",
        ),
        (
            shutil.Error([("a", "b", "[Errno 5] Input/output error: 'a' -> 'b'")]),
            1,
            "error: b: Input/output error",
        ),
        (
            shutil.Error([("a", "b", "[Errno 122] Disk quota exceeded: 'a' -> 'b'")]),
            1,
            "error: disk full (run directory runs/small, its file system has 5 bytes free): free",
        ),
        (
            RuntimeError("Error while serializing: I/O error: Input/output error (os error 5)"),
            1,
            "error: a file cannot be read or written: Input/output error",
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
    call: Call,
    stages: dict[str, Any],
    error: BaseException,
    code: int,
    expected: str,
    error_of: ErrorOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rooms = {Path("runs/small"): types.SimpleNamespace(free=5)}
    # Not in shutil itself: a library that is imported meanwhile would keep the stand-in.
    disks = types.SimpleNamespace(disk_usage=rooms.__getitem__, Error=shutil.Error)
    monkeypatch.setattr("xlstm_distill.cli.failures.shutil", disks)
    stages["align"] = error
    assert error_of(call("run", "small.yaml"), code).startswith(expected)
    assert [name for name, _ in stages["calls"]] == ["capture", "align"]


def test_debug_shows_the_traceback(call: Call, stages: dict[str, Any]) -> None:
    stages["align"] = RunError("the loss is nan")
    result = call("run", "small.yaml", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: the loss is nan"

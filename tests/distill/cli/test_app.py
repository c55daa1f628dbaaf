"""The command line as a whole: instant help without torch, version, and bad usage."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

from xlstm_distill import __version__

Call = Callable[..., Result]

COMMANDS = (
    "run",
    "prepare",
    "capture",
    "align",
    "distill",
    "refine",
    "merge",
    "evaluate",
    "report",
    "export",
    "generate",
    "chat",
    "serve",
    "long-context",
    "slurm",
    "validate",
    "plan",
    "status",
    "verify",
    "clean",
    "doctor",
    "score",
    "schema",
    "recipes",
    "patch",
)


def test_every_command_is_known_here(call: Call) -> None:
    lines = call("--help").stdout.splitlines()
    first = next(number for number, line in enumerate(lines) if "Commands" in line)
    shown = [line[2:].split()[0] for line in lines[first:] if line[2:3].isalpha()]
    assert shown == list(COMMANDS)


def processor_seconds(*arguments: str) -> float:
    """Processor time of a Python process: least of three, whatever else the machine does."""
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, check=True
        )
        after = os.times()
        assert "Usage:" in done.stdout
        user = after.children_user - before.children_user
        seconds.append(user + after.children_system - before.children_system)
    return min(seconds)


@pytest.fixture(scope="module")
def smallest_app() -> float:
    """Processor time of the smallest typer program's help: what typer and rich cost here."""
    code = "import typer, rich.table; typer.run(lambda: None)"
    return processor_seconds("-c", code, "--help")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["recipes", "copy", "--help"]])
def test_help_is_instant(words: list[str], smallest_app: float) -> None:
    """Compared with the same libraries in the same minute: seconds alone say little."""
    assert processor_seconds("-m", "xlstm_distill", *words) < 4 * smallest_app


def test_help_and_bad_input_import_nothing_heavy() -> None:
    """In one process: what one command imported would show for all."""
    calls = [["--help"], *([command, "--help"] for command in COMMANDS)]
    calls += [["schema"], ["run", "nope"], ["validate", "nope"], ["recipes"]]
    code = (
        "import sys; from typer.testing import CliRunner; from xlstm_distill.cli.app import app\n"
        f"for words in {calls}: CliRunner().invoke(app, words)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'lm_eval'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(call: Call) -> None:
    assert call("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    "words",
    [["rn"], ["run"], ["run", "small.yaml", "--nope"], ["distill", "small.yaml", "--expert"]],
)
def test_bad_usage_exits_with_2(call: Call, words: list[str]) -> None:
    assert call(*words).exit_code == 2

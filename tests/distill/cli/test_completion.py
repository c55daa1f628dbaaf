"""Shell completion: what a shell gets for a TAB, through typer's own protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from xlstm_distill.cli.app import app

COMMANDS = (
    "run prepare capture align distill refine merge evaluate report export generate chat serve "
    "long-context slurm validate plan status verify clean doctor score schema recipes patch"
)


def complete(line: str) -> list[str]:
    """Complete the last word of a command line as bash asks for it."""
    words = line.split(" ")
    environment = {
        "_XLSTM_DISTILL_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(app, [], prog_name="xlstm-distill", env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout.split()


@pytest.fixture
def folder(small: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe, a folder with two others, and a file that is none."""
    (small / "mine").mkdir()
    for name in ("mine/a.yaml", "mine/b.yml", "notes.txt"):
        (small / name).touch()
    monkeypatch.chdir(small)
    return small


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("xlstm-distill ", COMMANDS),
        ("xlstm-distill re", "refine report recipes"),
        ("xlstm-distill run ", "mine/a.yaml mine/b.yml small.yaml"),
        ("xlstm-distill validate mi", "mine/a.yaml mine/b.yml"),
        ("xlstm-distill run mine/a", "mine/a.yaml"),
        ("xlstm-distill run no/such/folder/", ""),
        ("xlstm-distill distill small.yaml --expert ", "math"),
        ("xlstm-distill distill small.yaml --expert c", ""),
        ("xlstm-distill distill gone.yaml --expert ", ""),
        ("xlstm-distill plan small.yaml --gpu h", "h100-80gb h200-141gb"),
        ("xlstm-distill plan small.yaml --sharding zero", "zero1 zero2 zero3"),
        ("xlstm-distill run small.yaml --set align.l", "align.lr="),
        ("xlstm-distill run small.yaml --set student.mixer.w", "student.mixer.window="),
        ("xlstm-distill recipes ", "copy"),
        ("xlstm-distill recipes copy qui", "quickstart quickstart-merges quickstart-paper"),
    ],
)
def test_a_tab_completes(folder: Path, line: str, expected: str) -> None:
    assert complete(line) == expected.split()


def test_a_tab_loads_no_torch(folder: Path) -> None:
    """The GPUs come from the planner and the experts from a recipe: neither may take seconds."""
    code = (
        "import sys; from xlstm_distill.cli import completion\n"
        "assert completion.gpus('') and completion.shardings('') and completion.recipe_keys('')\n"
        "assert completion.shipped_recipes('') and completion.recipe_paths('')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "False"

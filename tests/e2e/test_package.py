"""The wheel without a clone: built, installed alone, and used from an empty folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import process_environment

ROOT = Path(__file__).parents[2]
SOURCES = (
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "distill",
    "kernels",
    "eval",
    "recipes",
    "slurm",
)
BUILD_STATE = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources: a build leaves files beside them."""
    folder = tmp_path_factory.mktemp("package")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=BUILD_STATE)
        else:
            shutil.copy(source, folder / name)
    pip("wheel", str(folder), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files alone, in a folder of their own."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", str(wheel), "--no-deps", "--target", str(target))
    return target


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def command_line(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command line; the repository is not on the path."""
    environment = process_environment(PYTHONPATH=str(installed))
    command = [sys.executable, "-m", "xlstm_distill", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, cwd=folder
    )


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for root in ("distill", "kernels", "eval"):
        for path in (ROOT / root).rglob("*"):
            name = path.relative_to(ROOT / root).as_posix()
            if path.is_file() and "__pycache__" not in name and ".egg-info" not in name:
                assert name in held
    for folder in ("recipes", "slurm"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file():
                name = path.relative_to(ROOT / folder).as_posix()
                assert f"xlstm_distill/shipped_{folder}/{name}" in held
    assert wheel.stat().st_size < 8e6


def test_recipes_are_listed_and_copied_without_a_clone(installed: Path, tmp_path: Path) -> None:
    listed = command_line(installed, tmp_path, "recipes", "--json")
    assert listed.returncode == 0, listed.stderr
    names = [row["name"] for row in json.loads(listed.stdout)]
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    copied = command_line(installed, tmp_path, "recipes", "copy", "quickstart", "mine")
    assert copied.returncode == 0, copied.stderr
    for path in (tmp_path / "mine").rglob("*"):
        original = ROOT / "recipes" / path.relative_to(tmp_path / "mine")
        assert path.is_dir() or path.read_bytes() == original.read_bytes()
    planned = command_line(installed, tmp_path, "plan", "mine/quickstart.yaml", "--gpus", "1")
    assert planned.returncode == 0, planned.stderr
    written = command_line(installed, tmp_path, "slurm", "mine/quickstart.yaml", "--run", "jobs")
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "jobs" / "slurm" / "distill.sbatch").is_file()


@pytest.mark.slow
def test_a_copied_recipe_runs_without_a_clone(installed: Path, tmp_path: Path) -> None:
    """All stages on the embedded teacher, at the smallest sizes, up to the report."""
    command_line(installed, tmp_path, "recipes", "copy", "quickstart", ".")
    settings = (
        "align.tokens=8192",
        "align.warmup_steps=1",
        "distill.experts={math: {phases: [{domain: math, tokens: 8192}]}}",
        "distill.warmup_steps=1",
        "evaluate.tasks=[{name: qs_math_add, domain: math}]",
        "evaluate.limit=2",
        "evaluate.speed.seconds=0",
        "data.validation_rows=2",
    )
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = command_line(installed, tmp_path, "run", "quickstart.yaml", *overrides)
    assert done.returncode == 0, done.stderr
    assert "Report: runs/quickstart/report/report.html" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "report" / "report.html").is_file()

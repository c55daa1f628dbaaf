"""An evaluation in several processes, killed and started again, as a user does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import process_environment, run_python

pytestmark = [pytest.mark.multi_process, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
LAUNCH = ("--launch", str(ROOT / "recipes" / "accelerate" / "ddp-cpu.yaml"))
PATIENCE = 300.0


def words(run: Path, *more: str) -> list[str]:
    """Score the teacher, which needs no training, in batches small enough to be cut between."""
    sets = ("--set", "evaluate.limit=20", "--set", "evaluate.batch=2")
    recipe = ("evaluate", str(RECIPE), "--model", "teacher")
    return ["-m", "xlstm_distill", *recipe, "--run-dir", str(run), *sets, *more]


def answers(run: Path) -> dict[str, bytes]:
    """Everything that the evaluation published, but for its manifest."""
    folder = run / "artifacts" / "evaluate" / "teacher"
    files = [folder / "results.json", *(folder / "samples").iterdir()]
    return {path.name: path.read_bytes() for path in files}


def journals(run: Path) -> list[Path]:
    return sorted((run / "training").glob("evaluate-teacher-*/answers-*.jsonl"))


def lines(run: Path) -> int:
    """Whole lines of all journals, without their headers."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in journals(run))


def start_and_kill(run: Path) -> int:
    """Start two processes and kill both at once when each has answered; return the lines left."""
    started = subprocess.Popen(
        [sys.executable, *words(run, *LAUNCH)],
        env=process_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end = time.monotonic() + PATIENCE
    while len(journals(run)) < 2 or lines(run) < 6:
        assert started.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.05)
    group = [started.pid, *(child.pid for child in psutil.Process(started.pid).children(True))]
    for process in group:
        os.kill(process, signal.SIGKILL)
    started.wait()
    return lines(run)


def test_a_killed_evaluation_of_two_processes_goes_on_in_one_with_the_same_bits(
    tmp_path: Path,
) -> None:
    whole = run_python(*words(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    kept = start_and_kill(tmp_path / "killed")
    assert not (tmp_path / "killed" / "artifacts" / "evaluate" / "teacher").exists()
    resumed = run_python(*words(tmp_path / "killed"))
    assert resumed.returncode == 0, resumed.stderr
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")
    assert not journals(tmp_path / "killed")
    manifests = [
        json.loads((tmp_path / name / "artifacts/evaluate/teacher/manifest.json").read_text())
        for name in ("whole", "killed")
    ]
    first, second = (manifest["results"]["protocol"] for manifest in manifests)
    assert first["batch"] == second["batch"] == {"generate_until": 2}
    assert first["tokens"] == second["tokens"]
    # What was kept was not computed again: the bar counts this run's requests apart.
    assert kept >= 6

"""`slurm` on a machine without a cluster: it writes and prints, and refuses what cannot work."""

from __future__ import annotations

import json
import os

import pytest
from command_line import call_cli


@pytest.fixture
def recipe(root):
    return root / "recipes" / "quickstart.yaml"


@pytest.fixture(autouse=True)
def _no_cluster(tmp_path, monkeypatch):
    """Leave only commands that are no Slurm's: this machine may have a cluster."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SLURM_CONF", os.devnull)


def test_it_writes_and_prints_and_status_shows_every_index(recipe, tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("stages: {capture: {tasks: 2}, distill: {at_once: 2}}\n")
    done = call_cli("slurm", recipe, "--run", tmp_path / "run", "--site", site)
    assert done.returncode == 0, done.stderr
    assert "distill    4       0-3         capture, align   slurm/distill.sbatch" in done.stdout
    assert "Nothing was submitted." in done.stdout
    jobs = json.loads((tmp_path / "run" / "slurm" / "jobs.json").read_text())
    assert jobs[3] == {
        "name": "distill",
        "script": "distill.sbatch",
        "array": "0-3%2",
        "depends_on": ["capture", "align"],
    }
    # The site file of the last call counts.
    again = call_cli("slurm", recipe, "--run", tmp_path / "run", "--json")
    assert json.loads(again.stdout)["jobs"][1]["missing"] == [0, 1]
    status = json.loads(call_cli("status", tmp_path / "run", "--json").stdout)
    assert {job["state"] for job in status["jobs"]} == {"missing"}
    assert len(status["jobs"]) == 4 + 2 + 1 + 4 + 1 + 6 + 1
    assert "to be submitted" in call_cli("status", tmp_path / "run").stdout


def test_a_damaged_site_file_of_the_last_call_hides_no_stage(recipe, tmp_path):
    call_cli("slurm", recipe, "--run", tmp_path / "run")
    (tmp_path / "run" / "slurm" / "site.yaml").write_text("setup: 3\n")
    done = call_cli("status", tmp_path / "run")
    assert done.returncode == 0
    assert "evaluate/merged" in done.stdout
    assert "setup: 3 is a whole number; give a list." in done.stderr


def test_what_cannot_work_is_refused_before_anything_is_written(recipe, tmp_path):
    site, run = tmp_path / "site.yaml", tmp_path / "run"
    site.write_text("{partiton: gpu, stages: {align: {nodes: 2}}}\n")
    done = call_cli("slurm", recipe, "--run", run, "--site", site)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 3
    site.write_text("stages: {distill: {launch: ddp, processes: 3}, align: {launch: zero1}}\n")
    done = call_cli("slurm", recipe, "--run", run, "--site", site, "--set", "align.batch=9")
    assert done.returncode == 2
    assert "align.batch: 9 rows cannot be shared by 8 processes" in done.stderr
    assert "distill.batch: 8 rows cannot be shared by 3 processes" in done.stderr
    assert "The site file's distill has nodes: 1, processes: 3." in done.stderr
    assert "The site file's align has launch: " in done.stderr
    assert not run.exists()


def test_without_slurm_nothing_can_be_submitted(recipe, tmp_path):
    done = call_cli("slurm", recipe, "--run", tmp_path / "run", "--submit")
    assert done.returncode == 1
    assert "squeue: not found; this machine has no Slurm commands" in done.stderr


def test_what_needs_care_is_said(recipe, tmp_path):
    sets = ("--set", "training.checkpoint_steps=null", "--set", "teacher.path=owner/teacher")
    done = call_cli("slurm", recipe, "--run", tmp_path / "run", *sets)
    assert "owner/teacher: from the hub." in done.stdout
    assert "training.checkpoint_steps is null" in done.stdout

"""The status of a run, read while another process writes it."""

from __future__ import annotations

import json
import os
import platform
import time

import pytest
from typer.testing import CliRunner

from xlstm_distill.artifacts.locks import exclusive, training_lock
from xlstm_distill.cli.app import app
from xlstm_distill.errors import UserError
from xlstm_distill.stages.status import read_status


@pytest.fixture
def run(tmp_path):
    """A run with one artifact and one training at step 4 of 10."""
    done = tmp_path / "artifacts" / "data" / "math"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text(json.dumps({"wall_seconds": 61.5}))
    partial = tmp_path / "artifacts" / ".align.1.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{")
    training = tmp_path / "training" / "distill-math-0123"
    (training / "step-00000003").mkdir(parents=True)
    header = {"label": "distill/math", "steps": 10, "tokens_per_step": 100, "first_step": 0}
    (training / "training.json").write_text(json.dumps(header))
    lines = [
        json.dumps({"step": n, "loss": 1.0 / (n + 1), "tokens_per_second": 50.0}) for n in range(4)
    ]
    (training / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    return tmp_path


def test_done_and_running(run):
    data, expert = read_status(run)
    assert (data.label, data.state, data.seconds) == ("data/math", "done", 61.5)
    assert (expert.label, expert.state, expert.step, expert.steps) == (
        "distill/math",
        "training",
        4,
        10,
    )
    assert expert.seconds_left == pytest.approx(12.0)
    assert expert.checkpoint == 3
    assert expert.figures == {"loss": 0.25}


def test_silence_means_stopped(run):
    log = run / "training" / "distill-math-0123" / "log.jsonl"
    os.utime(log, (time.time() - 600, time.time() - 600))
    stage = read_status(run)[1]
    assert stage.state == "stopped"
    assert stage.seconds_left is None
    text = CliRunner().invoke(app, ["status", str(run)]).output
    assert "stopped 10:00 ago at checkpoint 3" in text
    assert "4 of 10" in text


def test_as_json_and_wrong_directory(run, tmp_path):
    found = json.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).output)
    assert [stage["label"] for stage in found["stages"]] == ["data/math", "distill/math"]
    with pytest.raises(UserError, match="is no run directory"):
        read_status(tmp_path / "nothing")


def held(run):
    """Hold the lock of the run's training."""
    work = run / "training" / "distill-math-0123"
    return exclusive(training_lock(run, work), work, print)


HEADER = {"label": "distill/math", "steps": 10, "tokens_per_step": 100, "first_step": 0}


def write_header(run, **facts):
    (run / "training" / "distill-math-0123" / "training.json").write_text(
        json.dumps(HEADER | facts)
    )


def age(run, seconds):
    for path in (run / "training" / "distill-math-0123").glob("*.json*"):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_a_training_that_holds_its_lock_runs_however_long_it_is_silent(run):
    age(run, 600)
    with held(run):
        stage = read_status(run)[1]
        assert (stage.state, stage.seconds_left) == ("silent", pytest.approx(12.0))
        assert "training, silent for 10:00" in CliRunner().invoke(app, ["status", str(run)]).output
    write_header(run, host=platform.node(), pid=os.getpid())
    age(run, 0)
    assert read_status(run)[1].state == "stopped"  # at once: nobody holds the lock


def test_a_free_lock_says_nothing_about_another_machine(run):
    with held(run):
        pass
    write_header(run, host="elsewhere", pid=1)
    assert read_status(run)[1].state == "training"
    age(run, 600)
    assert read_status(run)[1].state == "stopped"


def test_where_there_are_no_locks_silence_decides(run, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    with held(run):
        monkeypatch.setattr("fcntl.flock", refuse)
        assert read_status(run)[1].state == "training"
        age(run, 600)
        assert read_status(run)[1].state == "stopped"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"label": "distill/math", "steps": null}']
)
def test_what_cannot_be_read_is_a_row(run, content):
    for path in ("training/distill-math-0123/training.json", "artifacts/data/math/manifest.json"):
        (run / path).write_text(content)
    stages = read_status(run)
    assert [(stage.state, stage.path) for stage in stages] == [
        ("unreadable", "artifacts/data/math/manifest.json"),
        ("unreadable", "training/distill-math-0123/training.json"),
    ]
    result = CliRunner().invoke(app, ["status", str(run)])
    assert result.exit_code == 0
    assert "unreadable: training/distill-math-0123/training.json" in result.output


def test_strange_names_and_damaged_lines_are_passed_over(run):
    training = run / "training" / "distill-math-0123"
    (training / "step-abc").mkdir()
    with (training / "log.jsonl").open("a") as log:
        log.write("\n[1]\n")
    stage = read_status(run)[1]
    assert (stage.state, stage.step, stage.checkpoint) == ("training", 4, 3)


def test_an_older_recipe_s_training_goes_when_the_artifact_is_published(run):
    age(run, 600)
    assert [stage.label for stage in read_status(run)] == ["data/math", "distill/math"]
    done = run / "artifacts" / "distill" / "math"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text(json.dumps({"wall_seconds": 1.0}))
    assert [(stage.label, stage.state) for stage in read_status(run)] == [
        ("data/math", "done"),
        ("distill/math", "done"),
    ]
    with held(run):  # started anew
        assert [stage.state for stage in read_status(run)] == ["done", "done", "silent"]

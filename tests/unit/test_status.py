"""The status of a run, read while another process writes it."""

from __future__ import annotations

import json
import os
import time

import pytest
from typer.testing import CliRunner

from xlstm_distill.cli import app
from xlstm_distill.errors import UserError
from xlstm_distill.status import read_status


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
    lines = [json.dumps({"step": n, "loss": 1.0 / (n + 1), "tokens_per_second": 50.0}) for n in range(4)]
    (training / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    return tmp_path


def test_done_and_running(run):
    data, expert = read_status(run)
    assert (data.label, data.state, data.seconds) == ("data/math", "done", 61.5)
    assert (expert.label, expert.state, expert.step, expert.steps) == ("distill/math", "training", 4, 10)
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

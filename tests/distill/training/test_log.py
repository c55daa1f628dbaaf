"""The log: one line a step, replaced whole at a restart, and sent to trackers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Training
from xlstm_distill.training.log import TrainingLog, check_trackers, training_log


def test_held_out_figures_go_to_the_log_and_to_trackers(
    distill_objective, distill_settings, trainer, tmp_path, monkeypatch
):
    seen = []

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "memory", False, None, True

        def __init__(self, project, name):
            super().__init__()
            seen.append((project, name))

        def store_init_configuration(self, values):
            seen.append(values["steps"])

        def log(self, values, step):
            seen.append((step, values["loss"]))

        def finish(self):
            seen.append("finished")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Memory)
    directory = tmp_path / "run" / "training" / "distill-a-0123"
    trainer(
        distill_objective(),
        directory,
        optim=distill_settings(),
        settings=Training(validate_steps=2, trackers=("tensorboard",)),
        label="distill/a",
    ).run()
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "held_out_kl" in line] == [1]
    assert {"held_out_ce", "held_out_gate"} <= log[1].keys()
    assert seen == [
        ("xlstm-distill", "run-distill-a"),
        4,
        *((line["step"], line["loss"]) for line in log),
        "finished",
    ]


def test_a_tracker_that_is_not_installed_is_refused():
    expected = r"training.trackers\[0\]: 'wandb' is not installed; pip install"
    with pytest.raises(UserError, match=expected):
        check_trackers(("wandb",), find=lambda name: None)


def test_a_restart_drops_the_lines_of_steps_that_are_done_again(tmp_path):
    lines = [{"step": 0, "loss": 2.0, "skipped": 1.0}, {"step": 1, "loss": 1.5}, {"step": 2}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 1, "lo')  # cut short by a crash
    log = TrainingLog(tmp_path / "log.jsonl", (), 2)
    assert (log.last, log.skipped) == ({"loss": 1.5}, 1)
    log.write(2, {"loss": 1.0})
    written = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [0, 1, 2]
    log.stream.close()


def test_the_header_and_the_log_are_replaced_whole(tmp_path, monkeypatch):
    for name in ("training.json", "log.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n')

    def fail(*_):
        raise OSError

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError), training_log(tmp_path, "align", {}, 1, ()):
        pass
    with pytest.raises(OSError):
        TrainingLog(tmp_path / "log.jsonl", (), 1)
    texts = {(tmp_path / name).read_text() for name in ("training.json", "log.jsonl")}
    assert texts == {'{"step": 0}\n'}

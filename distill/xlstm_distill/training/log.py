"""What a training writes down while it runs: one JSON line a step, always; and the trackers the recipe names."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.device import forget_peak

PROJECT = "xlstm-distill"
LOG_FILE, HEADER_FILE = "log.jsonl", "training.json"


class TrainingLog:
    """Appends a line of figures for each step, and sends them to the trackers.

    `last` are the newest figures and `skipped` the number of skipped steps, those before a restart included.
    """

    def __init__(self, file: Path, trackers: Sequence[GeneralTracker], start: int) -> None:
        kept = _keep_before(file, start)
        self.last: dict[str, float] = (
            {k: v for k, v in kept[-1].items() if k != "step"} if kept else {}
        )
        self.skipped = sum("skipped" in line for line in kept)
        self.stream = file.open("a")
        self.trackers = trackers

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self.last = dict(figures)
        self.skipped += "skipped" in figures
        self.stream.write(json.dumps({"step": step, **figures}) + "\n")
        self.stream.flush()
        for tracker in self.trackers:
            tracker.log(dict(figures), step=step)


@contextlib.contextmanager
def training_log(
    directory: Path, label: str, header: Mapping[str, Any], start: int, trackers: Sequence[str]
) -> Iterator[TrainingLog]:
    """Open the log in a training's directory to go on at step `start`; lines of later steps are dropped first.

    `header` is what another shell needs to make sense of the lines: steps in all, tokens of a step.
    """
    facts = {
        **header,
        "label": label,
        "first_step": start,
        "host": platform.node(),
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    forget_peak()  # of this process's earlier stages
    _replace(directory / HEADER_FILE, json.dumps(facts, indent=1) + "\n")
    opened = [_open_tracker(name, label, directory.parent, facts) for name in trackers]
    log = TrainingLog(directory / LOG_FILE, opened, start)
    try:
        yield log
    finally:
        log.stream.close()
        for tracker in opened:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed, before any work is done.

    Raises:
        UserError: names the tracker and what to install.
    """
    for n, name in enumerate(names):
        if find_spec(name) is None:
            raise UserError(
                f"training.trackers[{n}]: {name!r} is not installed; "
                "pip install 'xlstm-distill[trackers]', or leave it out."
            )


def _open_tracker(
    name: str, label: str, directory: Path, facts: Mapping[str, Any]
) -> GeneralTracker:
    run_name = label.replace("/", "-")
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        tracker = kind(run_name, logging_dir=directory / name)
    else:  # these want a project, and a name in it
        place = {"dir": str(directory)} if name == "wandb" else {}
        tracker = kind(PROJECT, name=f"{directory.parent.name}-{run_name}", **place)
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(
        {key: value for key, value in facts.items() if value is not None}
    )
    return tracker


def _keep_before(file: Path, start: int) -> list[dict[str, Any]]:
    """Drop the lines of steps that will be done again, and return the others; one that a crash cut short goes too."""
    if not file.is_file():
        return []
    kept = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            if (figures := json.loads(line))["step"] < start:
                kept.append((line, figures))
    _replace(file, "".join(line + "\n" for line, _ in kept))
    return [figures for _, figures in kept]


def _replace(file: Path, text: str) -> None:
    """Write a file by rename: another shell sees the old one or the new one."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)

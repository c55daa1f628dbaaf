"""The log of a training: one JSON line for each step, and the trackers that the recipe names."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from xlstm_distill.artifacts.files import write_text
from xlstm_distill.errors import UserError

PROJECT = "xlstm-distill"
LOG_FILE, HEADER_FILE = "log.jsonl", "training.json"


class TrainingLog:
    """Appends a line of figures for each step, and sends them to the trackers.

    `last` are the newest figures and `skipped` is the number of skipped steps; both include steps
    before a restart. Lines of step `start` and later are dropped: these steps will be done again.
    """

    def __init__(self, file: Path, trackers: Sequence[GeneralTracker], start: int) -> None:
        kept = _keep_before(file, start)
        newest = kept[-1] if kept else {}
        self.last: dict[str, float] = {k: v for k, v in newest.items() if k != "step"}
        self.skipped = sum("skipped" in line for line in kept)
        self.stream = file.open("a")
        self.trackers = trackers

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step."""
        self.last = dict(figures)
        self.skipped += "skipped" in figures
        self.stream.write(json.dumps({"step": step, **figures}) + "\n")
        # `xlstm-distill status` reads the file while the training runs.
        self.stream.flush()
        for tracker in self.trackers:
            tracker.log(dict(figures), step=step)


@contextlib.contextmanager
def training_log(
    directory: Path, label: str, header: Mapping[str, Any], start: int, trackers: Sequence[str]
) -> Iterator[TrainingLog]:
    """Open the log in a training's directory to go on at step `start`.

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
    write_text(directory / HEADER_FILE, json.dumps(facts, indent=1) + "\n")
    opened = [_open_tracker(name, label, directory.parent, facts) for name in trackers]
    log = TrainingLog(directory / LOG_FILE, opened, start)
    try:
        yield log
    finally:
        log.stream.close()
        for tracker in opened:
            tracker.finish()


def check_trackers(names: Sequence[str], find: Callable[[str], object | None] = find_spec) -> None:
    """Refuse a tracker whose package is not installed, before any work is done.

    Raises:
        UserError: names the tracker and what to install.
    """
    # Each tracker's package has the tracker's name.
    for n, name in enumerate(names):
        if find(name) is None:
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
    else:
        # These take a project, and a name in it. Of them only wandb writes files of its own.
        place = {"dir": str(directory)} if name == "wandb" else {}
        tracker = kind(PROJECT, name=f"{directory.parent.name}-{run_name}", **place)
    if hasattr(tracker, "start"):
        tracker.start()
    known = {key: value for key, value in facts.items() if value is not None}
    tracker.store_init_configuration(known)
    return tracker


def _keep_before(file: Path, start: int) -> list[dict[str, Any]]:
    """Drop the lines of step `start` and later ones, and return the figures of the others."""
    if not file.is_file():
        return []
    lines, kept = [], []
    for line in file.read_text().splitlines():
        try:
            figures = json.loads(line)
        except ValueError:  # a crash cut this line short
            continue
        if figures["step"] < start:
            lines.append(line + "\n")
            kept.append(figures)
    write_text(file, "".join(lines))
    return kept

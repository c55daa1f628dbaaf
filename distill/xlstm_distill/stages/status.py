"""How far a run is, read from its directory by another shell; touches nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.artifacts.locks import training_lock
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import clock_time, short

if TYPE_CHECKING:
    from rich.table import Table

SILENT_SECONDS, SILENT_STEPS = 60.0, 5.0
"""A training that has logged nothing for so long, and for so many of its steps, is silent: it validates, saves, hangs,
or, where nothing else can be found out, is not running any more."""
"""What a training holds while it runs (`checkpoints.exclusive`)."""
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OSError)
"""What reading half-written or foreign JSON can raise."""


@dataclass(frozen=True)
class Stage:
    """An artifact that is done, or a training on its way to one. Times in seconds."""

    label: str
    state: str
    seconds: float | None = None
    step: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    seconds_since: float | None = None
    checkpoint: int | None = None
    figures: dict[str, float] | None = None
    path: str | None = None
    """The file that could not be read, from the run directory on."""


def read_status(run: Path) -> list[Stage]:
    """Read all artifacts and trainings of a run directory, oldest first.

    Raises:
        UserError: it is no run directory.
    """
    if not (run / "artifacts").is_dir():
        raise UserError(
            f"RUN: {run} is no run directory (it has no folder 'artifacts'); give the one that 'run' wrote."
        )
    manifests = [
        p
        for p in (run / "artifacts").rglob("manifest.json")
        if not p.relative_to(run).as_posix().count("/.")
    ]
    done = [
        stage
        for path in sorted(manifests, key=_modified)
        if (stage := _read(_artifact, path, run, _label(path, run)))
    ]
    published = {_label(path, run): _modified(path) for path in manifests}
    headers = sorted((run / "training").glob("*/training.json"), key=_modified)
    trainings = (
        _read(lambda p: _training(p, published), path, run, path.parent.name) for path in headers
    )
    return done + [stage for stage in trainings if stage]


def _label(manifest: Path, run: Path) -> str:
    return manifest.parent.relative_to(run / "artifacts").as_posix()


def _modified(path: Path) -> float:
    """When a file was written last; 0 if it is gone meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(read: Callable[[Path], Stage | None], path: Path, run: Path, label: str) -> Stage | None:
    """Read an entry; one that cannot be read is shown as such, and one that is gone meanwhile is not."""
    try:
        found = read(path)
        return found and replace(found, label=found.label or label)
    except FileNotFoundError:
        return None
    except DAMAGE:
        return Stage(label, "unreadable", path=str(path.relative_to(run)))


def _artifact(manifest: Path) -> Stage:
    return Stage("", "done", seconds=float(json.loads(manifest.read_text())["wall_seconds"]))


def _training(header: Path, published: Mapping[str, float]) -> Stage | None:
    """Read a training; None if it is over, or an older recipe's: an artifact of its label is newer."""
    facts, log = json.loads(header.read_text()), header.parent / "log.jsonl"
    line = _last_line(log)
    since = time.time() - (log if line else header).stat().st_mtime
    step, steps = (int(line["step"]) + 1 if line else int(facts["first_step"])), int(facts["steps"])
    rate = line.get("tokens_per_second") if line else None
    seconds_a_step = facts["tokens_per_step"] / rate if rate else None
    silent = since > max(SILENT_SECONDS, SILENT_STEPS * (seconds_a_step or 0))
    running = _running(header.parent, facts)
    if running is None:
        running = not silent
    if not running and published.get(facts["label"], 0.0) > time.time() - since:
        return None
    return Stage(
        facts["label"],
        "stopped" if not running else "silent" if silent else "training",
        step=step,
        steps=steps,
        tokens_per_second=rate,
        seconds_left=(steps - step) * seconds_a_step if seconds_a_step and running else None,
        seconds_since=since,
        checkpoint=_newest_checkpoint(header.parent),
        figures={k: v for k, v in line.items() if k not in ("step", "tokens_per_second")}
        if line
        else None,
    )


def _running(training: Path, facts: Mapping[str, Any]) -> bool | None:
    """Whether a process is at a training; None where that cannot be told from here.

    A training holds its lock until it is published. That it is free says something on its own machine alone, as not
    every file system shares locks between machines.
    """
    try:
        with training_lock(training.parent.parent, training).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False if facts.get("host") == platform.node() else None


def _newest_checkpoint(training: Path) -> int | None:
    """Number of the newest checkpoint's step; other names are not ours."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in training.iterdir())
    return max((int(match[1]) for match in found if match), default=None)


def _last_line(log: Path) -> dict[str, Any] | None:
    """The newest whole line of a log; one that is being written, or was damaged, does not count."""
    if not log.is_file():
        return None
    for line in reversed(log.read_bytes().splitlines(keepends=True)):
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError, TypeError):
                return dict(json.loads(line))
    return None


def to_json(stages: list[Stage]) -> str:
    """Write the status as JSON, facts that do not apply left out."""
    found = [
        {key: value for key, value in asdict(stage).items() if value is not None}
        for stage in stages
    ]
    return json.dumps({"stages": found}, indent=1)


def status_table(stages: list[Stage]) -> Table:
    """Lay the status out for reading."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("stage", "state", "time", "step", "tokens/s", "left", "figures"):
        table.add_column(
            name, justify="left" if name in ("stage", "state", "figures") else "right", no_wrap=True
        )
    for stage in stages:
        table.add_row(*_cells(stage))
    return table


def _cells(stage: Stage) -> tuple[str, ...]:
    shown = ("loss", "ce", "kl", "mse", "grad_norm", "held_out_ce", "held_out_kl", "held_out_gate")
    figures = [
        f"{name} {stage.figures[name]:.4g}"
        for name in shown
        if stage.figures and name in stage.figures
    ]
    state = stage.state if stage.path is None else f"{stage.state}: {stage.path}"
    if state == "silent":
        state = f"training, silent for {clock_time(stage.seconds_since or 0)}"
    if state == "stopped":
        at = (
            f"at checkpoint {stage.checkpoint}"
            if stage.checkpoint is not None
            else "without a checkpoint"
        )
        state = f"stopped {clock_time(stage.seconds_since or 0)} ago {at}"
    return (
        stage.label,
        state,
        clock_time(stage.seconds) if stage.seconds is not None else "",
        f"{stage.step} of {stage.steps}" if stage.steps else "",
        short(stage.tokens_per_second) if stage.tokens_per_second else "",
        clock_time(stage.seconds_left) if stage.seconds_left is not None else "",
        ", ".join(figures),
    )

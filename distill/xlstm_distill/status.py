"""How far a run is, read from its directory by another shell; touches nothing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_distill.console import clock_time, short
from xlstm_distill.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

SILENT_SECONDS, SILENT_STEPS = 60.0, 5.0
"""A training that has logged nothing for so long, and for so many of its steps, is not running any more."""


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


def read_status(run: Path) -> list[Stage]:
    """Read all artifacts and trainings of a run directory, oldest first.

    Raises:
        UserError: it is no run directory.
    """
    if not (run / "artifacts").is_dir():
        raise UserError(
            f"RUN: {run} is no run directory (it has no folder 'artifacts'); give the one that 'run' wrote."
        )
    manifests = [p for p in (run / "artifacts").rglob("manifest.json") if not p.relative_to(run).as_posix().count("/.")]
    done = [_artifact(p, run) for p in sorted(manifests, key=lambda p: p.stat().st_mtime)]
    headers = sorted((run / "training").glob("*/training.json"), key=lambda p: p.stat().st_mtime)
    return done + [_training(p) for p in headers]


def _artifact(manifest: Path, run: Path) -> Stage:
    content = json.loads(manifest.read_text())
    label = manifest.parent.relative_to(run / "artifacts").as_posix()
    return Stage(label, "done", seconds=content["wall_seconds"])


def _training(header: Path) -> Stage:
    facts, log = json.loads(header.read_text()), header.parent / "log.jsonl"
    line = _last_line(log)
    since = time.time() - (log if line else header).stat().st_mtime
    step = int(line["step"]) + 1 if line else facts["first_step"]
    rate = line.get("tokens_per_second") if line else None
    seconds_a_step = facts["tokens_per_step"] / rate if rate else None
    silent = since > max(SILENT_SECONDS, SILENT_STEPS * (seconds_a_step or 0))
    checkpoints = sorted(p.name for p in header.parent.glob("step-*"))
    return Stage(
        facts["label"],
        "stopped" if silent else "training",
        step=step,
        steps=facts["steps"],
        tokens_per_second=rate,
        seconds_left=(facts["steps"] - step) * seconds_a_step if seconds_a_step and not silent else None,
        seconds_since=since,
        checkpoint=int(checkpoints[-1].removeprefix("step-")) if checkpoints else None,
        figures={k: v for k, v in line.items() if k not in ("step", "tokens_per_second")} if line else None,
    )


def _last_line(log: Path) -> dict[str, Any] | None:
    """The newest whole line of a log; one that is being written does not count."""
    if not log.is_file():
        return None
    for line in reversed(log.read_bytes().splitlines(keepends=True)):
        if line.endswith(b"\n"):
            return json.loads(line)
    return None


def to_json(stages: list[Stage]) -> str:
    """Write the status as JSON, facts that do not apply left out."""
    found = [{key: value for key, value in asdict(stage).items() if value is not None} for stage in stages]
    return json.dumps({"stages": found}, indent=1)


def status_table(stages: list[Stage]) -> Table:
    """Lay the status out for reading."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("stage", "state", "time", "step", "tokens/s", "left", "figures"):
        table.add_column(name, justify="left" if name in ("stage", "state", "figures") else "right", no_wrap=True)
    for stage in stages:
        table.add_row(*_cells(stage))
    return table


def _cells(stage: Stage) -> tuple[str, ...]:
    shown = ("loss", "ce", "kl", "mse", "grad_norm", "held_out_ce", "held_out_kl", "held_out_gate")
    figures = [f"{name} {stage.figures[name]:.4g}" for name in shown if stage.figures and name in stage.figures]
    state = stage.state
    if state == "stopped":
        at = f"at checkpoint {stage.checkpoint}" if stage.checkpoint is not None else "without a checkpoint"
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

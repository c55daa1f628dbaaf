"""Read the status of a run from its directory.

The run's saved recipe says which artifacts there should be and from which settings. Manifests say
what was made, locks and logs what is being made.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.locks import is_held, training_lock
from xlstm_distill.artifacts.manifest import MANIFEST, size_problem
from xlstm_distill.artifacts.run import RECIPE_FILE
from xlstm_distill.artifacts.shelf import KEPT, folders_of
from xlstm_distill.errors import UserError
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.outline import stage_of
from xlstm_distill.stages.status.comparison import compare, saved_lineage
from xlstm_distill.stages.status.records import DAMAGE, ROW_FIGURES, StageStatus

SILENT_SECONDS, SILENT_STEPS = 60.0, 5.0
"""A training is silent when it has logged nothing for so long and for so many of its steps.

It validates, saves or hangs; where nothing else can be found out, it is not running any more.
"""
UNDER_WAY = ("running", "silent")
COUNTED = ("data", "merge", "variant")
"""Stages whose progress is in a file of its own: rows, and trials or steps of merge weights."""


def read_status(run: Path, lineage: Lineage | None = None) -> list[StageStatus]:
    """Read all artifacts, trainings and other work of a run directory, in the stages' order.

    They are compared with `lineage`, or with that of the recipe saved in the run directory.

    Raises:
        UserError: it is no run directory.
    """
    manifests = _manifests(run)
    found = _published(run, manifests)
    begun = (
        *_trainings(run, manifests),
        *_preparations(run, manifests),
        *_searches(run, manifests),
    )
    for status in (*begun, *_working(run)):
        earlier = found.get(status.label)
        # A process at work replaces an earlier result, and also what a stopped one left.
        if earlier is None or earlier.state not in UNDER_WAY:
            if earlier is not None and stage_of(status.label) in COUNTED:
                status = _with_count(status, earlier)
            found[status.label] = status
    try:
        lineage = lineage or saved_lineage(run)
    except UserError as error:
        rest = list(found.values())
        return [StageStatus("recipe", "unreadable", why=str(error), path=RECIPE_FILE), *rest]
    if lineage is None:  # a run of before recipes were saved
        return list(found.values())
    return compare(lineage, found, manifests)


def _manifests(run: Path) -> dict[str, Path]:
    """Manifests of the published artifacts by label, oldest first."""
    found: dict[str, Path] = {}
    paths = {folder / MANIFEST: label for label, folder in folders_of(run)}
    for path in sorted(paths, key=_modified):
        if not KEPT.fullmatch(path.parent.name):
            found[paths[path]] = path
    return found


def _published(run: Path, manifests: Mapping[str, Path]) -> dict[str, StageStatus]:
    found: dict[str, StageStatus] = {}
    for label, path in manifests.items():
        if status := _read(_artifact, path, run, label):
            found[label] = status
    return found


def _trainings(run: Path, manifests: Mapping[str, Path]) -> list[StageStatus]:
    published = {label: _modified(path) for label, path in manifests.items()}

    def read(header: Path) -> StageStatus | None:
        return _training(header, published)

    headers = sorted((run / "training").glob("*/training.json"), key=_modified)
    found = [_read(read, header, run, header.parent.name) for header in headers]
    return [status for status in found if status]


def _preparations(run: Path, manifests: Mapping[str, Path]) -> list[StageStatus]:
    """Rows that were being made, by their progress files; `_working` knows which still are."""
    published = {label: _modified(path) for label, path in manifests.items()}

    def read(progress: Path) -> StageStatus | None:
        status = _preparation(progress)
        # Published, and killed before the progress file was removed; or made for another budget.
        over = published.get(status.label, 0.0) > _modified(progress)
        return None if over else status

    files = sorted((run / "training").glob("data-*/progress.json"), key=_modified)
    found = [_read(read, file, run, file.parent.name) for file in files]
    return [status for status in found if status]


def _preparation(progress: Path) -> StageStatus:
    """Read how far a domain's rows are; a checkpoint is there after every shard."""
    facts = json.loads(progress.read_text())
    name, _, _ = progress.parent.name.removeprefix("data-").rpartition("-")
    rows = int(_finite(facts["rows"]))
    return StageStatus(
        f"data/{name}",
        "stopped",
        step=rows,
        steps=int(_finite(facts["needed"])),
        tokens_per_second=_finite(facts["tokens_per_second"]),
        seconds_since=time.time() - progress.stat().st_mtime,
        checkpoint=rows,
    )


def _searches(run: Path, manifests: Mapping[str, Path]) -> list[StageStatus]:
    """Merge weights that were being found, by the trials or steps that are done."""
    published = {label: _modified(path) for label, path in manifests.items()}

    def read(progress: Path) -> StageStatus | None:
        facts = json.loads(progress.read_text())
        label, step = _label(facts["label"]), int(_finite(facts["step"]))
        if published.get(label, 0.0) > _modified(progress):
            return None
        since = time.time() - progress.stat().st_mtime
        steps = int(_finite(facts["steps"]))
        # What was scored is kept: a search goes on with the next trial.
        return StageStatus(
            label, "stopped", step=step, steps=steps, seconds_since=since, checkpoint=step
        )

    files = sorted((run / "training").glob("*/search.json"), key=_modified)
    found = [_read(read, file, run, file.parent.name) for file in files]
    return [status for status in found if status]


def _with_count(work: StageStatus, counted: StageStatus) -> StageStatus:
    """Say of rows or merge weights that a process is at how far they are."""
    if work.state not in UNDER_WAY or not (counted.steps and counted.step is not None):
        return work
    rate = counted.tokens_per_second
    return replace(work, step=counted.step, steps=counted.steps, tokens_per_second=rate or None)


def _working(run: Path) -> list[StageStatus]:
    """Data, captures, merges, evaluations and reports that a process is at."""
    marks = sorted((run / ".locks").glob("working-*.json"), key=_modified)
    found = [_read(_work, mark, run, mark.stem) for mark in marks]
    return [status for status in found if status]


def _modified(path: Path) -> float:
    """When a file was written last; 0 if it is gone meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _read(
    read: Callable[[Path], StageStatus | None], path: Path, run: Path, label: str
) -> StageStatus | None:
    """Read an entry. One that cannot be read is shown as such; one that is gone is left out."""
    try:
        found = read(path)
        return found and replace(found, label=found.label or label)
    except FileNotFoundError:
        return None
    except DAMAGE:
        return StageStatus(label, "unreadable", path=str(path.relative_to(run)))


def _artifact(manifest: Path) -> StageStatus:
    facts = json.loads(manifest.read_text())
    seconds = _finite(facts["wall_seconds"])
    for name, fact in facts.get("files", {}).items():
        if problem := size_problem(manifest.parent, name, fact):
            return StageStatus("", "damaged", seconds=seconds, why=f"{name} is {problem}")
    if facts.get("stage") != "data":
        return StageStatus("", "done", seconds=seconds)
    results = facts.get("results", {})
    figures = {name: _finite(results[name]) for name in ROW_FIGURES if name in results}
    return StageStatus("", "done", seconds=seconds, figures=figures or None)


def _finite(value: Any) -> float:
    """A number from a file, which may hold anything; raises ValueError for one that is none."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _label(value: Any) -> str:
    """A label from a file; raises ValueError for anything that is no plain text."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(value)
    return value


def _work(mark: Path) -> StageStatus | None:
    """Read who is at an artifact; None if that process has died."""
    try:
        facts = json.loads(mark.read_text())
    except json.JSONDecodeError:
        # Its process is writing it at this moment, or was killed while it did.
        return None
    here = facts["host"] == platform.node()
    # Not every file system shares locks between machines: a free lock only speaks for this one.
    if not is_held(mark) and here:
        return None
    since = max(0.0, time.time() - _finite(facts["started"]))
    host = None if here else _label(facts["host"])
    return StageStatus(_label(facts["label"]), "running", seconds=since, host=host)


def _training(header: Path, published: Mapping[str, float]) -> StageStatus | None:
    """Read a training; None if it is over: an artifact of its label is newer."""
    facts = json.loads(header.read_text())
    log = header.parent / "log.jsonl"
    line = _last_line(log)
    since = time.time() - (log if line else header).stat().st_mtime
    step = int(line["step"]) + 1 if line else int(facts["first_step"])
    steps = int(facts["steps"])
    rate = line.get("tokens_per_second") if line else None
    seconds_a_step = facts["tokens_per_step"] / rate if rate else None
    silent = since > max(SILENT_SECONDS, SILENT_STEPS * (seconds_a_step or 0))
    running = _is_running(header.parent, facts)
    if running is None:
        running = not silent
    if not running and published.get(facts["label"], 0.0) > time.time() - since:
        return None
    state = "stopped"
    if running:
        state = "silent" if silent else "running"
    left = max(0, steps - step) * seconds_a_step if seconds_a_step and running else None
    figures: dict[str, float] = {}
    for name, value in (line or {}).items():
        if name not in ("step", "tokens_per_second") and isinstance(value, int | float):
            figures[name] = value
    return StageStatus(
        _label(facts["label"]),
        state,
        step=step,
        steps=steps,
        tokens_per_second=rate,
        seconds_left=left,
        seconds_since=since,
        checkpoint=_newest_checkpoint(header.parent),
        figures=figures if line else None,
    )


def _is_running(training: Path, facts: Mapping[str, Any]) -> bool | None:
    """Whether a process is at a training; None where that cannot be told from here.

    A training holds its lock until it is published. A free lock only speaks for this machine.
    """
    held = is_held(training_lock(training.parent.parent, training))
    if held:
        return True
    return False if held is False and facts.get("host") == platform.node() else None


def _newest_checkpoint(training: Path) -> int | None:
    """Step of the newest checkpoint; folders of other names are not ours."""
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in training.iterdir()]
    return max((int(match[1]) for match in found if match), default=None)


def _last_line(log: Path) -> dict[str, Any] | None:
    """The newest whole line of a log; one that is being written, or is damaged, does not count."""
    if not log.is_file():
        return None
    for line in reversed(log.read_bytes().splitlines(keepends=True)):
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError, TypeError):
                return dict(json.loads(line))
    return None

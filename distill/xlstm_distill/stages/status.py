"""How far a run is, read from its directory by another shell. Loads no torch; touches nothing.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from xlstm_distill.artifacts.changes import in_a_line
from xlstm_distill.artifacts.locks import is_held, training_lock
from xlstm_distill.artifacts.manifest import FORMAT, MANIFEST, size_problem
from xlstm_distill.artifacts.run import RECIPE_FILE
from xlstm_distill.artifacts.shelf import KEPT, folders_of
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import clock_time, short
from xlstm_distill.stages.lineage import Lineage, stage_of

if TYPE_CHECKING:
    from rich.table import Table

SILENT_SECONDS, SILENT_STEPS = 60.0, 5.0
"""A training is silent when it has logged nothing for so long and for so many of its steps.

It validates, saves or hangs; where nothing else can be found out, it is not running any more.
"""
DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    ArithmeticError,
    RecursionError,
)
"""What reading half-written or foreign files can raise."""
UNDER_WAY = ("running", "silent")
ROW_FIGURES = ("rows", "tokens", "fill", "bytes_per_token")
"""Figures of prepared rows, by their names in the manifest."""
LARGEST_RECIPE = 2**22
"""Bytes from which a saved recipe is none that this program wrote."""


@dataclass(frozen=True)
class StageStatus:
    """Where an artifact of the run stands. Times are in seconds.

    `state` is `done`, `outdated` (made from other settings than the saved recipe's; `why` names
    them), `running`, `silent` (running, but its log does not grow), `stopped`, `waiting` (not
    begun), `unreadable` (`path` names the file, from the run directory on) or `damaged` (`why`
    names a file that is missing or has another size). Steps of `data/NAME` are its rows.
    """

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
    host: str | None = None
    why: str | None = None
    path: str | None = None


def read_status(run: Path) -> list[StageStatus]:
    """Read all artifacts, trainings and other work of a run directory, in the stages' order.

    Raises:
        UserError: it is no run directory.
    """
    manifests = _manifests(run)
    found = _published(run, manifests)
    for status in (*_trainings(run, manifests), *_preparations(run, manifests), *_working(run)):
        earlier = found.get(status.label)
        # A process at work replaces an earlier result, and also what a stopped one left.
        if earlier is None or earlier.state not in UNDER_WAY:
            if earlier is not None and stage_of(status.label) == "data":
                status = _with_rows(status, earlier)
            found[status.label] = status
    try:
        lineage = saved_lineage(run)
    except UserError as error:
        rest = list(found.values())
        return [StageStatus("recipe", "unreadable", why=str(error), path=RECIPE_FILE), *rest]
    if lineage is None:  # a run of before recipes were saved
        return list(found.values())
    return _compared(lineage, found, manifests)


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


def _with_rows(work: StageStatus, rows: StageStatus) -> StageStatus:
    """Say of rows that a process is making how far they are."""
    if work.state not in UNDER_WAY or not (rows.steps and rows.step is not None):
        return work
    rate = rows.tokens_per_second
    return replace(work, step=rows.step, steps=rows.steps, tokens_per_second=rate or None)


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


def saved_lineage(run: Path) -> Lineage | None:
    """The lineage of the recipe that the run was started with last; None where none was saved.

    Raises:
        UserError: it cannot be read.
    """
    path = run / RECIPE_FILE
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_RECIPE:
            raise ValueError("no recipe")
        # Without the context of a folder, validation leaves paths alone: a teacher may have moved.
        return Lineage(Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))))
    except (*DAMAGE, yaml.YAMLError):
        raise UserError(
            f"{path}: damaged, or written by another version, so nothing can be compared with it."
        ) from None


def _compared(
    lineage: Lineage, found: Mapping[str, StageStatus], manifests: Mapping[str, Path]
) -> list[StageStatus]:
    """Put the statuses in the recipe's order, with what is waiting and what is outdated."""
    contents = {label: _json(path) for label, path in manifests.items()}
    comparison = _Comparison(lineage, contents)
    ordered: list[StageStatus] = []
    for label in lineage.labels():
        status = found.get(label, StageStatus(label, "waiting"))
        if label in contents and status.state != "unreadable":
            try:
                why = comparison.why_outdated(label)
            except DAMAGE:
                path = f"artifacts/{label}/manifest.json"
                status, why = StageStatus(label, "unreadable", path=path), None
            if why is not None and status.state == "done":
                status = replace(status, state="outdated", why=why)
        ordered.append(status)
    # What another recipe made in this run directory, and what no recipe names.
    planned = {status.label for status in ordered}
    rest = [replace(s, why="not in the recipe") for s in found.values() if s.label not in planned]
    return ordered + rest


class _Comparison:
    """Compares manifests with a recipe, in the order of the lineage's labels."""

    def __init__(self, lineage: Lineage, manifests: Mapping[str, Mapping[str, Any]]) -> None:
        self.lineage, self.manifests = lineage, manifests
        # Why others that are built on an artifact are outdated, by its label. Rows and targets can
        # be too few, and so be made again, while what is built on them stays as it is.
        self.spread: dict[str, str] = {}

    def why_outdated(self, label: str) -> str | None:
        """Say which settings of an artifact are not the recipe's; None if all are."""
        manifest = self.manifests[label]
        changes = self.lineage.changes(label, manifest)
        if manifest.get("format", FORMAT) != FORMAT:
            changes.append("another version of the program made it")
        inherited = self._inherited(label, manifest)
        spreading = [*inherited, *changes]
        if stage_of(label) in ("data", "capture"):
            spreading = [*inherited, *self.lineage.identity_changes(label, manifest)]
        if spreading:
            self.spread[label] = spreading[0]
        changes += inherited
        return in_a_line(changes) if changes else None

    def _inherited(self, label: str, manifest: Mapping[str, Any]) -> list[str]:
        """What changed in the artifacts that one is built on."""
        needs = self.lineage.needs(label)
        used = _built_on(label, manifest)
        found = [f"{need} is new" for need in needs if need not in used]
        found += [f"{name} is no longer used" for name in used if name not in needs]
        for need in needs:
            if stage_of(need) == "data" and need in self.spread:
                found.append(f"{need} changed: {self.spread[need]}")
            elif need in self.spread:
                found.append(f"{need} is outdated")
            elif need in self.manifests and need in used:
                published = self.manifests[need].get("identity")
                if published != used[need]:
                    found.append(f"{need} was made again")
        return found


def _built_on(label: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Identities of the artifacts that one was built on, by their labels."""
    inputs = dict(manifest.get("inputs", {}))
    for name in ("teacher", "tokenizer", "tasks"):
        inputs.pop(name, None)
    if label == "evaluate/merged" and "merge/merged" in inputs:
        inputs["merge"] = inputs.pop("merge/merged")  # an evaluation names its model
    return inputs


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except DAMAGE:  # the row of this artifact says so
        return {}


def to_json(stages: list[StageStatus], kept: Sequence[Any] = ()) -> str:
    """Write the status as JSON, facts that do not apply left out; `kept` are `upkeep.Kept`."""
    found = []
    for stage in stages:
        facts = asdict(stage)
        found.append({key: value for key, value in facts.items() if value is not None})
    return json.dumps({"stages": found, "kept": [asdict(one) for one in kept]}, indent=1)


def status_table(stages: list[StageStatus]) -> Table:
    """Lay the status out for reading."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("stage", "state", "time", "step", "tokens/s", "left", "figures"):
        words = name in ("stage", "state", "figures")
        table.add_column(name, justify="left" if words else "right", no_wrap=name != "state")
    for stage in stages:
        # As text: a host or label with brackets is no markup.
        table.add_row(*map(Text, _cells(stage)))
    return table


SHOWN_FIGURES = (
    *ROW_FIGURES,
    "loss",
    "ce",
    "kl",
    "relative_error",
    "grad_norm",
    "held_out_ce",
    "held_out_kl",
    "held_out_gate",
)


def _cells(stage: StageStatus) -> tuple[str, ...]:
    known = stage.figures or {}
    figures = [f"{name} {_written(known[name])}" for name in SHOWN_FIGURES if name in known]
    return (
        stage.label,
        _state_in_words(stage),
        clock_time(stage.seconds) if stage.seconds is not None else "",
        f"{stage.step} of {stage.steps}" if stage.steps else "",
        short(stage.tokens_per_second) if stage.tokens_per_second else "",
        clock_time(stage.seconds_left) if stage.seconds_left is not None else "",
        ", ".join(figures),
    )


def _written(figure: float) -> str:
    # Counts of rows and tokens are large; losses never are.
    return short(figure) if abs(figure) >= 1e5 else f"{figure:.4g}"


def _state_in_words(stage: StageStatus) -> str:
    since = clock_time(stage.seconds_since or 0)
    if stage.state == "unreadable":
        return f"unreadable: {stage.path}" if stage.why is None else f"unreadable: {stage.why}"
    if stage.state == "silent":
        return f"running, silent for {since}"
    if stage.state == "stopped":
        at = "without a checkpoint"
        if stage.checkpoint is not None:
            at = f"at checkpoint {stage.checkpoint}"
        return f"stopped {since} ago {at}"
    words = stage.state if stage.host is None else f"{stage.state} on {stage.host}"
    return words if stage.why is None else f"{words}: {stage.why}"

"""Say whether a stage fits on a GPU, and find the fewest changes that would make it fit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from xlstm_distill.planning.inputs import MemoryInputs, Sharding
from xlstm_distill.planning.machine import Gpu
from xlstm_distill.planning.memory import Memory

MOST_WAYS = 3
"""Ways to fit that are named at most."""
MOST_CHANGES = 4
"""Changes of one way at most."""
MOST_GPUS = 64
SHORTEST_ROW = 1024
"""Tokens of a row at least, where a shorter context is proposed: two windows of the paper's."""
SHARDED = ("distill", "refine")
"""Stages whose student is cut over the GPUs."""
Value = str | int | bool


@dataclass(frozen=True)
class Change:
    """A change of settings, and what it does to the memory model's inputs.

    Keys of `settings` are keys of the recipe (`align.micro_batch`) or options of `plan` (`--gpus`).
    """

    settings: Mapping[str, Value]
    apply: Callable[[MemoryInputs], MemoryInputs]


@dataclass(frozen=True)
class Way:
    """Settings that solve a problem together, and the memory per GPU that they lead to."""

    settings: Mapping[str, Value]
    memory: float | None = None

    def __str__(self) -> str:
        size = "" if self.memory is None else f" ({self.memory / 1e9:.1f} GB)"
        return command_line(self.settings) + size


@dataclass(frozen=True)
class Problem:
    """Why a stage does not run as planned, in one line, and ways to solve it, the best first."""

    text: str
    ways: tuple[Way, ...] = ()


@dataclass(frozen=True)
class StageMemory:
    """A stage's memory as a function of its inputs; the GPUs share `batch` rows."""

    stage: str
    memory: Callable[[MemoryInputs], Memory]
    inputs: MemoryInputs
    batch: int
    label: str | None = None
    """What messages call it; default: `stage`."""


@dataclass(frozen=True)
class Fit:
    """Memory of a stage at its peak, and the problem where a GPU has less."""

    memory: Memory
    problem: Problem | None = None

    @property
    def fits(self) -> bool:
        """Whether the GPU has enough memory."""
        return self.problem is None


def command_line(settings: Mapping[str, Value]) -> str:
    """Write settings as the options that set them: `--set align.micro_batch=2 --gpus 4`."""
    words = []
    for key, value in settings.items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        words.append(f"{key} {shown}" if key.startswith("--") else f"--set {key}={shown}")
    return " ".join(words)


def what_fits(stage: StageMemory, gpu: Gpu, *, search: bool = True) -> Fit:
    """Compare a stage's memory with a GPU's; where it is more, look for ways to fit (`search`)."""
    memory = stage.memory(stage.inputs)
    if memory.total <= gpu.memory:
        return Fit(memory)
    ways = tuple(itertools.islice(_ways(stage, gpu), MOST_WAYS)) if search else ()
    return Fit(memory, Problem(_message(stage, memory, gpu, ways), ways))


def _message(stage: StageMemory, memory: Memory, gpu: Gpu, ways: tuple[Way, ...]) -> str:
    name = stage.label or stage.stage
    needs = f"{name}: needs {memory.total / 1e9:.1f} GB on each GPU, {gpu.name} has "
    needs += f"{gpu.memory / 1e9:g}"
    if not ways:
        return f"{needs}; no setting tried here makes it fit: take a GPU with more memory."
    return f"{needs}; it fits with {', or with '.join(map(str, ways))}."


def _ways(stage: StageMemory, gpu: Gpu) -> Iterator[Way]:
    """Find ways to fit, the best first.

    Settings that leave the result as it is come first. Only where none suffices do those follow
    that cost quality: fewer trained parameters (the paper finds it worse), then shorter rows. Last
    come more GPUs, as few as will do.
    """
    settings = _memory_settings(stage)
    found = list(smallest_ways(stage, gpu, settings))
    if not found:
        found = _costlier_ways(stage, gpu, settings)
        found += _on_more_gpus(stage, gpu)
    yield from found


def _on_more_gpus(stage: StageMemory, gpu: Gpu) -> list[Way]:
    """Find ways with as few more GPUs as will do."""
    for more in _more_gpus(stage):
        ways = _with(stage, gpu, more)
        if ways:
            return ways
    return []


def _costlier_ways(stage: StageMemory, gpu: Gpu, settings: list[list[Change]]) -> list[Way]:
    """Find the smallest change that costs quality; empty where there is none."""
    fewer, shorter = _fewer_trained(stage), _shorter_rows(stage)
    for kinds in ([fewer], [shorter], [fewer, shorter]):
        required = [kind for kind in kinds if kind]
        ways = smallest_ways(stage, gpu, [*required, *settings])
        first = next(ways, None)
        if first is not None:
            return [first]
    return []


def smallest_ways(stage: StageMemory, gpu: Gpu, kinds: list[list[Change]]) -> Iterator[Way]:
    """Find the smallest sets of changes with which a stage fits, at most one of each kind."""
    for count in range(1, MOST_CHANGES + 1):
        found = False
        for chosen in itertools.combinations(kinds, count):
            way = _first_that_fits(stage, gpu, chosen)
            if way is not None:
                found = True
                yield way
        if found:  # a larger set would change more than is needed
            return


def _first_that_fits(stage: StageMemory, gpu: Gpu, kinds: tuple[list[Change], ...]) -> Way | None:
    """Take one change of each kind, the mildest combination that fits."""
    for changes in itertools.product(*kinds):
        inputs, settings = stage.inputs, dict[str, Value]()
        for change in changes:
            inputs = change.apply(inputs)
            settings |= change.settings
        memory = stage.memory(inputs)
        if memory.total <= gpu.memory:
            return Way(settings, memory.total)
    return None


def _memory_settings(stage: StageMemory) -> list[list[Change]]:
    """List settings that cost time or disk but not quality, by kind, the mildest first."""
    if stage.stage in ("capture", "evaluate"):
        return [_fewer_rows(stage, f"{stage.stage}.batch")]
    inputs = stage.inputs
    kinds = [_fewer_rows(stage, f"{stage.stage}.micro_batch")]
    if not inputs.checkpointing:
        key = f"{stage.stage}.activation_checkpointing"
        kinds.insert(0, [_change(key, True, checkpointing=True)])
    if stage.stage == "refine":
        kinds.append(_fewer_samples(inputs))
    if stage.stage in SHARDED:
        if inputs.gpus > 1:
            # Nothing samples under DeepSpeed.
            others: list[Sharding] = ["fsdp2"] if stage.stage == "refine" else ["fsdp2", "zero3"]
            kinds.append(
                [_change("--sharding", s, sharding=s) for s in others if s != inputs.sharding]
            )
        if inputs.online:
            kinds += _teacher_settings(stage)
    return [kind for kind in kinds if kind]


def _teacher_settings(stage: StageMemory) -> list[list[Change]]:
    """List what makes an online teacher smaller: cut over the GPUs, or not there at all."""
    inputs, kinds = stage.inputs, []
    section = "refine" if stage.stage == "refine" else "capture"
    if inputs.gpus > 1 and not inputs.shard_teacher:
        kinds.append([_change(f"{section}.shard_teacher", True, shard_teacher=True)])
    if section == "refine":
        return kinds  # samples cannot be scored before they are there
    stored = _change("capture.targets", "stored", online=False, shard_teacher=False)
    if inputs.shard_teacher:
        # A recipe refuses to cut a teacher that it does not have.
        stored = replace(stored, settings={**stored.settings, "capture.shard_teacher": False})
    return [*kinds, [stored]]


def _change(key: str, value: Value, **inputs: object) -> Change:
    return Change({key: value}, functools.partial(_replaced, changes=inputs))


def _replaced(inputs: MemoryInputs, *, changes: Mapping[str, object]) -> MemoryInputs:
    return replace(inputs, **changes)  # type: ignore[arg-type]


def _fewer_rows(stage: StageMemory, key: str) -> list[Change]:
    """List the smaller passes, the largest first; more of them make up the batch.

    A recipe's `micro_batch` must divide its batch. `capture.batch` and `evaluate.batch` are the
    pass itself.
    """
    changes = []
    for rows in range(stage.inputs.rows - 1, 0, -1):
        if stage.batch % rows == 0:
            changes.append(_change(key, rows, rows=rows, accumulates=True))
    return changes


def _fewer_samples(inputs: MemoryInputs) -> list[Change]:
    """Halve the rows that are decoded at once; each token then reads the weights more often."""
    changes, rows = [], inputs.sampled // 2
    while rows:
        changes.append(_change("refine.sample_batch", rows, sampled=rows))
        rows //= 2
    return changes


def _fewer_trained(stage: StageMemory) -> list[Change]:
    """List what `distill.trainable` could be; the paper's order of quality: all, mixer, lora."""
    if stage.stage not in SHARDED:
        return []
    order = ("all", "mixer", "lora")
    fewer = order[order.index(stage.inputs.trainable) + 1 :]
    return [_change("distill.trainable", kind, trainable=kind) for kind in fewer]


def _shorter_rows(stage: StageMemory) -> list[Change]:
    """Halve the context; every stage then reads shorter rows."""
    if stage.stage in ("evaluate", "refine"):
        return []
    changes, tokens = [], stage.inputs.tokens // 2
    while tokens >= SHORTEST_ROW:
        changes.append(_change("data.context", tokens, tokens=tokens))
        tokens //= 2
    return changes


def _with(stage: StageMemory, gpu: Gpu, more: Change) -> list[Way]:
    """Find what fits on more GPUs, by itself or with changed settings."""
    larger = replace(stage, inputs=more.apply(stage.inputs))
    memory = larger.memory(larger.inputs)
    if memory.total <= gpu.memory:
        return [Way(more.settings, memory.total)]
    ways = smallest_ways(larger, gpu, _memory_settings(larger))
    return [Way({**more.settings, **way.settings}, way.memory) for way in ways]


def _more_gpus(stage: StageMemory) -> Iterator[Change]:
    """Double the GPUs while they can share the batch, where a stage shards what it holds."""
    inputs, gpus = stage.inputs, 2 * stage.inputs.gpus
    while stage.stage in SHARDED and gpus <= min(stage.batch, MOST_GPUS):
        if stage.batch % gpus == 0:
            settings: dict[str, Value] = {"--gpus": gpus}
            if inputs.sharding == "none":  # a single GPU shards nothing; several take FSDP2
                settings["--sharding"] = "fsdp2"
            yield Change(settings, functools.partial(_spread, gpus=gpus, batch=stage.batch))
        gpus *= 2


def _spread(inputs: MemoryInputs, *, gpus: int, batch: int) -> MemoryInputs:
    """The same batch on more GPUs: fewer rows each."""
    share = batch // gpus
    rows = min(inputs.rows, share)
    sharding: Sharding = "fsdp2" if inputs.sharding == "none" else inputs.sharding
    # Of what is sampled, too, a GPU has its share at most.
    sampled = min(inputs.sampled, share)
    return replace(
        inputs,
        gpus=gpus,
        rows=rows,
        accumulates=share > rows,
        sharding=sharding,
        sampled=sampled,
    )

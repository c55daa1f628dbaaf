"""Whether a stage fits on a GPU, and if not, the fewest changes of settings that would make it fit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from xlstm_distill.planning.machine import Gpu
from xlstm_distill.planning.memory import Memory, Setup

ADVICE = 3
"""Ways out that are named at most."""
MOST_GPUS = 64
LONGEST = 4
"""Changes of a way out at most."""
Change = tuple[str, Callable[[Setup], Setup]]


@dataclass(frozen=True)
class Stage:
    """A stage's memory as a function of its settings; `batch` rows are shared by the GPUs."""

    name: str
    memory: Callable[[Setup], Memory]
    setup: Setup
    batch: int
    label: str | None = None


@dataclass(frozen=True)
class Fit:
    """Memory of a stage at its peak, and what to say where it is more than the GPU has."""

    memory: Memory
    fits: bool
    problems: tuple[str, ...] = ()


def what_fits(stage: Stage, gpu: Gpu) -> Fit:
    """Compare a stage's memory with a GPU's; where it is more, look for changes that make it fit."""
    memory = stage.memory(stage.setup)
    if memory.total <= gpu.memory:
        return Fit(memory, True)
    name = stage.label or stage.name
    needs = f"{name}: needs {memory.total / 1e9:.1f} GB on each GPU, {gpu.name} has {gpu.memory / 1e9:.0f}"
    ways = list(itertools.islice(ways_out(stage, gpu, _settings(stage)), ADVICE))
    if not ways and stage.name == "distill":  # hardware last, and as little as will do
        ways = next(
            (found for more in _more_gpus(stage) if (found := _ways_with(stage, gpu, more))), []
        )
    if not ways:
        return Fit(
            memory,
            False,
            (f"{needs}; no setting tried here makes it fit: take a GPU with more memory.",),
        )
    return Fit(memory, False, (f"{needs}; it fits with {', or with '.join(ways)}.",))


def ways_out(stage: Stage, gpu: Gpu, kinds: list[list[Change]]) -> Iterator[str]:
    """Name the smallest sets of changes with which a stage fits, in words; at most one change of each kind."""
    for count in range(1, LONGEST + 1):
        found = False
        for chosen in itertools.combinations(kinds, count):
            for changes in itertools.product(*chosen):
                setup = stage.setup
                for _, change in changes:
                    setup = change(setup)
                memory = stage.memory(setup)
                if memory.total <= gpu.memory:
                    found = True
                    yield (
                        " and ".join(name for name, _ in changes)
                        + f" ({memory.total / 1e9:.1f} GB)"
                    )
                    break  # the mildest change of its kind is enough
        if found:
            return


def _settings(stage: Stage) -> list[list[Change]]:
    """Changes of settings by kind, those that cost least first and each kind's mildest first."""
    if stage.name in ("capture", "evaluate"):
        return [_fewer_rows(stage, f"{stage.name}.batch")]
    t = stage.setup
    kinds: list[list[Change]] = []
    if stage.name == "distill" and not t.checkpointing:
        kinds.append(
            [
                (
                    "distill.activation_checkpointing true",
                    functools.partial(replace, checkpointing=True),
                )
            ]
        )
    kinds.append(_fewer_rows(stage, f"{stage.name}.micro_batch"))
    if stage.name == "distill":
        if t.gpus > 1:
            shardings: list[Change] = [
                ("--sharding fsdp2", functools.partial(replace, sharding="fsdp2")),
                ("--sharding zero3", functools.partial(replace, sharding="zero3")),
            ]
            kinds.append([change for change in shardings if not change[0].endswith(t.sharding)])
        if t.online:
            kinds.append([("capture.targets stored", functools.partial(replace, online=False))])
    return [kind for kind in kinds if kind]


def _fewer_rows(stage: Stage, setting: str) -> list[Change]:
    """Halve the rows of a pass down to one; what is left of the batch is accumulated."""
    rows = stage.setup.rows // 2
    changes: list[Change] = []
    while rows:
        changes.append(
            (f"{setting} {rows}", functools.partial(replace, rows=rows, accumulates=True))
        )
        rows //= 2
    return changes


def _ways_with(stage: Stage, gpu: Gpu, more: Change) -> list[str]:
    """What fits on more GPUs, by itself or with changed settings."""
    words, change = more
    larger = replace(stage, setup=change(stage.setup))
    memory = larger.memory(larger.setup)
    if memory.total <= gpu.memory:
        return [f"{words} ({memory.total / 1e9:.1f} GB)"]
    return [
        f"{words} and {way}"
        for way in itertools.islice(ways_out(larger, gpu, _settings(larger)), ADVICE)
    ]


def _more_gpus(stage: Stage) -> Iterator[Change]:
    """Double the GPUs while they can share the batch. One GPU shards nothing: with more it takes FSDP2."""
    t = stage.setup
    gpus = 2 * t.gpus
    while gpus <= min(stage.batch, MOST_GPUS):
        if stage.batch % gpus == 0:
            words = f"--gpus {gpus}" + (" --sharding fsdp2" if t.sharding == "none" else "")
            yield words, functools.partial(_spread, gpus=gpus, batch=stage.batch)
        gpus *= 2


def _spread(t: Setup, *, gpus: int, batch: int) -> Setup:
    """The same batch on more GPUs: fewer rows each."""
    share = batch // gpus
    rows = min(t.rows, share)
    sharding = "fsdp2" if t.sharding == "none" else t.sharding
    return replace(t, gpus=gpus, rows=rows, accumulates=share > rows, sharding=sharding)

"""Merge saved experts into saved weights, by any method, block by block."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.merging import slerp as arcs
from xlstm_distill.merging.dare import dare, masks
from xlstm_distill.merging.files import SavedWeights
from xlstm_distill.merging.groups import GroupedWeights
from xlstm_distill.merging.linear import check_weights, linear, task_arithmetic
from xlstm_distill.merging.selection import differences, kept_of, largest
from xlstm_distill.merging.streaming import (
    Block,
    all_blocks,
    blocks_of,
    check_accounts,
    in_threads,
)
from xlstm_distill.merging.ties import ties
from xlstm_distill.recipe.merging import WITH_SCALE


@dataclass(frozen=True)
class MergePlan:
    """How experts are merged: the recipe's section `merge`, with all values given.

    `grouped` replaces `weights` where groups of layers have weights of their own. `density` counts
    for `ties` and `dare` alone, `seed` for `dare`.
    """

    method: str
    weights: Mapping[str, float]
    scale: float = 1.0
    density: float = 1.0
    seed: int = 0
    grouped: GroupedWeights | None = None

    def check(self) -> None:
        """Refuse values that no recipe may hold; raises UserError."""
        if self.grouped is None:
            check_weights(self.weights)
        else:
            self.grouped.check()
        if not 0 < self.density <= 1:
            raise UserError(f"merge.density: {self.density} is not above 0 and at most 1.")
        if not 0 < self.scale < math.inf:
            raise UserError(f"merge.scale: {self.scale} is no finite number above 0.")
        if self.method == "slerp" and len(self.weights) != 2:
            raise UserError(f"merge.method: slerp merges two experts, not {len(self.weights)}.")

    def weights_of(self, tensor: str) -> list[float]:
        """The experts' weights for a tensor, in the experts' order."""
        weights = self.weights if self.grouped is None else self.grouped.of(tensor)
        return [weights[name] for name in self.weights]


def plan_for(grouped: GroupedWeights, method: str, **settings: Any) -> MergePlan:
    """A plan with these weights for the experts that have any; `settings` are those of the plan."""
    pair = method == "slerp" and len(grouped.sets[0]) == 2
    # An end of the arc is one expert alone; a search of weights begins with both.
    kept = grouped if pair else grouped.only(grouped.used())
    grouped.check()
    return MergePlan(method, kept.sets[0], grouped=kept, **settings)


@dataclass(frozen=True)
class Sources:
    """The experts of a merge, by name, and the seed student for methods that need it."""

    experts: Mapping[str, SavedWeights]
    base: SavedWeights | None = None

    def tensors(self, block: Block) -> list[Tensor]:
        """Read a block of every expert."""
        experts = self.experts.values()
        return [expert.read(block.name, block.start, block.stop) for expert in experts]

    def seed_student(self, block: Block) -> Tensor:
        """Read a block of the seed student."""
        assert self.base is not None, "this method merges differences from the seed student"
        return self.base.read(block.name, block.start, block.stop)

    def blocks(self, name: str) -> list[Block]:
        """The blocks of a tensor."""
        first = next(iter(self.experts.values()))
        return blocks_of(name, first.entries[name].count)


class Target(Protocol):
    """What merged numbers are written into, from several threads at once."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write numbers of a tensor from `start` on."""

    def finish(self) -> None:
        """Raise an error where a number was not written."""


class LoadedWeights:
    """A loaded model as a target: its tensors are written in place, converted to their format."""

    def __init__(self, model: nn.Module) -> None:
        # Tied weights are in the files once, and one tensor here.
        self._tensors = model.state_dict()
        self._lock = threading.Lock()
        self._missing = {name: tensor.numel() for name, tensor in self._tensors.items()}

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write numbers of a tensor from `start` on."""
        flat = self._tensors[name].view(-1)
        flat[start : start + len(values)] = values.to(flat.dtype)
        with self._lock:
            self._missing[name] -= len(values)

    def finish(self) -> None:
        """Check that each tensor was written, itself or one that it is tied to.

        Raises:
            RunError: one was not.
        """
        whole = {self._tensors[name].data_ptr() for name, n in self._missing.items() if n == 0}
        for name, tensor in self._tensors.items():
            if tensor.numel() and tensor.data_ptr() not in whole:
                raise RunError(f"merge: {name} is in no expert; distill the experts again.")


def merge_files(
    plan: MergePlan,
    sources: Sources,
    target: Target,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Merge experts of `plan.weights` into `target`: files like the first expert's, or a model.

    `advance` is called with the bytes that were written. Memory: a few blocks of each expert for
    each thread.

    Raises:
        UserError: the weights are not allowed, the experts do not have the same tensors, or numbers
            are not finite.
        RunError: a file is damaged.
    """
    plan.check()
    if list(plan.weights) != list(sources.experts):
        raise ValueError("weights and experts are in another order")
    check_accounts(sources.experts, sources.base)
    facts = _facts(plan, sources)
    first = next(iter(sources.experts.values()))

    def work(block: Block) -> int:
        written = 0
        for start, values in merge_block(plan, block, sources, facts):
            if not is_finite(values):
                raise _not_finite(plan, block, sources)
            target.write(block.name, start, values)
            written += values.numel() * values.itemsize
        return written

    for written in in_threads(work, all_blocks(first.entries)):
        advance(written)
    target.finish()


def merge_block(
    plan: MergePlan, block: Block, sources: Sources, facts: Mapping[Any, float]
) -> Iterator[tuple[int, Tensor]]:
    """Merge one block, piece by piece: where in the tensor each begins, and its numbers.

    `facts` are what `_facts` found out about whole tensors.
    """
    tensors = sources.tensors(block)
    if not tensors[0].is_floating_point():
        yield block.start, _same(block, tensors)
        return
    base = sources.seed_student(block) if plan.method in WITH_SCALE else None
    drawn: Iterator[tuple[Tensor, ...]] = itertools.repeat(())
    if plan.method == "dare":
        # A block's numbers are drawn one after the other.
        experts = [masks(plan.seed, name, block, plan.density) for name in plan.weights]
        drawn = zip(*experts, strict=True)
    for piece, kept in zip(block.pieces(), drawn, strict=False):
        parts = [tensor[piece] for tensor in tensors]
        student = None if base is None else base[piece]
        yield block.start + piece.start, _merged(plan, block.name, parts, student, facts, kept)


def _merged(
    plan: MergePlan,
    name: str,
    tensors: list[Tensor],
    base: Tensor | None,
    facts: Mapping[Any, float],
    kept: Sequence[Tensor],
) -> Tensor:
    """Merge a piece of every expert; `kept` are the masks of DARE."""
    weights = plan.weights_of(name)
    if plan.method == "linear":
        return linear(tensors, weights)
    if plan.method == "slerp":
        factors = arcs.coefficients(facts[name], weights[1])
        return arcs.slerp(tensors[0], tensors[1], factors)
    assert base is not None, "this method merges differences from the seed student"
    if plan.method == "task_arithmetic":
        return task_arithmetic(base, tensors, weights, plan.scale)
    if plan.method == "ties":
        cuts = [facts[name, expert] for expert in plan.weights]
        return ties(base, tensors, weights, plan.scale, cuts)
    if plan.method == "dare":
        return dare(base, tensors, weights, plan.scale, kept, plan.density)
    raise ValueError(f"{plan.method!r} is no method")


def is_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    if not (values.is_floating_point() and values.numel()):
        return True
    # The extremes of numbers of which one is NaN are NaN. `isfinite` takes 30 times as long.
    return all(math.isfinite(end) for end in values.aminmax())


def _not_finite(plan: MergePlan, block: Block, sources: Sources) -> UserError:
    """The error for merged numbers that are not finite: one of them spoils every answer."""
    saved = dict(sources.experts) | ({"align": sources.base} if sources.base else {})
    for name, weights in saved.items():
        if not is_finite(weights.read(block.name, block.start, block.stop)):
            return UserError(
                f"merge: {name!r} holds numbers in {block.name} that are not finite "
                f"({weights.directory}); train it again, with a lower rate if it diverged."
            )
    return UserError(
        f"merge: {block.name} would hold numbers that are not finite; give a smaller merge.scale "
        f"than {plan.scale:g}, or a larger merge.density."
    )


def _same(block: Block, tensors: list[Tensor]) -> Tensor:
    """Return whole numbers, such as counters, which cannot be averaged."""
    for other in tensors[1:]:
        if not torch.equal(tensors[0], other):
            raise UserError(
                f"merge: experts differ in {block.name}, which holds whole numbers; merge experts "
                "that were distilled from one student."
            )
    return tensors[0]


def _facts(plan: MergePlan, sources: Sources) -> dict[Any, float]:
    """What a method must know of whole tensors: the cuts of TIES, the angles of SLERP."""
    first = next(iter(sources.experts.values()))
    names = [name for name, entry in first.entries.items() if entry.dtype.is_floating_point]
    if plan.method == "slerp":
        found = in_threads(lambda name: arcs.angle(_pairs(sources, name)), names)
        return dict(zip(names, found, strict=True))
    if plan.method == "ties":
        jobs = []
        for name in names:
            jobs += [(name, expert) for expert in plan.weights]
        cuts = in_threads(lambda job: _cut(plan, sources, *job), jobs)
        return dict(zip(jobs, cuts, strict=True))
    return {}


def _pairs(sources: Sources, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    for block in sources.blocks(name):
        first, second = sources.tensors(block)
        yield first, second


def _cut(plan: MergePlan, sources: Sources, name: str, expert: str) -> float:
    """The magnitude from which TIES keeps an expert's differences in a tensor."""
    weights = sources.experts[expert]

    def parts() -> Iterator[Tensor]:
        for block in sources.blocks(name):
            own = weights.read(name, block.start, block.stop)
            student = sources.seed_student(block)
            for piece in block.pieces():
                found = differences(own[piece], student[piece])
                # Here and not in the result: NaN is not above the cut, and would be left out.
                if not is_finite(found):
                    raise _not_finite(plan, block, sources)
                yield found

    count = weights.entries[name].count
    return largest(parts, kept_of(count, plan.density)).magnitude if count else 0.0

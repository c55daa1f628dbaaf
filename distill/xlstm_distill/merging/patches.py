"""Make a patch: the largest differences of an expert from the student that it was trained from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from xlstm_distill.artifacts.files import written_whole
from xlstm_distill.artifacts.origin import origin_of
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.merging.files import SavedWeights
from xlstm_distill.merging.low_rank import decompose, matrix_of, saves
from xlstm_distill.merging.selection import Cut, kept_of, largest
from xlstm_distill.merging.sparse import Changes, SparseFile, SparseWriter
from xlstm_distill.merging.streaming import (
    BLOCK,
    Block,
    blocks_of,
    check_accounts,
    hash_block,
    hash_of_weights,
    in_threads,
)
from xlstm_distill.recipe.fields import NAME_PATTERN

FORMAT, LOW_RANK_FORMAT = "xlstm-distill patch 1", "xlstm-distill patch 2"
VALUES = torch.bfloat16
"""Differences lose at most 1/512 of themselves: far less than a sparse patch leaves out."""


@dataclass(frozen=True)
class PatchFacts:
    """What a patch says of itself.

    `base` and `expert` are hashes of weights. `retained` is the share of the difference's square
    that the patch holds: 1 - |D - P|² / |D|². A patch has a density or a rank. `seed` is the seed
    student's identity where the manifests of base and expert agree on it; `doubt` says why they do
    not tell. Patches of before have neither.
    """

    name: str
    base: str
    expert: str
    density: float | None
    block: int
    numbers: int
    changes: int
    retained: float
    model_bytes: int
    rank: int | None = None
    seed: str | None = None
    doubt: str | None = None


@dataclass(frozen=True)
class _Found:
    """What a tensor adds to a patch: changes and hashes by block, and sums of squares."""

    changes: Sequence[Changes | None]
    base_hashes: list[bytes]
    expert_hashes: list[bytes]
    squares: float
    left_out: float
    factors: tuple[Tensor, Tensor] | None = None


def make_patch(
    base_place: Path,
    expert_place: Path,
    out: Path,
    density: float | None,
    name: str,
    advance: Callable[[int], None] = lambda count: None,
    *,
    rank: int | None = None,
) -> PatchFacts:
    """Write a patch that holds, of each tensor, the `density` largest differences.

    With `rank` it holds factors of each matrix instead, and all differences of a tensor that
    factors would not make smaller. Memory: a few tensors' changes; with `rank` a few copies of the
    largest tensor, in float32. `advance` is called with the bytes of the base that were read.

    Raises:
        UserError: the expert was trained from another student, the two models do not have the same
            tensors or do not differ, or one holds numbers that are not finite.
        RunError: a file is damaged.
    """
    check_name(name)
    base, expert = SavedWeights(base_place), SavedWeights(expert_place)
    check_accounts({"the expert": expert}, base, "the base")
    origin = origin_of(base_place, expert_place)
    hashes: tuple[dict[str, list[bytes]], dict[str, list[bytes]]] = ({}, {})
    squares = left_out = 0.0
    names = sorted(base.entries)  # however the base is divided into files
    with written_whole(out) as file:
        writer = SparseWriter(file, names)
        for key, tensor in zip(names, _found(names, base, expert, density, rank), strict=True):
            if tensor.factors is None:
                writer.add(key, tensor.changes)
            else:
                writer.add_factors(key, *tensor.factors)
            hashes[0][key], hashes[1][key] = tensor.base_hashes, tensor.expert_hashes
            squares += tensor.squares
            left_out += tensor.left_out
            advance(base.entries[key].bytes)
        if not writer.count:
            raise UserError(f"{expert_place}: its weights are those of {base_place}.")
        facts = PatchFacts(
            name=name,
            base=hash_of_weights(base.entries, hashes[0]),
            expert=hash_of_weights(expert.entries, hashes[1]),
            density=density,
            rank=rank,
            block=BLOCK,
            numbers=sum(entry.count for entry in base.entries.values()),
            changes=writer.count,
            retained=1 - left_out / squares,
            model_bytes=sum(entry.bytes for entry in base.entries.values()),
            seed=origin.seed,
            doubt=origin.doubt,
        )
        file_format = FORMAT if rank is None else LOW_RANK_FORMAT
        writer.finish({"format": file_format, "patch": json.dumps(asdict(facts))})
    return facts


def _found(
    names: Sequence[str],
    base: SavedWeights,
    expert: SavedWeights,
    density: float | None,
    rank: int | None,
) -> Iterator[_Found]:
    """Find the changes of these tensors, in their order."""
    if rank is None:
        assert density is not None, "a patch has a density or a rank"
        yield from in_threads(lambda key: _differences(key, base, expert, density), names)
        return
    for key in names:
        # One at a time: each is whole in memory, and the decomposition uses all cores.
        entry = base.entries[key]
        if entry.dtype.is_floating_point and saves(entry.shape, rank):
            yield _factors(key, base, expert, rank)
        else:
            yield _differences(key, base, expert, 1.0)


def _factors(name: str, base: SavedWeights, expert: SavedWeights, rank: int) -> _Found:
    """Find a matrix's factors; none where it does not differ."""
    entry = base.entries[name]
    matrix = matrix_of(entry.shape)
    assert matrix is not None
    old, new = base.read(name), expert.read(name)
    difference = _difference(old, new).reshape(matrix)
    if not difference.isfinite().all():
        raise _not_finite(name, base, expert)
    blocks = blocks_of(name, entry.count)
    old_hashes = [hash_block(old[block.start : block.stop]) for block in blocks]
    new_hashes = [hash_block(new[block.start : block.stop]) for block in blocks]
    factors = decompose(difference, rank) if difference.any() else None
    sums = _squares(old.reshape(matrix), new.reshape(matrix), factors)
    changes: list[Changes | None] = [None] * len(blocks) if factors is None else []
    return _Found(changes, old_hashes, new_hashes, *sums, factors)


def _squares(
    old: Tensor, new: Tensor, factors: tuple[Tensor, Tensor] | None
) -> tuple[float, float]:
    """Sum the squares of a difference (M, N), and of what factors leave of it, in float64.

    A few rows at a time: a head of 525M numbers would take 4 GB for each copy in float64.
    """
    rows = max(1, BLOCK // old.shape[1])
    squares = left_out = 0.0
    for start in range(0, len(old), rows):
        part = slice(start, start + rows)
        whole = new[part].double() - old[part].double()
        squares += float(whole.square().sum())
        if factors is not None:
            whole -= factors[0][part].double() @ factors[1].double()
        left_out += float(whole.square().sum())
    return squares, left_out


def _differences(name: str, base: SavedWeights, expert: SavedWeights, density: float) -> _Found:
    """Find a tensor's changes."""
    blocks = blocks_of(name, base.entries[name].count)
    if not base.entries[name].dtype.is_floating_point:
        return _whole_numbers(blocks, base, expert)

    def magnitudes() -> Iterator[Tensor]:
        for block in blocks:
            yield _difference(_read(base, block), _read(expert, block)).abs_()

    count = base.entries[name].count
    cut = largest(magnitudes, kept_of(count, density)) if count else Cut(0.0, 0)
    found = _Found([], [], [], 0.0, 0.0)
    changes: list[Changes | None] = []
    squares, left_out, equal = 0.0, 0.0, cut.equal
    for block in blocks:
        old, new = _read(base, block), _read(expert, block)
        found.base_hashes.append(hash_block(old))
        found.expert_hashes.append(hash_block(new))
        kept, equal = _largest(_difference(old, new), cut, equal)
        changes.append(kept)
        # Of the expert as it is: where the base has fewer bits, its rounding is left out too.
        whole = new.double() - old.double()
        square = float(whole.dot(whole))
        if not (math.isfinite(square) and kept.values.isfinite().all()):
            raise _not_finite(name, base, expert)
        squares += square
        whole[torch.from_numpy(kept.positions)] -= kept.values.double()
        left_out += float(whole.dot(whole))
    return _Found(changes, found.base_hashes, found.expert_hashes, squares, left_out)


def _not_finite(name: str, base: SavedWeights, expert: SavedWeights) -> UserError:
    """The error for a difference that is not finite: it names the model that is the cause."""
    for weights in (base, expert):
        for block in blocks_of(name, weights.entries[name].count):
            if not _read(weights, block).isfinite().all():
                return UserError(
                    f"{weights.directory}: {name} holds numbers that are not finite; train the "
                    "model again, with a lower rate if it diverged."
                )
    return UserError(
        f"{expert.directory}: {name} differs from the base by more than {VALUES} holds; give an "
        "expert that was trained from this base."
    )


def _read(weights: SavedWeights, block: Block) -> Tensor:
    return weights.read(block.name, block.start, block.stop)


def _difference(old: Tensor, new: Tensor) -> Tensor:
    """What is to be added to the base, in float32; its format decides what can be told apart."""
    return new.to(old.dtype).float() - old.float()


def _largest(difference: Tensor, cut: Cut, equal: int) -> tuple[Changes, int]:
    """Keep a block's changes above the cut, and of those equal to it the first `equal`.

    Returns also how many equal ones the blocks after this one may keep. A 0 is no change.
    """
    magnitude = difference.abs()
    keep = magnitude > cut.magnitude
    if cut.magnitude > 0 and equal:
        same = (magnitude == cut.magnitude).nonzero().flatten()[:equal]
        keep[same] = True
        equal -= len(same)
    positions = keep.nonzero().flatten()
    return Changes(positions.numpy(), difference[positions].to(VALUES)), equal


def _whole_numbers(blocks: list[Block], base: SavedWeights, expert: SavedWeights) -> _Found:
    """Check a tensor of whole numbers, which a patch leaves as it is."""
    found = _Found([None] * len(blocks), [], [], 0.0, 0.0)
    for block in blocks:
        old, new = _read(base, block), _read(expert, block)
        if not torch.equal(old, new):
            raise UserError(
                f"{block.name} holds whole numbers and differs; a patch cannot hold it."
            )
        found.base_hashes.append(hash_block(old))
        found.expert_hashes.append(hash_block(new))
    return found


def check_name(name: str) -> None:
    """Refuse a name that cannot be a file's: a patched model keeps its patches by name.

    Raises:
        UserError: it has other characters.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(
            f"--name: {name!r} cannot name a file; use letters, digits, '.', '_' and '-'."
        )


class Patch(SparseFile):
    """A saved patch.

    Raises:
        UserError: the file is missing, no patch, or one of another version.
        RunError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: a patch is a file NAME.safetensors, made by 'patch make'.")
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a patch, made by 'patch make'.")
        super().__init__(path, FORMAT, LOW_RANK_FORMAT)
        try:
            self.facts = PatchFacts(**json.loads(self.metadata["patch"]))
        except (ValueError, KeyError, TypeError):
            raise RunError(f"{path}: its facts cannot be read; make the patch again.") from None
        check_name(self.facts.name)
        if self.facts.block != BLOCK:
            raise UserError(
                f"{path}: has blocks of {self.facts.block}, not {BLOCK}; make it again."
            )

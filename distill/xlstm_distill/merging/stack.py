"""Apply patches to a saved model, and take them off again to the last bit.

A patched model has a folder `patches`: the patches themselves, the base's values wherever one of
them changed something, and `stack.json`. Whatever is added or removed, the base is restored first,
its hash is compared, and the patches are summed anew. So removing one leaves what the others alone
would have made.
"""

from __future__ import annotations

import functools
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from xlstm_distill.artifacts.files import flush_tree, written_whole
from xlstm_distill.artifacts.hashing import sha256
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.merging.files import NewWeights, SavedWeights, copy_other_files
from xlstm_distill.merging.linear import wide
from xlstm_distill.merging.patches import Patch
from xlstm_distill.merging.sparse import Changes, SparseFile, SparseWriter
from xlstm_distill.merging.streaming import (
    Block,
    blocks_of,
    hash_block,
    hash_of_weights,
    in_threads,
)

FOLDER, STACK, UNDO = "patches", "stack.json", "undo.safetensors"
UNDO_FORMAT = "xlstm-distill undo 1"
Advance = Callable[[int], None]
LARGEST_WEIGHT = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Applied:
    """A patch in a stack, with its weight."""

    patch: Patch
    weight: float
    sha256: str


@dataclass(frozen=True)
class Stack:
    """A saved model and the patches that are in it; a model without patches is its own base."""

    model: Path
    weights: SavedWeights
    applied: tuple[Applied, ...] = ()
    undo: SparseFile | None = None
    hash: str | None = None

    def base(self, block: Block) -> tuple[Tensor, Tensor]:
        """Read a block of the model, and restore the base's: both (N,)."""
        now = self.weights.read(block.name, block.start, block.stop)
        before = self.undo.changes(block) if self.undo else None
        if before is None:
            return now, now
        base = now.clone()
        base[torch.from_numpy(before.positions)] = before.values
        return now, base


def read_stack(model: Path) -> Stack:
    """Open a saved model and its patches.

    Raises:
        RunError: a file is missing or damaged.
    """
    weights = SavedWeights(model)
    folder = model / FOLDER
    if not (folder / STACK).exists():
        return Stack(model, weights)
    try:
        content = json.loads((folder / STACK).read_text())
        entries = [
            (entry["file"], entry["weight"], entry["sha256"]) for entry in content["patches"]
        ]
        made = content["weights"]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{folder / STACK}: cannot be read; the file is damaged.") from None
    applied = []
    for file, weight, sha in entries:
        if sha256(folder / file) != sha:
            raise RunError(f"{folder / file}: the patch was changed; apply the patches again.")
        applied.append(Applied(Patch(folder / file), weight, sha))
    return Stack(model, weights, tuple(applied), SparseFile(folder / UNDO, UNDO_FORMAT), made)


def apply_patches(
    model: Path,
    patches: Sequence[tuple[Path, float]],
    out: Path,
    advance: Advance = lambda count: None,
) -> Stack:
    """Add patches, each with a weight, to a saved model; write the result into a new folder.

    Raises:
        UserError: `out` exists, a patch was made for another base, or is in the model already.
        RunError: a file is damaged, or the model was changed since its patches were applied.
    """
    stack = read_stack(model)
    applied = list(stack.applied)
    given = set()
    for path, weight in patches:
        one = Applied(_open(path, weight), weight, sha256(path))
        if one.sha256 in given:
            raise UserError(
                f"{path}: this patch is given twice; give it once, with the sum's weight."
            )
        given.add(one.sha256)
        if one.sha256 in [other.sha256 for other in applied]:
            raise UserError(f"{path}: this patch is in {model} already; remove it first.")
        applied.append(one)
    return _write(stack, applied, out, advance)


def remove_patch(
    model: Path, patch: str, out: Path, advance: Advance = lambda count: None
) -> Stack:
    """Take a patch, given by file or name, off a saved model; write the result into a new folder.

    What is left is, bit for bit, what the other patches alone would have made, or the base.

    Raises:
        UserError: `out` exists, or the model does not hold this patch, or several of this name.
        RunError: a file is damaged, or the model was changed since its patches were applied.
    """
    stack = read_stack(model)
    wanted = sha256(Path(patch)) if Path(patch).is_file() else None
    found = [one for one in stack.applied if patch == one.patch.facts.name or one.sha256 == wanted]
    if len(found) != 1:
        names = ", ".join(one.patch.facts.name for one in stack.applied) or "none"
        several = (
            "holds several patches of this name; give the file" if found else "has no such patch"
        )
        raise UserError(f"{patch}: {model} {several}. Patches: {names}.")
    return _write(stack, [one for one in stack.applied if one is not found[0]], out, advance)


def load_patched(
    model: Path, patches: Sequence[tuple[Path, float]], dtype: torch.dtype = torch.float32
) -> Any:
    """Load a saved model and apply weighted patches in memory; no file is written.

    Its weights are those that `apply_patches` would write, converted to `dtype`.

    Raises:
        UserError: a patch was made for another base.
        RunError: a file is damaged.
    """
    stack = read_stack(model)
    applied = [
        *stack.applied,
        *(Applied(_open(path, weight), weight, "") for path, weight in patches),
    ]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    # Its tensors are the model's own. Tied weights are in the file once.
    tensors = loaded.state_dict()

    def use(block: Block, values: Tensor) -> None:
        flat = tensors[block.name].view(-1)
        flat[block.start : block.stop] = values.to(flat.dtype)

    _go_through(stack, applied, use)
    return loaded


def _open(path: Path, weight: float) -> Patch:
    """Open a patch that is to be applied; a damaged one would spoil the model unnoticed."""
    if not abs(weight) <= LARGEST_WEIGHT:
        raise UserError(f"--weight: {weight:g} is beyond the numbers of float32; try 1.")
    patch = Patch(path)
    patch.check()
    return patch


def summed(base: Tensor, changes: Sequence[tuple[Changes, float]]) -> Changes:
    """Add weighted changes to a block of the base: the new values wherever one changes it.

    Sums are taken in the next wider format, in the order of the patches.
    """
    positions = np.unique(np.concatenate([change.positions for change, _ in changes]))
    total = base[torch.from_numpy(positions)].to(wide(base.dtype))
    for change, weight in changes:
        places = torch.from_numpy(np.searchsorted(positions, change.positions))
        total.index_add_(0, places, change.values.to(total.dtype), alpha=weight)
    return Changes(positions, total.to(base.dtype))


@dataclass(frozen=True)
class _Blocks:
    """What became of a tensor: hashes by block of the old, the base and the new, and the undo."""

    old: list[bytes]
    base: list[bytes]
    new: list[bytes]
    undo: list[Changes | None]


def _write(stack: Stack, applied: Sequence[Applied], out: Path, advance: Advance) -> Stack:
    """Write a model with these patches into a new folder, complete or not at all."""
    if out.exists():
        raise UserError(f"--out: {out} exists; give a new folder.")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        copy_other_files(stack.model, partial)
        target = NewWeights(stack.weights, partial)
        folder = partial / FOLDER
        folder.mkdir()
        with written_whole(folder / UNDO) as file:
            undo = SparseWriter(file, sorted(stack.weights.entries))

            def use(block: Block, values: Tensor) -> None:
                target.write(block.name, block.start, values)

            made = _go_through(stack, applied, use, undo.add, advance)
            undo.finish({"format": UNDO_FORMAT})
        target.finish()
        if applied:
            _keep_patches(applied, folder, made)
        else:
            shutil.rmtree(folder)
        flush_tree(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_stack(out)


def _go_through(
    stack: Stack,
    applied: Sequence[Applied],
    use: Callable[[Block, Tensor], None],
    keep: Callable[[str, list[Changes | None]], None] = lambda name, undo: None,
    advance: Advance = lambda count: None,
) -> str:
    """Compute a model with these patches; return the hash of its weights.

    `use` gets every block, in some thread; `keep`, tensor by tensor, the base's values where
    patches change it.

    Raises:
        UserError: a patch was made for another base.
        RunError: the model was changed since its patches were applied.
    """
    _check_tensors(stack, applied)
    entries = stack.weights.entries
    hashes: dict[str, dict[str, list[bytes]]] = {"old": {}, "base": {}, "new": {}}
    names = sorted(entries)
    work = functools.partial(_tensor, stack=stack, applied=applied, use=use)
    # A low-rank patch changes every number: the values to be kept of several tensors, done and
    # waiting for their turn, would be many GB.
    wide_ones = any(one.patch.factors for one in (*applied, *stack.applied))
    found = map(work, names) if wide_ones else in_threads(work, names)
    for name, tensor in zip(names, found, strict=True):
        for kind, known in hashes.items():
            known[name] = getattr(tensor, kind)
        keep(name, tensor.undo)
        advance(entries[name].bytes)
    old, base, made = (hash_of_weights(entries, known) for known in hashes.values())
    if stack.hash is not None and old != stack.hash:
        raise RunError(
            f"{stack.model}: its weights were changed after its patches were applied; apply them "
            "to the base again."
        )
    # Those that are taken off too: their values were put back, and that must have worked.
    for one in (*applied, *stack.applied):
        if one.patch.facts.base != base:
            raise UserError(
                f"{one.patch.path}: made for the base {one.patch.facts.base}; {stack.model} is "
                f"{base}."
            )
    return made


def _check_tensors(stack: Stack, applied: Sequence[Applied]) -> None:
    """Refuse early a patch of another architecture; what is the same in that shows in the hash."""
    for one in applied:
        for name in one.patch.names:
            entry = stack.weights.entries.get(name)
            blocks = len(blocks_of(name, entry.count)) if entry else 0
            if entry is None or not one.patch.holds(name, entry.shape, blocks):
                raise UserError(
                    f"{one.patch.path}: {name} is not in {stack.model} like this; the patch was "
                    "made for another base."
                )


def _tensor(
    name: str, stack: Stack, applied: Sequence[Applied], use: Callable[[Block, Tensor], None]
) -> _Blocks:
    found = _Blocks([], [], [], [])
    for block in blocks_of(name, stack.weights.entries[name].count):
        old, base = stack.base(block)
        changes = []
        for one in applied:
            change = one.patch.changes(block)
            if change is not None:
                changes.append((change, one.weight))
        new, undo = base, None
        if changes:
            added = summed(base, changes)
            if not added.values.isfinite().all():
                weights = ", ".join(f"{one.weight:g}" for one in applied)
                raise UserError(
                    f"--weight: {weights} is too large: {name} would hold numbers that are not "
                    "finite; give smaller weights."
                )
            places = torch.from_numpy(added.positions)
            undo = Changes(added.positions, base[places])
            new = base.clone()
            new[places] = added.values
        use(block, new)
        found.old.append(hash_block(old))
        found.base.append(hash_block(base))
        found.new.append(hash_block(new))
        found.undo.append(undo)
    return found


def _keep_patches(applied: Sequence[Applied], folder: Path, made: str) -> None:
    """Copy the patches into the model, with a list of them."""
    entries: list[dict[str, Any]] = []
    for number, one in enumerate(applied, start=1):
        name = one.patch.facts.name
        file = f"{number}-{name}.safetensors"
        shutil.copyfile(one.patch.path, folder / file)
        entries.append({"file": file, "name": name, "weight": one.weight, "sha256": one.sha256})
    content = {"weights": made, "patches": entries}
    (folder / STACK).write_text(json.dumps(content, indent=1) + "\n")

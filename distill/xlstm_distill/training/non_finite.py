"""Find where a number stopped being finite: the first layer or parameter, and the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from xlstm_distill.data.rows import Batch, Row
from xlstm_distill.training.compilation import eagerly

MOST_NAMED = 32
"""Rows that a message names."""


def blame(
    origin: str | None, losses: Sequence[Tensor], batches: Sequence[Batch]
) -> tuple[str | None, list[Row]]:
    """Find the first origin over all ranks, and the rows whose micro-batch has a non-finite loss.

    `origin`, `losses` and `batches` are this rank's. Ranks whose own loss is non-finite take
    precedence: the others may have got the bad number from them. All ranks must call this; all get
    the same answer. No rows are returned where every loss is finite.
    """
    bad: list[Row] = []
    for loss, batch in zip(losses, batches, strict=True):
        if not _is_finite(loss):
            bad += batch.rows
    found: list[tuple[str | None, list[Row]]] = gather_object([(origin, bad)])
    bad_ranks_first = sorted(found, key=lambda one: not one[1])
    origins = [name for name, _ in bad_ranks_first if name]
    every_row = [row for _, rows in found for row in rows]
    return (origins[0] if origins else None), every_row


def row_names(rows: Sequence[Row]) -> str:
    """Write rows as `domain[index]`, the first few of them."""
    more = len(rows) - MOST_NAMED
    named = ", ".join(f"{name}[{index}]" for name, index in rows[:MOST_NAMED])
    return named + (f" and {more} more" if more > 0 else "")


def first_bad_module(objective: nn.Module, batches: Sequence[Batch]) -> str | None:
    """Run the batches forward again and name the first module whose output is not finite.

    Returns None if all are finite. All ranks must call this: a sharded forward is collective.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def check(_: nn.Module, __: Any, output: Any) -> None:
            if not _is_finite(output):
                found.append(name)

        return module.register_forward_hook(check)

    # A module's hook runs after those of its parts. So the innermost one comes first, and no layer
    # is blamed for what one of its parts did.
    handles = [watch(name, module) for name, module in objective.named_modules() if name]
    try:
        with torch.no_grad(), eagerly():
            for batch in batches:
                objective(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_bad_gradient(objective: nn.Module) -> str | None:
    """Name the first parameter whose gradient (on this rank) is not finite."""
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return name
    return None


def _is_finite(value: Any) -> bool:
    """Whether a module's output is finite; so is what is neither a tensor nor a sequence."""
    if isinstance(value, Tensor):
        # Of a sharded tensor, look at this rank's shard: gathering it would be collective.
        local: Any = value.to_local() if hasattr(value, "to_local") else value
        return not local.is_floating_point() or bool(torch.isfinite(local).all())
    if isinstance(value, tuple | list):
        return all(_is_finite(part) for part in value)
    return True

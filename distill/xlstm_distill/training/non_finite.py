"""Where a number stopped being finite: the first layer, or the first parameter, and the rows to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from xlstm_distill.data.rows import Batch, Row

MOST_NAMED = 32
"""Rows that a message names."""


def blame(
    origin: str | None, losses: Sequence[Tensor], batches: Sequence[Batch]
) -> tuple[str | None, list[Row]]:
    """Find, over all processes, the first origin and the rows of the micro-batches whose own loss is not finite.

    `origin`, `losses` and `batches` are this process's. A process with such a micro-batch is believed before others.
    All must call this, and all get the same answer; no rows where every loss is finite.
    """
    bad = [
        row
        for loss, batch in zip(losses, batches, strict=True)
        if not _finite(loss)
        for row in batch.rows
    ]
    found: list[tuple[str | None, list[Row]]] = gather_object([(origin, bad)])
    origins = [name for name, rows in sorted(found, key=lambda one: not one[1]) if name]
    return (origins[0] if origins else None), [row for _, rows in found for row in rows]


def row_names(rows: Sequence[Row]) -> str:
    """Write rows as `domain[index]`."""
    more = len(rows) - MOST_NAMED
    named = ", ".join(f"{name}[{index}]" for name, index in rows[:MOST_NAMED])
    return named + (f" and {more} more" if more > 0 else "")


def first_bad_module(task: nn.Module, batches: Sequence[Batch]) -> str | None:
    """Run the batches forward again and name the first module whose output is not finite, None if all are.

    The innermost one is named: a layer is not blamed for what one of its parts did. All processes must call this.
    """
    found: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda _, __, output, name=name: None if _finite(output) else found.append(name)
        )
        for name, module in task.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                task(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_bad_gradient(task: nn.Module) -> str | None:
    """Name the first parameter whose gradient (on this process) is not finite."""
    for name, parameter in task.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return name
    return None


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        local: Any = value.to_local() if hasattr(value, "to_local") else value
        return not local.is_floating_point() or bool(torch.isfinite(local).all())
    if isinstance(value, tuple | list):
        return all(_finite(part) for part in value)
    return True

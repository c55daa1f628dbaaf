"""Where a number stopped being finite: the first layer, or the first parameter, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.data import Batch


def first_bad_module(task: nn.Module, batches: Sequence[Batch]) -> str | None:
    """Run the batches forward again and name the first module whose output is not finite, None if all are.

    The innermost one is named: a layer is not blamed for what one of its parts did. All processes must call this.
    """
    found: list[str] = []
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: None if _finite(output) else found.append(name))
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

"""What all operators that are registered with torch.library share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Like = tuple[torch.Size, torch.dtype, torch.device]


def filled(grads: Sequence[Tensor | None], results: Sequence[Like]) -> list[Tensor]:
    """Replace the gradients of results that nothing read (None) by zeros."""
    found = []
    for grad, (shape, dtype, device) in zip(grads, results, strict=True):
        found.append(torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad)
    return found


def refuse_second_derivative(operator: str, ctx: Any, *grads: Any) -> NoReturn:
    """Say that the gradients of an operator have none of their own."""
    raise NotImplementedError(
        f"{operator}: second derivatives are not implemented; differentiate once, or use "
        "the operator's float64 reference in xlstm_kernels.reference"
    )

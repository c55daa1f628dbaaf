"""What all operators that are registered with torch.library share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

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


def refuse_forward_mode(operator: str, *inputs: Tensor) -> None:
    """Refuse inputs with a tangent: torch would drop it, and the derivative would be 0."""
    if torch.compiler.is_compiling():  # it could not trace the question
        return
    if any(unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"{operator}: forward-mode derivatives (jvp) are not implemented; use backward(), or "
            "the operator's float64 reference in xlstm_kernels.reference"
        )

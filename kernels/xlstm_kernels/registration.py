"""What operators that are registered with torch.library share, and their memory on a CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

Like = tuple[torch.Size, torch.dtype, torch.device]
KEPT_BYTES = 30 * 2**20  # glibc takes no bound above 32 MiB


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


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which operators keep their dtypes: none where they do so in any case."""
    kind = device.type  # `meta` knows no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what a CPU's operators free, for the next call; once per process.

    glibc maps large blocks anew each time and gives the free end of the heap back. The system then
    hands both out page by page, zeroed: measured, an eighth of the mLSTM's forward and backward
    pass. Freeing one large block raises its bounds to that size and twice that size, as in every
    program that frees such a block. None of it is touched, and torch counts none of it.
    """
    bytes(KEPT_BYTES)

"""Which backend runs a call; imports Triton only when it is asked for."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton", "mlstm_kernels"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "triton", "mlstm_kernels")
"""Backends of `mlstm`; the other operators have all but the last."""

AUTO: Backend = "torch"
"""What "auto" runs, on every device. It stays "torch" until the tests marked `gpu` have passed on a GPU: so far the
Triton kernels are verified in Triton's interpreter, and compiled, but no GPU has run them."""

HEAD_DIMS = (16, 32, 64, 128, 256)
MAX_SINKS = 64


def choose(operator: str, backend: Backend, *tensors: Tensor, dims: dict[str, int], sinks: int = 0) -> Backend:
    """Return the backend to run, never "auto". dims: the head dims by letter, for the message.

    Raises ValueError in one line if the backend is unknown, or cannot run this call.
    """
    allowed = BACKENDS if operator == "mlstm" else BACKENDS[:-1]
    if backend not in allowed:
        raise ValueError(f"{operator}: backend={backend!r} is unknown; allowed: {', '.join(allowed)}")
    chosen = AUTO if backend == "auto" else backend
    if chosen == "triton" and (objection := triton_refuses(tensors, dims, sinks)):
        raise ValueError(f"{operator}: backend='triton' {objection}")
    if chosen == "mlstm_kernels" and importlib.util.find_spec("mlstm_kernels") is None:
        raise ValueError(
            f"{operator}: backend='mlstm_kernels' needs the package mlstm_kernels, which is not installed; "
            "install it, or use backend='torch'"
        )
    return chosen


def triton_refuses(tensors: tuple[Tensor, ...], dims: dict[str, int], sinks: int = 0) -> str | None:
    """Say why the Triton kernels cannot run a call, and what to do; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed; install it, or use backend='torch'"
    device = tensors[0].device.type
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs CUDA tensors, but these are on {device}; move them, or use backend='torch'"
    if any(x.dtype == torch.float64 for x in tensors):
        return "computes in float32; for float64 inputs use backend='torch'"
    for letter, size in dims.items():
        if size not in HEAD_DIMS:
            return f"has no kernel for {letter}={size}; allowed: {', '.join(map(str, HEAD_DIMS))}"
    if sinks > MAX_SINKS:
        return f"has no kernel for sinks={sinks}; at most {MAX_SINKS}"
    return None

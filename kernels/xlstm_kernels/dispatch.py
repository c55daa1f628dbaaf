"""Choose the backend of a call, and say why one cannot run it.

Imports Triton only when a call asks for it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton", "mlstm_kernels"]
# Backends of `mlstm`; the other operators have all but the last.
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "triton", "mlstm_kernels")

# What "auto" runs, on every device. It stays "torch" until the tests marked `gpu` have passed on a
# GPU: so far the Triton kernels are verified in Triton's interpreter, and compiled, but no GPU has
# run them.
AUTO: Backend = "torch"

HEAD_DIMS = (16, 32, 64, 128, 256)  # powers of 2, as Triton's tiles are, with settings in the table
MAX_SINKS = 64  # the window kernels hold the sinks of a document in one tile


def choose(
    operator: str, backend: Backend, *tensors: Tensor, dims: dict[str, int], sinks: int = 0
) -> Backend:
    """Return the backend to run, which is never "auto".

    dims: the head dims by their letter. Raises ValueError, in one line, if the backend is unknown
    or cannot run this call.
    """
    allowed = BACKENDS if operator == "mlstm" else BACKENDS[:-1]
    if backend not in allowed:
        raise ValueError(
            f"{operator}: backend={backend!r} is unknown; allowed: {', '.join(allowed)}"
        )
    chosen = AUTO if backend == "auto" else backend
    if chosen == "triton" and (objection := triton_refuses(tensors, dims, sinks)):
        raise ValueError(f"{operator}: backend='triton' {objection}")
    if chosen == "mlstm_kernels" and (objection := peer_refuses(tensors)):
        raise ValueError(f"{operator}: backend='mlstm_kernels' {objection}")
    return chosen


@functools.cache
def installed(package: str) -> bool:
    """Say whether a package can be imported."""
    # Cached, because decoding asks in every layer for every token.
    return importlib.util.find_spec(package) is not None


def peer_refuses(tensors: tuple[Tensor, ...]) -> str | None:
    """Say why mlstm_kernels cannot run a call, and what to do; None if it can."""
    for package in ("mlstm_kernels", "triton"):
        if not installed(package):
            return not_installed(package)
    if objection := _device_refused(tensors):
        return objection
    from triton import language

    if not hasattr(language, "make_block_ptr"):
        return (
            "needs block pointers, which this Triton no longer has; "
            "take Triton 3.8 or older, or backend='triton'"
        )
    return None


def not_installed(package: str) -> str:
    """Say that a package is missing, and what to do."""
    return (
        f"needs the package {package}, which is not installed; install it, or use backend='torch'"
    )


def _device_refused(tensors: tuple[Tensor, ...]) -> str | None:
    device = tensors[0].device.type
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs CUDA tensors, but these are on {device}; move them, or use backend='torch'"
    if any(x.dtype == torch.float64 for x in tensors):
        return "computes in float32; for float64 inputs use backend='torch'"
    return None


def triton_refuses(tensors: tuple[Tensor, ...], dims: dict[str, int], sinks: int = 0) -> str | None:
    """Say why the Triton kernels cannot run a call, and what to do; None if they can."""
    if not installed("triton"):
        return not_installed("triton")
    if objection := _device_refused(tensors):
        return objection
    for letter, size in dims.items():
        if size not in HEAD_DIMS:
            allowed = ", ".join(map(str, HEAD_DIMS))
            return f"has no kernel for {letter}={size}; allowed: {allowed}"
    if sinks > MAX_SINKS:
        return f"has no kernel for sinks={sinks}; at most {MAX_SINKS}"
    return None

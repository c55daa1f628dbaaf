"""Choose the backend of a call, and say why one cannot run it.

"auto" is Triton on CUDA where the kernels have passed their self-check on this machine
(`xlstm_kernels.verdicts`), else torch. Imports Triton only when a call asks for it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from xlstm_kernels import verdicts

Backend = Literal["auto", "torch", "triton", "mlstm_kernels"]
# Backends of `mlstm`; the other operators have all but the last.
BACKENDS: tuple[Backend, ...] = ("auto", "torch", "triton", "mlstm_kernels")

# What "auto" means, if it is set: "torch", or "triton" without the self-check.
BACKEND_VARIABLE = "XLSTM_KERNELS_BACKEND"
HEAD_DIMS = (16, 32, 64, 128, 256)  # powers of 2, as Triton's tiles are, with settings in the table
MAX_SINKS = 64  # the window kernels hold the sinks of a document in one tile


def score_extras(softcap: float | None, sink_logits: Tensor | None) -> tuple[str, ...]:
    """Name what a call's softmax has besides scores: other kernels, which are checked apart."""
    if softcap is None and sink_logits is None:  # as nearly always
        return ()
    given = {"softcap": softcap, "sink_logits": sink_logits}
    return tuple(name for name, value in given.items() if value is not None)


def variant(operator: str, extras: tuple[str, ...]) -> str:
    """Name an operator with what its softmax has besides, as the self-check does."""
    return "+".join((operator, *extras))


def choose(
    operator: str,
    backend: Backend,
    *tensors: Tensor,
    dims: dict[str, int],
    sinks: int = 0,
    extras: tuple[str, ...] = (),
) -> Backend:
    """Return the backend to run, which is never "auto".

    dims: the head dims by their letter. extras: as `score_extras` names them. Raises ValueError, in
    one line, if the backend is unknown or cannot run this call.
    """
    allowed = BACKENDS if operator == "mlstm" else BACKENDS[:-1]
    if backend not in allowed:
        raise ValueError(
            f"{operator}: backend={backend!r} is unknown; allowed: {', '.join(allowed)}"
        )
    if backend == "auto":
        return automatic(variant(operator, extras), tensors, dims, sinks)
    chosen = backend
    if chosen == "triton" and (objection := triton_refuses(tensors, dims, sinks)):
        raise ValueError(f"{operator}: backend='triton' {objection}")
    if chosen == "mlstm_kernels" and (objection := peer_refuses(tensors)):
        raise ValueError(f"{operator}: backend='mlstm_kernels' {objection}")
    return chosen


def automatic(
    operator: str, tensors: tuple[Tensor, ...], dims: dict[str, int], sinks: int
) -> Backend:
    """Return what "auto" runs for a call: Triton where it has kernels and they are right."""
    device = tensors[0].device
    if device.type != "cuda" or triton_refuses(tensors, dims, sinks):
        return "torch"
    index = torch.cuda.current_device() if device.index is None else device.index
    dtype = tensors[0].dtype
    for x in tensors[1:3]:  # q, k and v; the gates are float32 in any case
        dtype = torch.promote_types(dtype, x.dtype)
    return (
        "triton" if passes_check(operator, dtype, tuple(sorted(dims.items())), index) else "torch"
    )


def passes_check(
    operator: str, dtype: torch.dtype, dims: tuple[tuple[str, int], ...], index: int
) -> bool:
    """Say whether Triton's operator is to run: as the environment says, else as checked."""
    forced = forced_backend()
    if forced is not None:
        return forced == "triton"
    return verdicts.is_right(verdicts.question(operator, dtype, dict(dims)), index)


# Dynamo runs it once, while it traces, and takes the answer for a constant. This is all that
# torch.compiler.assume_constant_result does; but that imports dynamo, and with it Triton.
passes_check._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forced_backend() -> Backend | None:
    """Return what XLSTM_KERNELS_BACKEND says that "auto" means; None if it is not set.

    Raises ValueError, in one line, if it is neither "torch" nor "triton".
    """
    given = os.environ.get(BACKEND_VARIABLE)
    if not given:
        return None
    if given == "torch":
        return "torch"
    if given == "triton":
        return "triton"
    raise ValueError(f"{BACKEND_VARIABLE}={given!r} is not allowed; allowed: torch, triton")


def installed(package: str) -> bool:
    """Say whether a package can be imported."""
    return _found(package)


# As of `passes_check`: dynamo would look into the cache, and warn of it.
installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # decoding asks in every layer for every token
def _found(package: str) -> bool:
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
    return _device_refused(tensors) or triton_lacks(dims, sinks)


def triton_lacks(dims: dict[str, int], sinks: int = 0) -> str | None:
    """Say what there is no Triton kernel for, whatever the device; None if there is one."""
    if not installed("triton"):
        return not_installed("triton")
    for letter, size in dims.items():
        if size not in HEAD_DIMS:
            allowed = ", ".join(map(str, HEAD_DIMS))
            return f"has no kernel for {letter}={size}; allowed: {allowed}"
    if sinks > MAX_SINKS:
        return f"has no kernel for sinks={sinks}; at most {MAX_SINKS}"
    return None

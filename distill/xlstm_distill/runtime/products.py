"""Linear layers of many rows on CPUs whose fast units torch's own product leaves unused."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST_ROWS = 256  # below, arranging the weights takes what the product saves
LEAST_WIDTH = 16  # numbers of a vector; narrower layers, as gates, take several times as long
# oneDNN keeps what it makes for a number of rows, 0.2 MiB and more, so there should be few of them.
ROW_STEP = 64
CPU_INFO = Path("/proc/cpuinfo")


def fast_linear_layers(device: torch.device) -> AbstractContextManager[Any]:
    """Run float32 linear layers as convolutions inside, where that is the faster product.

    torch multiplies float32 matrices by MKL, which uses half of the width of an AMD processor with
    AVX-512; convolutions go to oneDNN, which uses all of it. Measured: 235 in place of 107 GFLOP/s.
    The sums are the same but for their order. Gradients are convolutions too. Those of layers that
    are computed again for the backward pass must be asked for inside.
    """
    if device.type != "cpu" or not is_mkl_narrow() or not torch.backends.mkldnn.enabled:
        return contextlib.nullcontext()
    return LinearAsConvolution()


@contextlib.contextmanager
def fast_prompts(model: Any) -> Iterator[None]:
    """Have a model's passes over many tokens run `fast_linear_layers`, inside the block.

    For a teacher: a student reads its prompts so by itself. Passes of a few tokens stay as they
    are, since each of their operators would wait for the mode.
    """
    if isinstance(fast_linear_layers(model.device), contextlib.nullcontext):
        yield
        return
    begun = _Begun()

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.numel() >= LEAST_ROWS and not torch.is_grad_enabled():
            begun.here.enter_context(fast_linear_layers(ids.device))

    def end(*_: Any) -> None:
        begun.here.close()

    before = model.register_forward_pre_hook(begin, with_kwargs=True)
    after = model.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        end()  # a pass that Ctrl-C broke off has called no hook


class _Begun(threading.local):
    """What the passes of each thread have begun: modes are of a thread."""

    def __init__(self) -> None:
        self.here = contextlib.ExitStack()


class LinearAsConvolution(TorchFunctionMode):
    """Replace the linear layers of many rows."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what stands in for it."""
        kwargs = kwargs or {}
        if func is F.linear and not kwargs and _is_plain(*args):
            return _convolve(*args)
        return func(*args, **kwargs)


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Tell whether a linear layer has plain float32 tensors, and rows enough."""
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        x.numel() >= LEAST_ROWS * weight.shape[-1] > 0
        and weight.ndim == 2
        and len(weight) >= LEAST_WIDTH
        # Quantised weights and others have classes of their own.
        and all(type(y) in (Tensor, torch.nn.Parameter) for y in given)
        and all(y.dtype == torch.float32 and y.device.type == "cpu" for y in given)
        and not torch.is_autocast_enabled("cpu")
    )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x (..., d) with a weight (n, d), as a convolution whose kernel is one pixel."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    missing = -count % ROW_STEP
    rows = F.pad(rows, (0, 0, 0, missing)) if missing else rows.contiguous()
    # Rows are pixels and features are channels, which come last in memory.
    image = rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)
    # One pixel cannot be dilated. But torch gives oneDNN such a kernel in one thread only if it is.
    found = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    found = found.permute(0, 2, 3, 1).reshape(len(rows), -1)
    # Cut only where it must be: the gradient of a part is a copy.
    return (found[:count] if missing else found).view(*x.shape[:-1], -1)


@functools.lru_cache(maxsize=1)
def is_mkl_narrow() -> bool:
    """Tell whether torch multiplies by MKL here, on an AMD processor with AVX-512."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    if backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return False

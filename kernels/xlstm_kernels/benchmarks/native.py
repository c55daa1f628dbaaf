"""Other libraries' kernels as their authors time them.

In their own layout, with heads repeated and rows filled up beforehand, without our column of ones.
What they compute then is not the exact ratio, so nothing is compared: they are timed, and their
rows say so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.benchmarks.entries import ATTENDED, GATED, Entry, Inputs, Prepared, Shape
from xlstm_kernels.peers import MLSTM_KERNELS_CHUNK


def leaf(x: Tensor) -> Tensor:
    """Make x a contiguous leaf, so that what prepares it is not timed."""
    return x.detach().contiguous().requires_grad_()


def prepare_mlstm_kernels(kernel: str) -> Callable[[Inputs, Shape], Prepared]:
    """Prepare a kernel of mlstm_kernels, with its own normaliser; whole chunks of tokens."""

    def prepare(a: Inputs, shape: Shape) -> Prepared:
        run = importlib.import_module("mlstm_kernels.torch.chunkwise").registry[kernel]
        q, k, v, i, f = (a.x[name] for name in GATED)
        fill = -shape.tokens % MLSTM_KERNELS_CHUNK
        wide = v.repeat_interleave(shape.heads // shape.groups, dim=1)
        leaves = [leaf(F.pad(x, (0, 0, 0, fill))) for x in (q, k, wide)]
        leaves += [leaf(F.pad(x, (0, fill))) for x in (i, f)]
        low = v.dtype if v.dtype in (torch.bfloat16, torch.float16) else torch.float32
        return leaves, lambda: run(*leaves, autocast_kernel_dtype=low)

    return prepare


def prepare_gla(a: Inputs, shape: Shape) -> Prepared:
    """Prepare flash-linear-attention's simple GLA: (B, T, H, D), gates in log space."""
    gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    q, k, v, i, f = (a.x[name] for name in GATED)
    keys = (k * i.float().exp().unsqueeze(-1)).to(k.dtype)
    wide = v.repeat_interleave(shape.heads // shape.groups, dim=1)
    leaves = [leaf(x.transpose(1, 2)) for x in (q, keys, wide, F.logsigmoid(f.float()))]
    return leaves, lambda: gla(*leaves[:3], g=leaves[3], scale=1.0)[0]


def prepare_flash(a: Inputs, shape: Shape) -> Prepared:
    """Prepare FlashAttention with the window and without sinks, which it does not have."""
    attend = importlib.import_module("flash_attn").flash_attn_func
    leaves = [leaf(a.x[name].transpose(1, 2)) for name in ATTENDED]
    window = (shape.window - 1, 0)
    return leaves, lambda: attend(*leaves, causal=True, window_size=window)


def native(operator: str, backend: str, prepare: Callable[[Inputs, Shape], Prepared]) -> Entry:
    """Make the line of a library's kernel as it is; `backend` starts with the library's module."""
    return Entry(
        operator, f"{backend} native", None, None, needs=backend.split()[0],
        cuda_only=True, packs=False, prepare=prepare,
    )  # fmt: skip


NATIVE = (
    native("mlstm", "mlstm_kernels xl_chunk", prepare_mlstm_kernels("triton_xl_chunk")),
    native("mlstm", "mlstm_kernels siging", prepare_mlstm_kernels("triton_xl_chunk_siging")),
    native("mlstm", "fla simple_gla", prepare_gla),
    native("window", "flash_attn no sinks", prepare_flash),
)

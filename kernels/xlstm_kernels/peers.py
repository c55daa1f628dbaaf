"""Other libraries' kernels, made exact: for comparison, and for `mlstm(backend="mlstm_kernels")`.

None of these libraries is needed. The function that uses a library imports it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xlstm_kernels.segments import document_runs, document_starts

MLSTM_KERNELS_CHUNK = 128  # tokens; its kernels take whole chunks only
MLSTM_KERNELS_EXP = "triton_xl_chunk"  # its kernel with an exponential input gate


def missing(module: str) -> str | None:
    """Say that a module's package is not installed; None if it is."""
    package = module.split(".")[0]
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def mlstm_ones_column(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    kernel: str = MLSTM_KERNELS_EXP,
    **settings: Any,
) -> Tensor:
    """Run a chunkwise kernel of mlstm_kernels so that value and gradients are exact.

    Shapes as in `xlstm_kernels.mlstm`; one document a row. The kernel's own denominator is clamped,
    and constant in its gradient. Both cancel if a column of ones is appended to v and the other
    columns are divided by it. The kernel takes no grouped heads, value dims that are powers of 2,
    and whole chunks only: v is repeated and widened, and T is filled up.
    """
    chunkwise = importlib.import_module("mlstm_kernels.torch.chunkwise").registry[kernel]
    heads, tokens, value_dim = q.shape[1], q.shape[2], v.shape[3]
    width = 1 << value_dim.bit_length()  # the next power of 2 that has room for the ones
    ones = F.pad(torch.ones_like(v[..., :1]), (0, width - value_dim - 1))
    wide = torch.cat([v, ones], dim=-1).repeat_interleave(heads // v.shape[1], dim=1)
    fill = -tokens % MLSTM_KERNELS_CHUNK
    q, k, wide = (F.pad(x, (0, 0, 0, fill)).contiguous() for x in (q, k, wide))
    i, f = (F.pad(x, (0, fill)).contiguous() for x in (i, f))
    low = v.dtype if v.dtype in (torch.bfloat16, torch.float16) else torch.float32
    out = chunkwise(q, k, wide, i, f, autocast_kernel_dtype=low, **settings)
    exact: Tensor = Ratio.apply(out[:, :, :tokens, : value_dim + 1].float())
    return exact.to(v.dtype)


def simple_gla_ones_column(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """Run flash-linear-attention's simple GLA as the mLSTM.

    Shapes as in `xlstm_kernels.mlstm`. The keys are multiplied by exp(i), and v gets a column of
    ones. exp(i) is not stabilised, so this is for moderate input gates only.
    """
    gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    repeats, value_dim = q.shape[1] // v.shape[1], v.shape[3]
    wide = F.pad(v, (0, 1), value=1.0)
    # 15 columns more: the kernel takes value dims that are multiples of 16.
    wide = F.pad(wide, (0, 15)).repeat_interleave(repeats, dim=1)
    keys = (k * i.float().exp().unsqueeze(-1)).to(k.dtype)
    q, keys, wide = (x.transpose(1, 2).contiguous() for x in (q, keys, wide))  # (B, T, H, D)
    out, _ = gla(q, keys, wide, g=F.logsigmoid(f.float()).transpose(1, 2).contiguous(), scale=1.0)
    exact: Tensor = Ratio.apply(out.transpose(1, 2)[..., : value_dim + 1].float())
    return exact.to(v.dtype)


def flex_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, segment_ids: Tensor | None
) -> Tensor:
    """Run torch's flex_attention, compiled, with the mask of `sliding_window_attention`."""
    attend = compiled_flex("flex_attention")
    mask = flex_mask(segment_ids, q.shape[0], q.shape[2], window, sinks, q.device)
    out: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=True)
    return out


@functools.cache
def compiled_flex(function: str) -> Any:
    """Compile a function of flex_attention's module, once."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    return torch.compile(getattr(module, function))


@functools.lru_cache(maxsize=4)
def flex_mask(
    ids: Tensor | None, batch: int, tokens: int, window: int, sinks: int, device: torch.device
) -> Any:
    """Make the block mask of window, sinks and documents; ids (B, T)."""
    # Cached by the tensor of ids, so that calls with the same one share a mask, as a model's layers
    # would.
    if ids is None:
        runs = torch.zeros(batch, tokens, dtype=torch.int64, device=device)
    else:
        runs = document_runs(ids)
    starts = document_starts(runs)

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        near = (t - s < window) | (s - starts[b, s] < sinks)
        return near & (s <= t) & (runs[b, t] == runs[b, s])

    return compiled_flex("create_block_mask")(visible, batch, None, tokens, tokens, device=device)


class Ratio(Function):
    """Divide numerators (..., Dv) by the last column, the denominator.

    Where the denominator is exactly 0, the result and its gradient are 0. The gradient of the
    denominator is -(dh . h) / den. It has no square of den, which float32 cannot hold for den below
    1e-19.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        den = out[..., -1:]
        den = torch.where(den == 0, torch.inf, den)
        h = out[..., :-1] / den
        ctx.save_for_backward(h, den)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        h, den = ctx.saved_tensors
        return torch.cat([dh, -(dh * h).sum(dim=-1, keepdim=True)], dim=-1) / den

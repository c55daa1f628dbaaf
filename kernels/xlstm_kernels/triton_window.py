"""Sliding-window attention with sinks on Triton: launches the kernels and joins them to autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xlstm_kernels import triton_window_kernels as kernels
from xlstm_kernels.segments import document_runs, document_starts
from xlstm_kernels.triton_common import dot_format
from xlstm_kernels.triton_configs import WindowConfig, window_config

MIN_TILE = 16  # rows of the smallest tensor-core product


class Band(NamedTuple):
    """What a query sees, as the kernels read it; runs and starts (B, T) int32, or None for one document a row."""

    runs: Tensor | None
    starts: Tensor | None
    window: int
    sinks: int
    scale: float


def window_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    sinks: int,
    segment_ids: Tensor | None,
    scale: float,
    config: WindowConfig | None = None,
) -> Tensor:
    """Attend; shapes and meaning as in `xlstm_kernels.sliding_window_attention`, which validates them."""
    T, D = q.shape[2:]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    runs = starts = None
    if segment_ids is not None:
        runs = document_runs(segment_ids)
        runs, starts = runs.int(), document_starts(runs).int()
    q_, k_, v_ = (x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in (q, k, v))
    band = Band(runs, starts, min(window, T), min(sinks, T), scale)
    out: Tensor = WindowAttention.apply(q_, k_, v_, band, config or window_config(dtype, D))
    return out.to(q.dtype)


class WindowAttention(Function):
    """Softmax over band and sinks; saves inputs, output and the logarithm of each softmax's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band, config: WindowConfig) -> Tensor:
        B, H, T, D = q.shape
        blocks = -(-T // config.block)
        with torch.cuda.device_of(q):
            out = torch.empty(B, H, T, D, dtype=q.dtype, device=q.device)
            log_total = torch.empty(B, H, T, device=q.device)
            kernels.window_kernel[blocks, B * H](
                q, k, v, band.runs, band.starts, out, log_total, *sizes(q, k, v, band),
                **settings(q, band, config), num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, band.runs, band.starts, out, log_total)
        ctx.band, ctx.config = band._replace(runs=None, starts=None), config
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, runs, starts, out, log_total = ctx.saved_tensors
        band, config = ctx.band._replace(runs=runs, starts=starts), ctx.config
        B, H, T, D = q.shape
        G, blocks, N = k.shape[1], -(-T // config.block), band.sinks
        dout = dout.contiguous()
        launch = settings(q, band, config) | {"num_warps": config.grad_warps, "num_stages": config.grad_stages}
        with torch.cuda.device_of(q), torch.device(q.device):
            mean, dq = torch.empty_like(log_total), torch.empty(B, H, T, D, dtype=q.dtype)
            dk, dv = (torch.empty(B, G, T, D, dtype=k.dtype) for _ in range(2))
            parts = [torch.empty(B, H, blocks, N, D) for _ in range(2)] if N else [None, None]
            inputs = (q, k, v, runs, starts, dout, log_total, mean)
            kernels.mean_grad_kernel[blocks, B * H](out, dout, mean, T, L=config.block, D=D)
            kernels.query_grad_kernel[blocks, B * H](*inputs, dq, *parts, *sizes(q, k, v, band), blocks, **launch)
            kernels.key_value_grad_kernel[blocks, B * G](*inputs, dk, dv, *sizes(q, k, v, band), blocks, **launch)
            if N:
                rows = triton.next_power_of_2(N)
                kernels.sink_grad_kernel[blocks, B * G](
                    runs, starts, *parts, dk, dv, T, H, H // G, band.window, N, blocks,
                    SEGMENTED=runs is not None, L=config.block, D=D, S=rows, AT_ONCE=max(1, MIN_TILE // rows),
                )  # fmt: skip
        return dq, dk, dv, None, None


def sizes(q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[float, ...]:
    """Strides, scale and sizes, in the order of the kernels' arguments."""
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    return (*strides, band.scale, q.shape[2], q.shape[1], q.shape[1] // k.shape[1], band.window, band.sinks)


def settings(q: Tensor, band: Band, config: WindowConfig) -> dict[str, Any]:
    """Compile-time arguments of the kernels with tiles."""
    dtype, precision = dot_format(q.dtype)
    rows = max(MIN_TILE, triton.next_power_of_2(band.sinks)) if band.sinks else 0
    dot = tl.bfloat16 if dtype == torch.bfloat16 else tl.float32
    return {
        "SEGMENTED": band.runs is not None, "PRECISION": precision, "DOT": dot, "L": config.block,
        "D": q.shape[3], "S": rows,
    }  # fmt: skip

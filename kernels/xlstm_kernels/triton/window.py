"""Sliding-window attention with sinks on Triton: launches the kernels and joins them to autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xlstm_kernels.segments import document_runs, document_starts
from xlstm_kernels.triton import window_kernels as kernels
from xlstm_kernels.triton.common import dot_format, on_device_of
from xlstm_kernels.triton.configs import WindowConfig, window_config

MIN_TILE = 16  # rows of the smallest tensor-core product
SINK_WARPS = 4


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
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band, config: WindowConfig
    ) -> Tensor:
        B, H, T, _ = q.shape
        blocks = -(-T // config.block)
        out, log_total = (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            torch.empty(B, H, T, device=q.device),
        )
        with on_device_of(q):
            kernels.window_kernel[B * H, blocks](
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
        query_needed, key_value_needed = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        (B, H, T, D), G, N, blocks = q.shape, k.shape[1], band.sinks, -(-q.shape[2] // config.block)
        dout, mean = dout.contiguous(), torch.empty_like(log_total)
        inputs = (q, k, v, runs, starts, dout, log_total, mean)
        launch = settings(q, band, config) | {
            "num_warps": config.grad_warps,
            "num_stages": config.grad_stages,
        }
        dq = dk = dv = None
        parts: tuple[Tensor | None, Tensor | None] = (None, None)
        with on_device_of(q):
            kernels.mean_grad_kernel[B * H, blocks](out, dout, mean, T, L=config.block, D=D)
            if query_needed or (
                key_value_needed and N
            ):  # this kernel gives the parts of the sinks, too
                dq = torch.empty_like(out)
                if N:
                    shape = (B, H, blocks, N, D)
                    parts = torch.empty(shape, device=q.device), torch.empty(shape, device=q.device)
                kernels.query_grad_kernel[B * H, blocks](
                    *inputs, dq, *parts, *sizes(q, k, v, band), blocks, **launch
                )
            if key_value_needed:
                dk, dv = (torch.empty(B, G, T, D, dtype=k.dtype, device=k.device) for _ in range(2))
                kernels.key_value_grad_kernel[B * G, blocks](
                    *inputs, dk, dv, *sizes(q, k, v, band), blocks, **launch
                )
                if N:
                    add_sink_grads(band, parts, dk, dv, H, config)
        return dq if query_needed else None, dk, dv, None, None


def add_sink_grads(
    band: Band,
    parts: tuple[Tensor | None, Tensor | None],
    dk: Tensor,
    dv: Tensor,
    heads: int,
    config: WindowConfig,
) -> None:
    """Add to dk and dv (B, G, T, D) what sinks get from later queries: the parts, (B, H, blocks, N, D), in order."""
    B, G, T, D = dk.shape
    blocks, rows = -(-T // config.block), triton.next_power_of_2(band.sinks)
    kernels.sink_grad_kernel[B * G, blocks](
        band.runs, band.starts, *parts, dk, dv, T, heads, heads // G, band.window, band.sinks, blocks,
        SEGMENTED=band.runs is not None, L=config.block, D=D, S=rows, AT_ONCE=max(1, MIN_TILE // rows),
        num_warps=SINK_WARPS,
    )  # fmt: skip


def sizes(q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[float, ...]:
    """Strides, scale and sizes, in the order of the kernels' arguments."""
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    return (
        *strides,
        band.scale,
        q.shape[2],
        q.shape[1],
        q.shape[1] // k.shape[1],
        band.window,
        band.sinks,
    )


def settings(q: Tensor, band: Band, config: WindowConfig) -> dict[str, Any]:
    """Compile-time arguments of the kernels with tiles."""
    _, dot, precision = dot_format(q.dtype)
    rows = max(MIN_TILE, triton.next_power_of_2(band.sinks)) if band.sinks else 0
    return {
        "SEGMENTED": band.runs is not None, "PRECISION": precision, "DOT": dot, "L": config.block,
        "D": q.shape[3], "S": rows,
    }  # fmt: skip

"""Sliding-window attention with sinks on Triton: launches the kernels, joins them to autograd.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xlstm_kernels.segments import document_runs, document_starts
from xlstm_kernels.triton import window_kernels as kernels
from xlstm_kernels.triton.common import contiguous_rows, dot_format, on_device_of, strides
from xlstm_kernels.triton.configs import WindowConfig, window_config

MIN_TILE = 16  # rows of the smallest tensor-core product
SINK_WARPS = 4


class Band(NamedTuple):
    """What a query sees, as the kernels read it.

    runs (B, T) int32: the documents of each row, numbered. starts (B, T) int32: position of the
    first token of each token's document. Both are None for one document a row.
    """

    runs: Tensor | None
    starts: Tensor | None
    window: int
    sinks: int
    scale: float


def window_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None,
    scale: float,
    config: WindowConfig | None = None,
) -> Tensor:
    """Attend to window and sinks.

    Shapes and meaning as in `xlstm_kernels.sliding_window_attention`, which checks the arguments.
    config: launch settings, from the table by default.
    """
    T, D = q.shape[2:]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    runs = starts = None
    if segment_ids is not None:
        runs = document_runs(segment_ids)
        runs, starts = runs.int(), document_starts(runs).int()
    queries, keys, values = (contiguous_rows(x.to(dtype)) for x in (q, k, v))
    band = Band(runs, starts, min(window, T), min(sinks, T), scale)
    config = config or window_config(dtype, D)
    out: Tensor = WindowAttention.apply(queries, keys, values, band, config)
    return out.to(q.dtype)


class WindowAttention(Function):
    """Softmax over band and sinks; saves inputs, output and the logsumexp of each softmax."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band, config: WindowConfig
    ) -> Tensor:
        B, H, T, _ = q.shape
        blocks = -(-T // config.block)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        logsumexp = torch.empty(B, H, T, device=q.device)
        with on_device_of(q):
            kernels.window_kernel[B * H, blocks](
                q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=out, logsumexp_ptr=logsumexp,
                **band_settings(q, k, v, band, config),
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, band.runs, band.starts, out, logsumexp)
        ctx.band, ctx.config = band._replace(runs=None, starts=None), config
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, runs, starts, out, logsumexp = ctx.saved_tensors
        band, config = ctx.band._replace(runs=runs, starts=starts), ctx.config
        query_needed, key_value_needed = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        (B, H, T, D), G, N = q.shape, k.shape[1], band.sinks
        blocks = -(-T // config.block)
        dout, mean_grad = dout.contiguous(), torch.empty_like(logsumexp)
        shared = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout,
            "logsumexp_ptr": logsumexp, "mean_grad_ptr": mean_grad, "blocks": blocks,
            **band_settings(q, k, v, band, config),
            "num_warps": config.grad_warps, "num_stages": config.grad_stages,
        }  # fmt: skip
        dq = dk = dv = sink_dk = sink_dv = None
        with on_device_of(q):
            kernels.mean_grad_kernel[B * H, blocks](
                out_ptr=out, dout_ptr=dout, mean_grad_ptr=mean_grad, T=T, L=config.block, D=D
            )
            # The parts of the sinks' gradients come from this kernel, so dk and dv need it too.
            if query_needed or (key_value_needed and N):
                dq = torch.empty_like(out)
                if N:
                    sink_dk = torch.empty(B, H, blocks, N, D, device=q.device)
                    sink_dv = torch.empty(B, H, blocks, N, D, device=q.device)
                kernels.query_grad_kernel[B * H, blocks](
                    dq_ptr=dq, sink_dk_ptr=sink_dk, sink_dv_ptr=sink_dv, **shared
                )
            if key_value_needed:
                dk, dv = (torch.empty(B, G, T, D, dtype=k.dtype, device=k.device) for _ in range(2))
                kernels.key_value_grad_kernel[B * G, blocks](dk_ptr=dk, dv_ptr=dv, **shared)
                if N:
                    add_sink_grads(band, (sink_dk, sink_dv), dk, dv, H, config)
        return dq if query_needed else None, dk, dv, None, None


def add_sink_grads(
    band: Band,
    parts: tuple[Tensor | None, Tensor | None],
    dk: Tensor,
    dv: Tensor,
    heads: int,
    config: WindowConfig,
) -> None:
    """Add to dk and dv (B, G, T, D) what sinks get from queries whose band starts after them.

    parts: the gradients of keys and values by block of queries, each (B, H, blocks, N, D).
    """
    B, G, T, D = dk.shape
    blocks, rows = -(-T // config.block), triton.next_power_of_2(band.sinks)
    sink_dk, sink_dv = parts
    kernels.sink_grad_kernel[B * G, blocks](
        runs_ptr=band.runs, starts_ptr=band.starts, sink_dk_ptr=sink_dk, sink_dv_ptr=sink_dv,
        dk_ptr=dk, dv_ptr=dv, T=T, H=heads, R=heads // G,
        window=band.window, sinks=band.sinks, blocks=blocks,
        SEGMENTED=band.runs is not None, L=config.block, D=D, S=rows,
        AT_ONCE=max(1, MIN_TILE // rows), num_warps=SINK_WARPS,
    )  # fmt: skip


def band_settings(
    q: Tensor, k: Tensor, v: Tensor, band: Band, config: WindowConfig
) -> dict[str, Any]:
    """Return the keyword arguments that the kernels with tiles share."""
    _, dot, precision = dot_format(q.dtype)
    # Tensor cores need at least 16 rows; without sinks the kernels leave their part out.
    sink_rows = max(MIN_TILE, triton.next_power_of_2(band.sinks)) if band.sinks else 0
    return {
        "runs_ptr": band.runs, "starts_ptr": band.starts, **strides(q=q, k=k, v=v),
        "scale": band.scale, "T": q.shape[2], "H": q.shape[1], "R": q.shape[1] // k.shape[1],
        "window": band.window, "sinks": band.sinks,
        "SEGMENTED": band.runs is not None, "PRECISION": precision, "DOT": dot,
        "L": config.block, "D": q.shape[3], "S": sink_rows,
    }  # fmt: skip

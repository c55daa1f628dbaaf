"""Sliding-window attention with sinks on Triton: launches the kernels, joins them to autograd.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from xlstm_kernels.registration import refuse_second_derivative
from xlstm_kernels.segments import document_runs, document_starts
from xlstm_kernels.triton import window_kernels as kernels
from xlstm_kernels.triton import window_sinks
from xlstm_kernels.triton.common import contiguous_rows, dot_format, on_device_of, strides
from xlstm_kernels.triton.configs import WindowConfig, window_config

MIN_TILE = 16  # rows of the smallest tensor-core product
SINK_WARPS = 4
# Blocks whose parts of a document's sinks one program sums, before another one adds these sums.
SINK_RUN = 32


class Band(NamedTuple):
    """What a query sees, as the kernels read it.

    runs (B, T) int32: the documents of each row, numbered. starts (B, T) int32: position of the
    first token of each token's document. Both are None for one document a row. softcap: 0 where
    scores are not bounded.
    """

    runs: Tensor | None
    starts: Tensor | None
    window: int
    sinks: int
    scale: float
    softcap: float


def window_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
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
    config = config or window_config(dtype, D)
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    tensors = (queries, keys, values, runs, starts, sink_logits)
    # Not the lesser of sinks and T: tiles have as many rows as there are sinks, so that each of the
    # first lengths would compile kernels of its own.
    settings = (min(window, T), sinks, scale, softcap or 0.0, list(config))
    out, _ = forward(*tensors, *settings)
    return out.to(q.dtype)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor | None,
    starts: Tensor | None,
    sink_logits: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
    settings: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the attention and the logsumexp of each softmax; settings: of a `WindowConfig`."""
    B, H, T, _ = q.shape
    band, config = Band(runs, starts, window, sinks, scale, softcap), WindowConfig(*settings)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    logsumexp = torch.empty(B, H, T, device=q.device)
    with on_device_of(q):
        kernels.window_kernel[(band_blocks(T, config) * B * H,)](
            q_ptr=q, k_ptr=k, v_ptr=v, sink_logits_ptr=sink_logits,
            out_ptr=out, logsumexp_ptr=logsumexp,
            **band_settings(q, k, v, band, config),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, logsumexp


forward = torch.library.custom_op("xlstm_kernels::window_triton", launch_forward, mutates_args=())


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor | None,
    starts: Tensor | None,
    sink_logits: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
    settings: list[int],
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor | None,
    starts: Tensor | None,
    sink_logits: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
    settings: list[int],
    queries: bool,
    keys_and_values: bool,
    logits: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v and the sink logits; empty are those not asked for."""
    band, config = Band(runs, starts, window, sinks, scale, softcap), WindowConfig(*settings)
    (B, H, T, D), G = q.shape, k.shape[1]
    blocks = band_blocks(T, config)
    dout, mean_grad = dout.contiguous(), torch.empty_like(logsumexp)
    shared = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "dout_ptr": dout,
        "logsumexp_ptr": logsumexp, "mean_grad_ptr": mean_grad,
        **band_settings(q, k, v, band, config),
        "num_warps": config.grad_warps, "num_stages": config.grad_stages,
    }  # fmt: skip
    dq, dk, dv = (q.new_empty(0) for _ in range(3))
    with on_device_of(q):
        kernels.mean_grad_kernel[(blocks * B * H,)](
            out_ptr=out, dout_ptr=dout, mean_grad_ptr=mean_grad,
            T=T, blocks=blocks, L=config.block, D=D,
        )  # fmt: skip
        if queries:
            dq = torch.empty_like(out)
            kernels.query_grad_kernel[(blocks * B * H,)](dq_ptr=dq, **shared)
        if keys_and_values:
            dk, dv = (torch.empty(B, G, T, D, dtype=k.dtype, device=k.device) for _ in range(2))
            wider = shared | {"num_warps": config.key_grad_warps}
            kernels.key_value_grad_kernel[(blocks * B * G,)](
                dk_ptr=dk, dv_ptr=dv, Q=min(config.key_grad_queries, config.block), **wider
            )
            if sinks:
                shape = (B, H, blocks, sinks, D)
                parts = torch.empty(shape, device=q.device), torch.empty(shape, device=q.device)
                window_sinks.sink_part_kernel[(blocks * B * H,)](
                    sink_dk_ptr=parts[0], sink_dv_ptr=parts[1], **shared
                )
                add_sink_grads(band, parts, dk, dv, H, config)
    d_logits = q.new_empty(0)
    if logits:
        assert sink_logits is not None
        share = (sink_logits.float()[:, None] - logsumexp).exp_()
        d_logits = -(share * mean_grad).sum(dim=(0, 2)).to(sink_logits.dtype)
    return [dq, dk, dv, d_logits]


backward = torch.library.custom_op(
    "xlstm_kernels::window_triton_backward", launch_backward, mutates_args=()
)


@backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Tensor | None,
    starts: Tensor | None,
    sink_logits: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
    sinks: int,
    scale: float,
    softcap: float,
    settings: list[int],
    queries: bool,
    keys_and_values: bool,
    logits: bool,
) -> list[Tensor]:
    wanted = zip((q, k, v), (queries, keys_and_values, keys_and_values), strict=True)
    found = [x.new_empty(x.shape if wants else (0,)) for x, wants in wanted]
    found.append(q.new_empty(0) if sink_logits is None or not logits else sink_logits.clone())
    return found


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, window, sinks, scale, softcap, settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the second one: zeros that nothing would read
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (window, sinks, scale, softcap, settings)


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    asked = (needed[0], needed[1] or needed[2], needed[5])
    dq, dk, dv, d_logits = backward(dout, *ctx.saved_tensors, *ctx.settings, *asked)
    # In the order of what the forward pass takes: no gradient of runs and starts.
    found = (dq, dk, dv, None, None, d_logits)
    wanted = [grad if needs else None for grad, needs in zip(found, needed, strict=False)]
    return (*wanted, *[None] * 5)


forward.register_autograd(_gradients, setup_context=_keep)
backward.register_autograd(functools.partial(refuse_second_derivative, "sliding_window_attention"))


def add_sink_grads(
    band: Band,
    parts: tuple[Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
    heads: int,
    config: WindowConfig,
) -> None:
    """Add to dk and dv (B, G, T, D) what sinks get from queries whose band starts after them.

    parts: the gradients of keys and values by block of queries, each (B, H, blocks, N, D).
    """
    B, G, T, D = dk.shape
    blocks, rows = band_blocks(T, config), triton.next_power_of_2(band.sinks)
    settings = {
        "runs_ptr": band.runs, "starts_ptr": band.starts,
        "sink_dk_ptr": parts[0], "sink_dv_ptr": parts[1],
        "T": T, "H": heads, "R": heads // G, "window": band.window, "sinks": band.sinks,
        "blocks": blocks, "SEGMENTED": band.runs is not None, "L": config.block, "D": D, "S": rows,
        "AT_ONCE": max(1, MIN_TILE // rows), "RUN": SINK_RUN, "num_warps": SINK_WARPS,
    }  # fmt: skip
    window_sinks.sink_sum_kernel[(blocks * B * G,)](**settings)
    window_sinks.sink_grad_kernel[(blocks * B * G,)](dk_ptr=dk, dv_ptr=dv, **settings)


def band_blocks(tokens: int, config: WindowConfig) -> int:
    """Count the blocks of a row."""
    return -(-tokens // config.block)


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
        "window": band.window, "sinks": band.sinks, "blocks": band_blocks(q.shape[2], config),
        "SEGMENTED": band.runs is not None, "PRECISION": precision, "DOT": dot,
        "L": config.block, "D": q.shape[3], "S": sink_rows, "CAP": band.softcap,
    }  # fmt: skip

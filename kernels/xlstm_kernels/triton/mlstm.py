"""Chunkwise mLSTM on Triton: launches the kernels and joins them to autograd.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from xlstm_kernels.registration import filled, refuse_second_derivative
from xlstm_kernels.segments import document_runs
from xlstm_kernels.state import MLSTMState
from xlstm_kernels.triton import common
from xlstm_kernels.triton import mlstm_backward as backward_kernels
from xlstm_kernels.triton import mlstm_forward as forward_kernels
from xlstm_kernels.triton.common import contiguous_rows, dot_format, on_device_of, strides
from xlstm_kernels.triton.configs import Launch, MLSTMConfig, mlstm_config


class Inputs(NamedTuple):
    """What both passes read of the arguments.

    centre (B, G, Dv): the common component, subtracted from v (B, G, T, Dv). C0, n0, m0: the
    initial state. runs (B, T): the documents of each row, numbered; None for one document a row.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    centre: Tensor
    C0: Tensor
    n0: Tensor
    m0: Tensor
    runs: Tensor | None


class Gates(NamedTuple):
    """What the kernels read of the gates, each (B, H, T).

    i, f: preactivations. sum_high + sum_low: sum of log f from the start of the token's chunk.
    max_log_weight: largest log-weight that a token of the chunk has at this token.
    """

    i: Tensor
    f: Tensor
    sum_high: Tensor
    sum_low: Tensor
    max_log_weight: Tensor


class Sizes(NamedTuple):
    """Sizes of a call, and the compile-time settings that follow from it."""

    B: int
    H: int
    G: int
    T: int
    Dk: int
    Dv: int
    chunks: int
    segmented: bool
    dtype: torch.dtype  # of dot operands and of the states kept per chunk
    dot: tl.dtype  # the same dtype, for Triton
    precision: str

    def head_settings(self, launch: Launch, chunk: int) -> dict[str, Any]:
        """Return the keyword arguments that all kernels with tiles share."""
        block_k, block_v, warps, stages = launch
        return {
            "SEGMENTED": self.segmented, "PRECISION": self.precision,
            "L": chunk, "DK": self.Dk, "DV": self.Dv, "BK": block_k, "BV": block_v,
            "num_warps": warps, "num_stages": stages,
        }  # fmt: skip

    def state_tiles(self, launch: Launch) -> int:
        """Count the tiles of the states of all heads."""
        return self.B * self.H * (self.Dk // launch.block_k) * (self.Dv // launch.block_v)


def mlstm_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None,
    state: MLSTMState | None,
    config: MLSTMConfig | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Run the mLSTM; shapes and meaning as in `xlstm_kernels.mlstm`, which checks the arguments.

    config: launch settings, from the table by default.
    """
    B, H, _, Dk = q.shape
    Dv, dtype = v.shape[3], v.dtype
    state = state or MLSTMState.zeros(B, H, Dk, Dv, device=q.device)
    runs = None if segment_ids is None else document_runs(segment_ids).int()
    common_dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (contiguous_rows(x.to(common_dtype)) for x in (q, k, v))
    config = config or mlstm_config(common_dtype, Dk, Dv)
    inputs = (q, k, v, i.contiguous(), f.contiguous())
    start = [x.contiguous() for x in (state.C, state.n, state.m.detach())]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *start))
    h, C, n, m, *_ = forward(*inputs, *start, runs, config.numbers(), keep)
    return h.to(dtype), MLSTMState(C, n, m)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C0: Tensor,
    n0: Tensor,
    m0: Tensor,
    runs: Tensor | None,
    settings: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return h, the final C, n and m, and what the backward pass reads (`Kept`).

    settings: of `MLSTMConfig.numbers`. keep: whether a backward pass will follow. The backward pass
    computes the states of the chunks again: they would be the largest thing to keep.
    """
    config = MLSTMConfig.of_numbers(settings)
    sizes = sizes_of(q, v, runs is not None, config)
    inputs = Inputs(q, k, v, common_component(v), C0, n0, m0, runs)
    with on_device_of(q):
        gates = sum_gates(i, f, runs, sizes, config.chunk)
        C, n, m, C_end, n_end = run_states(inputs, gates, sizes, config)
        h, h_centred, den = run_outputs(inputs, gates, (C, n, m), keep, sizes, config)
    kept = Kept(inputs.centre, *gates[2:], h_centred, den, m)
    return h, C_end, n_end, m[:, :, -1].clone(), *kept


forward = torch.library.custom_op("xlstm_kernels::mlstm_triton", launch_forward, mutates_args=())


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C0: Tensor,
    n0: Tensor,
    m0: Tensor,
    runs: Tensor | None,
    settings: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, H, T, _ = q.shape
    h, row = v.new_empty(B, H, T, v.shape[3]), (B, H, T)
    centre = v.new_empty(B, v.shape[1], v.shape[3], dtype=torch.float32)
    high, low, largest, den, m = (q.new_empty(row, dtype=torch.float32) for _ in range(5))
    h_centred = torch.empty_like(h) if keep else v.new_empty(0)
    C_end, n_end, m_end = (x.new_empty(x.shape) for x in (C0, n0, m0))
    return h, C_end, n_end, m_end, centre, high, low, largest, h_centred, den, m


class Kept(NamedTuple):
    """What the backward pass reads of the forward pass, beside the arguments.

    h_centred: h less the centre; empty where nothing requires gradients. The rest: `Inputs`,
    `Gates` and `Rows`.
    """

    centre: Tensor
    sum_high: Tensor
    sum_low: Tensor
    max_log_weight: Tensor
    h_centred: Tensor
    den: Tensor
    m: Tensor


def sizes_of(q: Tensor, v: Tensor, segmented: bool, config: MLSTMConfig) -> Sizes:
    """Return the sizes of a call."""
    (B, H, T, Dk), (G, Dv) = q.shape, (v.shape[1], v.shape[3])
    return Sizes(B, H, G, T, Dk, Dv, -(-T // config.chunk), segmented, *dot_format(q.dtype))


def launch_backward(
    grads: list[Tensor],
    arguments: list[Tensor],
    runs: Tensor | None,
    kept: list[Tensor],
    settings: list[int],
    queries_and_keys: bool,
    values: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, i, f, C0 and n0.

    grads: those of h and of the final C and n. arguments: q, k, v, i, f, C0, n0, m0. Those of q, k,
    i and f are empty unless `queries_and_keys`; that of v is empty unless `values`.
    """
    dh, dC_end, dn_end = (x.contiguous() for x in grads)
    q, k, v, i, f, C0, n0, m0 = arguments
    known, config = Kept(*kept), MLSTMConfig.of_numbers(settings)
    sizes = sizes_of(q, v, runs is not None, config)
    inputs = Inputs(q, k, v, known.centre, C0, n0, m0, runs)
    gates = Gates(i, f, known.sum_high, known.sum_low, known.max_log_weight)
    centre = known.centre.repeat_interleave(sizes.H // sizes.G, 1)[:, :, None]  # (B, H, 1, Dv)
    # C_end is the state of the centred values plus n_end centreᵀ, so n_end has a part in it.
    dn_end = dn_end + (dC_end * centre).sum(-1)
    dq, dk, di, df, dv = (q.new_empty(0) for _ in range(5))
    with on_device_of(dh):
        d_den = run_denominator_grads(known.h_centred, dh, known.den, sizes, config)
        rows = Rows(dh, known.den, d_den, known.m)
        ends = dC_end, dn_end
        dC, dn, dC0, dn0 = run_state_grads(inputs, gates, rows, ends, sizes, config)
        if queries_and_keys:
            dq, dk, di, df = run_query_key_grads(inputs, gates, rows, (dC, dn), sizes, config)
        if values:
            dv = run_value_grads(inputs, gates, rows, dC, sizes, config)
    return [dq, dk, dv, di, df, dC0, dn0 - (dC0 * centre).sum(-1)]


backward = torch.library.custom_op(
    "xlstm_kernels::mlstm_triton_backward", launch_backward, mutates_args=()
)


@backward.register_fake
def _(
    grads: list[Tensor],
    arguments: list[Tensor],
    runs: Tensor | None,
    kept: list[Tensor],
    settings: list[int],
    queries_and_keys: bool,
    values: bool,
) -> list[Tensor]:
    wanted = (*[queries_and_keys] * 2, values, *[queries_and_keys] * 2, True, True)
    found = zip(arguments[:-1], wanted, strict=True)
    return [x.new_empty(x.shape if wants else (0,)) for x, wants in found]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, runs, settings, _ = inputs
    h, C, n, m_end, *kept = output
    ctx.mark_non_differentiable(m_end, *kept)
    # Else autograd would make a gradient of zeros for each of them.
    ctx.set_materialize_grads(False)
    ctx.results = [(x.shape, x.dtype, x.device) for x in (h, C, n)]
    ctx.save_for_backward(*arguments, runs, *kept)
    ctx.settings = settings


def _gradients(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    # Once: under activation checkpointing a second look is an error.
    saved = ctx.saved_tensors
    arguments, runs, kept = saved[:8], saved[8], saved[9:]
    needed = ctx.needs_input_grad
    parts = (needed[0] or needed[1] or needed[3] or needed[4], needed[2])
    grads = filled(given[:3], ctx.results)
    found = backward(grads, list(arguments), runs, list(kept), ctx.settings, *parts)
    wanted = [grad if needs else None for grad, needs in zip(found, needed, strict=False)]
    return (*wanted, *[None] * 4)  # m0, runs, settings and keep have no gradient


forward.register_autograd(_gradients, setup_context=_keep)
backward.register_autograd(functools.partial(refuse_second_derivative, "mlstm"))


class Rows(NamedTuple):
    """What the backward kernels read of each token: dh, denominator, its gradient, stabiliser."""

    dh: Tensor
    den: Tensor
    d_den: Tensor
    m: Tensor


@torch.no_grad()
def common_component(v: Tensor) -> Tensor:
    """Return a vector c near the mean of each head's values: the mean on a coarse grid.

    v (B, G, T, Dv) -> (B, G, Dv) in float32. h(v - c) = h(v) - c, and the gradients do not change.
    But the gradients cancel v against h: without c, both are small there, and so is their rounding.
    The step of the grid is a power of 2 near the standard deviation. So c is 0 for values without a
    common component, and v - c is exact in bfloat16, or nearly so.
    """
    mean = v.mean(2, dtype=torch.float32)
    squares = torch.linalg.vector_norm(v, dim=2, dtype=torch.float32).square() / v.shape[2]
    spread = (squares - mean.square()).clamp(min=0.0).sqrt().maximum(mean.abs() / 256)
    step = torch.exp2(spread.log2().floor())
    # Values too large to be squared, and values that are all 0, give inf or nan: they get c = 0.
    return torch.nan_to_num(step * (mean / step).round(), nan=0.0, posinf=0.0, neginf=0.0)


def sum_gates(i: Tensor, f: Tensor, runs: Tensor | None, sizes: Sizes, chunk: int) -> Gates:
    """Sum the forget gates of each chunk; i, f (B, H, T)."""
    sum_high, sum_low, max_log_weight = (
        torch.empty(i.shape, dtype=torch.float32, device=i.device) for _ in range(3)
    )
    common.gate_kernel[sizes.B * sizes.H, sizes.chunks](
        i_ptr=i, f_ptr=f, runs_ptr=runs,
        sum_high_ptr=sum_high, sum_low_ptr=sum_low, max_log_weight_ptr=max_log_weight,
        T=sizes.T, H=sizes.H, SEGMENTED=sizes.segmented, L=chunk,
    )  # fmt: skip
    return Gates(i, f, sum_high, sum_low, max_log_weight)


def run_states(
    inputs: Inputs, gates: Gates, sizes: Sizes, config: MLSTMConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Carry the state over the chunks.

    Returns what enters each chunk, C of the centred values (B H, chunks, Dk, Dv) and n
    (B H, chunks, Dk); m (B, H, T) of every token; and the final C and n.
    """
    B, H, G, T, Dk, Dv, chunks = sizes[:7]
    C = torch.empty(B * H, chunks, Dk, Dv, dtype=sizes.dtype, device=inputs.q.device)
    n = torch.empty(B * H, chunks, Dk, device=inputs.q.device)
    m = torch.empty(B, H, T, device=inputs.q.device)
    C_end, n_end = torch.empty_like(inputs.C0), torch.empty_like(inputs.n0)
    launch = config.states
    forward_kernels.state_kernel[(sizes.state_tiles(launch),)](
        k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre, runs_ptr=inputs.runs,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        max_log_weight_ptr=gates.max_log_weight,
        C0_ptr=inputs.C0, n0_ptr=inputs.n0, m0_ptr=inputs.m0,
        C_ptr=C, n_ptr=n, m_ptr=m, C_end_ptr=C_end, n_end_ptr=n_end,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(k=inputs.k, v=inputs.v), **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return C, n, m, C_end, n_end


def run_outputs(
    inputs: Inputs,
    gates: Gates,
    states: tuple[Tensor, Tensor, Tensor],
    keep: bool,
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, h - centre (empty unless `keep`) and the denominators.

    h, h - centre (B, H, T, Dv) in the dtype of v; the denominators (B, H, T) in float32.
    """
    B, H, G, T, _, Dv, chunks = sizes[:7]
    C, n, m = states
    h = torch.empty(B, H, T, Dv, dtype=inputs.v.dtype, device=inputs.v.device)
    h_centred = torch.empty_like(h) if keep else h.new_empty(0)
    den, launch = torch.empty_like(m), config.output
    forward_kernels.output_kernel[B * H, chunks, Dv // launch.block_v](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=m, m0_ptr=inputs.m0, runs_ptr=inputs.runs, C_ptr=C, n_ptr=n,
        h_ptr=h, h_centred_ptr=h_centred if keep else None, den_ptr=den,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return h, h_centred, den


def run_denominator_grads(
    h_centred: Tensor, dh: Tensor, den: Tensor, sizes: Sizes, config: MLSTMConfig
) -> Tensor:
    """Return d_den (B, H, T), the gradients of the denominators."""
    d_den = torch.empty_like(den)
    backward_kernels.denominator_kernel[sizes.B * sizes.H, sizes.chunks](
        h_centred_ptr=h_centred, dh_ptr=dh, den_ptr=den, d_den_ptr=d_den,
        T=sizes.T, DOT=sizes.dot, L=config.chunk, DV=sizes.Dv,
    )  # fmt: skip
    return d_den


def run_state_grads(
    inputs: Inputs,
    gates: Gates,
    rows: Rows,
    ends: tuple[Tensor, Tensor],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Carry the gradient of the state, C of the centred values and n, back over the chunks.

    ends: gradients of the final C and n. Returns those of the C and n that leave each chunk, and
    of those that enter the first.
    """
    B, H, _, T, Dk, Dv, chunks = sizes[:7]
    dC = torch.empty(B * H, chunks, Dk, Dv, dtype=sizes.dtype, device=inputs.q.device)
    dn = torch.empty(B * H, chunks, Dk, device=inputs.q.device)
    dC0, dn0 = torch.empty_like(inputs.C0), torch.empty_like(inputs.n0)
    dC_end, dn_end = ends
    launch = config.state_grads
    backward_kernels.state_grad_kernel[(sizes.state_tiles(launch),)](
        q_ptr=inputs.q, dh_ptr=rows.dh, den_ptr=rows.den, d_den_ptr=rows.d_den,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        dC_end_ptr=dC_end, dn_end_ptr=dn_end, dC_ptr=dC, dn_ptr=dn, dC0_ptr=dC0, dn0_ptr=dn0,
        T=T, H=H, chunks=chunks,
        **strides(q=inputs.q), **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return dC, dn, dC0, dn0


def run_query_key_grads(
    inputs: Inputs,
    gates: Gates,
    rows: Rows,
    state_grads: tuple[Tensor, Tensor],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk (B, H, T, Dk), di and df (B, H, T); computes the states again."""
    B, H, G, T, Dk, _, chunks = sizes[:7]
    C, n, _, _, _ = run_states(inputs, gates, sizes, config)
    dC, dn = state_grads
    dq, dk = (
        torch.empty(B, H, T, Dk, dtype=inputs.q.dtype, device=inputs.q.device) for _ in range(2)
    )
    di, df = torch.empty_like(gates.i), torch.empty_like(gates.f)
    backward_kernels.query_key_grad_kernel[B * H, chunks](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        dh_ptr=rows.dh, den_ptr=rows.den, d_den_ptr=rows.d_den,
        i_ptr=gates.i, f_ptr=gates.f, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        C_ptr=C, n_ptr=n, dC_ptr=dC, dn_ptr=dn, dq_ptr=dq, dk_ptr=dk, di_ptr=di, df_ptr=df,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.head_settings(config.query_key_grads, config.chunk),
    )  # fmt: skip
    return dq, dk, di, df


def run_value_grads(
    inputs: Inputs, gates: Gates, rows: Rows, dC: Tensor, sizes: Sizes, config: MLSTMConfig
) -> Tensor:
    """Return dv (B, G, T, Dv)."""
    B, H, G, T, _, Dv, chunks = sizes[:7]
    dv = torch.empty(B, G, T, Dv, dtype=inputs.v.dtype, device=inputs.v.device)
    launch = config.value_grads
    backward_kernels.value_grad_kernel[B * G, chunks, Dv // launch.block_v](
        q_ptr=inputs.q, k_ptr=inputs.k, dh_ptr=rows.dh, den_ptr=rows.den,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs, dC_ptr=dC, dv_ptr=dv,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k), **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return dv

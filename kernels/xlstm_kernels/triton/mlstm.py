"""Chunkwise mLSTM on Triton: launches the kernels and joins them to autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xlstm_kernels.segments import document_runs
from xlstm_kernels.state import MLSTMState
from xlstm_kernels.triton import common
from xlstm_kernels.triton import mlstm_backward as bwd
from xlstm_kernels.triton import mlstm_forward as fwd
from xlstm_kernels.triton.common import dot_format, on_device_of
from xlstm_kernels.triton.configs import Launch, MLSTMConfig, mlstm_config


class Inputs(NamedTuple):
    """What both passes read; centre (B, G, Dv) is subtracted from v, runs (B, T) numbers the documents of a row."""

    q: Tensor
    k: Tensor
    v: Tensor
    centre: Tensor
    C0: Tensor
    n0: Tensor
    m0: Tensor
    runs: Tensor | None


class Gates(NamedTuple):
    """What the kernels read of the gates: i, f; sums of log f (hi + lo) and largest log-weights (B, H, T) by chunk."""

    i: Tensor
    f: Tensor
    hi: Tensor
    lo: Tensor
    peak: Tensor


class Sizes(NamedTuple):
    """Sizes of a call, and the compile-time settings that depend on it."""

    B: int
    H: int
    G: int
    T: int
    Dk: int
    Dv: int
    chunks: int
    segmented: bool
    dtype: torch.dtype  # of dot operands and of the states kept per chunk
    dot: tl.dtype  # the same
    precision: str

    def head_settings(self, launch: Launch, chunk: int) -> dict[str, Any]:
        """Keyword arguments that all kernels with tiles share."""
        block_k, block_v, warps, stages = launch
        return {
            "SEGMENTED": self.segmented, "PRECISION": self.precision, "L": chunk, "DK": self.Dk, "DV": self.Dv,
            "BK": block_k, "BV": block_v, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip

    def state_tiles(self, launch: Launch) -> int:
        """Tiles of all states."""
        return self.B * self.H * (self.Dk // launch.block_k) * (self.Dv // launch.block_v)


def mlstm_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    segment_ids: Tensor | None,
    state: MLSTMState | None,
    config: MLSTMConfig | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Run the mLSTM; shapes and meaning as in `xlstm_kernels.mlstm`, which validates them. config: of the table."""
    B, H, _, Dk = q.shape
    Dv, dtype = v.shape[3], v.dtype
    state = state or MLSTMState.zeros(B, H, Dk, Dv, device=q.device)
    runs = None if segment_ids is None else document_runs(segment_ids).int()
    common_dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (_rows(x.to(common_dtype)) for x in (q, k, v))
    config = config or mlstm_config(common_dtype, Dk, Dv)
    h, C, n, m = ChunkwiseMLSTM.apply(
        q, k, v, i.contiguous(), f.contiguous(), state.C.contiguous(), state.n.contiguous(),
        state.m.detach().contiguous(), runs, config,
    )  # fmt: skip
    return h.to(dtype), MLSTMState(C, n, m)


class ChunkwiseMLSTM(Function):
    """h and the final state; saves inputs, h - centre, denominators and m, and recomputes the states of the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        C0: Tensor,
        n0: Tensor,
        m0: Tensor,
        runs: Tensor | None,
        config: MLSTMConfig,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, H, T, Dk = q.shape
        chunks = -(-T // config.chunk)
        sizes = Sizes(
            B, H, v.shape[1], T, Dk, v.shape[3], chunks, runs is not None, *dot_format(q.dtype)
        )
        x = Inputs(q, k, v, common_component(v), C0, n0, m0, runs)
        with on_device_of(q):
            gates = sum_gates(i, f, runs, sizes, config.chunk)
            C, n, m, C_end, n_end = run_states(x, gates, sizes, config)
            h, ratio, den = run_outputs(
                x, gates, (C, n, m), any(ctx.needs_input_grad), sizes, config
            )
        ctx.save_for_backward(*x, *gates, ratio, den, m)
        ctx.sizes, ctx.config = sizes, config
        m_end = m[:, :, -1].clone()
        ctx.mark_non_differentiable(m_end)
        return h, C_end, n_end, m_end

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dh: Tensor, dC_end: Tensor, dn_end: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved, sizes, config = ctx.saved_tensors, ctx.sizes, ctx.config
        x, gates, (ratio, den, m) = Inputs(*saved[:8]), Gates(*saved[8:13]), saved[13:]
        needed, dh = ctx.needs_input_grad, dh.contiguous()
        centre = x.centre.repeat_interleave(sizes.H // sizes.G, 1)[:, :, None]  # (B, H, 1, Dv)
        dn_end = dn_end + (dC_end * centre).sum(-1)  # C_end is the centred state plus n_end centreᵀ
        dq = dk = dv = di = df = None
        with on_device_of(dh):
            e = torch.empty_like(m)
            bwd.denominator_kernel[sizes.B * sizes.H, sizes.chunks](
                ratio, dh, den, e, sizes.T, DOT=sizes.dot, L=config.chunk, DV=sizes.Dv
            )
            rows = Rows(dh, den, e, m)
            dC, dn, dC0, dn0 = run_state_grads(
                x, gates, rows, (dC_end.contiguous(), dn_end), sizes, config
            )
            if needed[0] or needed[1] or needed[3] or needed[4]:
                dq, dk, di, df = run_query_key_grads(x, gates, rows, (dC, dn), sizes, config)
            if needed[2]:
                dv = run_value_grads(x, gates, rows, dC, sizes, config)
        dn0 = dn0 - (dC0 * centre).sum(-1)
        grads = (dq, dk, dv, di, df, dC0, dn0)
        return (
            *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=False)),
            None,
            None,
            None,
        )


class Rows(NamedTuple):
    """What the backward kernels read of each token's row: dh, denominator and its gradient e, stabiliser."""

    dh: Tensor
    den: Tensor
    e: Tensor
    m: Tensor


@torch.no_grad()
def common_component(v: Tensor) -> Tensor:
    """Return a vector near the mean of each head's values, (B, G, Dv) in float32: the mean on a coarse grid.

    h(v - c) = h(v) - c, and gradients do not change; but what they cancel, v against h, is then small, and so is its
    rounding. The grid's step, a power of 2 near the standard deviation, leaves values without a common component
    as they are, and makes v - c in bfloat16 exact or nearly so. Values too large to be squared are left alone.
    """
    mean = v.mean(2, dtype=torch.float32)
    squares = torch.linalg.vector_norm(v, dim=2, dtype=torch.float32).square() / v.shape[2]
    spread = (squares - mean.square()).clamp(min=0.0).sqrt().maximum(mean.abs() / 256)
    step = torch.exp2(spread.log2().floor())
    return torch.nan_to_num(step * (mean / step).round(), nan=0.0, posinf=0.0, neginf=0.0)


def sum_gates(i: Tensor, f: Tensor, runs: Tensor | None, sizes: Sizes, chunk: int) -> Gates:
    """Sum the forget gates of each chunk."""
    hi, lo, peak = (torch.empty(i.shape, dtype=torch.float32, device=i.device) for _ in range(3))
    common.gate_kernel[sizes.B * sizes.H, sizes.chunks](
        i, f, runs, hi, lo, peak, sizes.T, sizes.H, SEGMENTED=sizes.segmented, L=chunk
    )
    return Gates(i, f, hi, lo, peak)


def run_states(
    x: Inputs, gates: Gates, sizes: Sizes, config: MLSTMConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return centred C (B H, chunks, Dk, Dv), n (B H, chunks, Dk) at the chunks' starts; m (B, H, T); final C and n."""
    B, H, G, T, Dk, Dv, chunks = sizes[:7]
    C = torch.empty(B * H, chunks, Dk, Dv, dtype=sizes.dtype, device=x.q.device)
    n = torch.empty(B * H, chunks, Dk, device=x.q.device)
    m = torch.empty(B, H, T, device=x.q.device)
    C_end, n_end = torch.empty_like(x.C0), torch.empty_like(x.n0)
    launch = config.states
    fwd.state_kernel[(sizes.state_tiles(launch),)](
        x.k, x.v, x.centre, gates.i, gates.hi, gates.lo, gates.peak, x.runs, x.C0, x.n0, x.m0, C, n, m, C_end, n_end,
        *x.k.stride()[:3], *x.v.stride()[:3], T, H, H // G, chunks, **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return C, n, m, C_end, n_end


def run_outputs(
    x: Inputs,
    gates: Gates,
    states: tuple[Tensor, Tensor, Tensor],
    keep: bool,
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return h and, to keep, h - centre (B, H, T, Dv) in the dtype of v; and the denominators (B, H, T)."""
    B, H, G, T, _, Dv, chunks = sizes[:7]
    C, n, m = states
    h = torch.empty(B, H, T, Dv, dtype=x.v.dtype, device=x.v.device)
    ratio = torch.empty_like(h) if keep else None
    den, launch = torch.empty_like(m), config.output
    fwd.output_kernel[B * H, chunks, Dv // launch.block_v](
        x.q, x.k, x.v, x.centre, gates.i, gates.hi, gates.lo, m, x.m0, x.runs, C, n, h, ratio, den,
        *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], T, H, H // G, chunks,
        **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return h, ratio, den


def run_state_grads(
    x: Inputs,
    gates: Gates,
    rows: Rows,
    ends: tuple[Tensor, Tensor],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of the centred C and of n that leave each chunk, and of those that enter the first."""
    B, H, _, T, Dk, Dv, chunks = sizes[:7]
    dC = torch.empty(B * H, chunks, Dk, Dv, dtype=sizes.dtype, device=x.q.device)
    dn = torch.empty(B * H, chunks, Dk, device=x.q.device)
    dC0, dn0 = torch.empty_like(x.C0), torch.empty_like(x.n0)
    launch = config.state_grads
    bwd.state_grad_kernel[(sizes.state_tiles(launch),)](
        x.q, rows.dh, rows.den, rows.e, gates.i, gates.hi, gates.lo, rows.m, x.m0, x.runs, *ends, dC, dn, dC0, dn0,
        *x.q.stride()[:3], T, H, chunks, **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return dC, dn, dC0, dn0


def run_query_key_grads(
    x: Inputs,
    gates: Gates,
    rows: Rows,
    state_grads: tuple[Tensor, Tensor],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk (B, H, T, Dk), di and df (B, H, T); computes the states again."""
    B, H, G, T, Dk, _, chunks = sizes[:7]
    C, n, _, _, _ = run_states(x, gates, sizes, config)
    dq, dk = (torch.empty(B, H, T, Dk, dtype=x.q.dtype, device=x.q.device) for _ in range(2))
    di, df = torch.empty_like(gates.i), torch.empty_like(gates.f)
    bwd.query_key_grad_kernel[B * H, chunks](
        x.q, x.k, x.v, x.centre, gates.i, gates.f, rows.dh, rows.den, rows.e, gates.hi, gates.lo, rows.m, x.m0, x.runs,
        C, n, *state_grads, dq, dk, di, df, *x.q.stride()[:3], *x.k.stride()[:3], *x.v.stride()[:3], T, H, H // G,
        chunks, **sizes.head_settings(config.query_key_grads, config.chunk),
    )  # fmt: skip
    return dq, dk, di, df


def run_value_grads(
    x: Inputs, gates: Gates, rows: Rows, dC: Tensor, sizes: Sizes, config: MLSTMConfig
) -> Tensor:
    """Return dv (B, G, T, Dv)."""
    B, H, G, T, _, Dv, chunks = sizes[:7]
    dv = torch.empty(B, G, T, Dv, dtype=x.v.dtype, device=x.v.device)
    launch = config.value_grads
    bwd.value_grad_kernel[B * G, chunks, Dv // launch.block_v](
        x.q, x.k, gates.i, rows.dh, rows.den, gates.hi, gates.lo, rows.m, x.m0, x.runs, dC, dv,
        *x.q.stride()[:3], *x.k.stride()[:3], T, H, H // G, chunks, **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return dv


def _rows(x: Tensor) -> Tensor:
    """Make the features of a token adjacent in memory; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()

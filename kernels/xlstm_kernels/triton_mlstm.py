"""Chunkwise mLSTM on Triton: launches the kernels and joins them to autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xlstm_kernels import triton_common as common
from xlstm_kernels import triton_mlstm_bwd as bwd
from xlstm_kernels import triton_mlstm_fwd as fwd
from xlstm_kernels.segments import document_runs
from xlstm_kernels.state import MLSTMState
from xlstm_kernels.triton_common import dot_format
from xlstm_kernels.triton_configs import MLSTMConfig, mlstm_config


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
    precision: str
    dtype: torch.dtype  # of dot operands and of the states kept per chunk

    def head_settings(self, launch: tuple[int, int, int, int], chunk: int) -> dict[str, Any]:
        """Keyword arguments that all kernels with tiles share."""
        block_k, block_v, warps, stages = launch
        return {
            "SEGMENTED": self.segmented, "PRECISION": self.precision, "L": chunk, "DK": self.Dk, "DV": self.Dv,
            "BK": block_k, "BV": block_v, "num_warps": warps, "num_stages": stages,
        }  # fmt: skip


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
    """h and the final state; saves inputs, h, the denominators and m, and recomputes the states of the chunks."""

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
        dtype, precision = dot_format(q.dtype)
        B, H, T, Dk = q.shape
        chunks = -(-T // config.chunk)
        sizes = Sizes(B, H, v.shape[1], T, Dk, v.shape[3], chunks, runs is not None, precision, dtype)
        with torch.cuda.device_of(q), torch.device(q.device):  # Triton launches on the current device
            gates = sum_gates(i, f, runs, sizes, config.chunk)
            C, n, m, C_end, n_end = run_states(k, v, gates, runs, (C0, n0, m0), sizes, config)
            h, den = run_outputs(q, k, v, gates, runs, m0, (C, n, m), sizes, config)
        ctx.save_for_backward(q, k, v, C0, n0, m0, runs, h, den, m, *gates)
        ctx.sizes, ctx.config = sizes, config
        m_end = m[:, :, -1].clone()
        ctx.mark_non_differentiable(m_end)
        return h, C_end, n_end, m_end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor, dC_end: Tensor, dn_end: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, C0, n0, m0, runs, h, den, m, *rest = ctx.saved_tensors
        gates, sizes, config = Gates(*rest), ctx.sizes, ctx.config
        B, H, G, T, Dk, Dv, chunks = sizes[:7]
        dh, dC_end, dn_end = dh.contiguous(), dC_end.contiguous(), dn_end.contiguous()
        R, L, row, heads = H // G, config.chunk, (*q.stride()[:3],), B * H
        with torch.cuda.device_of(q), torch.device(q.device):
            e, di, df = torch.empty_like(m), torch.empty_like(gates.i), torch.empty_like(gates.f)
            C, n, _, _, _ = run_states(k, v, gates, runs, (C0, n0, m0), sizes, config)
            dC, dn, dC0, dn0 = torch.empty_like(C), torch.empty_like(n), torch.empty_like(C0), torch.empty_like(n0)
            dq, dk = (torch.empty(B, H, T, Dk, dtype=q.dtype) for _ in range(2))
            dv = torch.empty(B, G, T, Dv, dtype=v.dtype)
            sums = (gates.hi, gates.lo, m, m0, runs)
            bwd.denominator_kernel[chunks, heads](h, dh, den, e, T, L=L, DV=Dv)
            launch = config.state_grads
            bwd.state_grad_kernel[Dk // launch.block_k, Dv // launch.block_v, heads](
                q, dh, den, e, gates.i, *sums, dC_end, dn_end, dC, dn, dC0, dn0, *row, T, H, chunks,
                **sizes.head_settings(launch, L),
            )  # fmt: skip
            bwd.query_key_grad_kernel[chunks, heads](
                q, k, v, gates.i, gates.f, dh, den, e, *sums, C, n, dC, dn, dq, dk, di, df,
                *row, *k.stride()[:3], *v.stride()[:3], T, H, R, chunks,
                **sizes.head_settings(config.query_key_grads, L),
            )  # fmt: skip
            launch = config.value_grads
            bwd.value_grad_kernel[chunks, B * G, Dv // launch.block_v](
                q, k, gates.i, dh, den, *sums, dC, dv, *row, *k.stride()[:3], T, H, R, chunks,
                **sizes.head_settings(launch, L),
            )  # fmt: skip
        return dq, dk, dv, di, df, dC0, dn0, None, None, None


def sum_gates(i: Tensor, f: Tensor, runs: Tensor | None, sizes: Sizes, chunk: int) -> Gates:
    """Sum the forget gates of each chunk."""
    hi, lo, peak = (torch.empty(i.shape, dtype=torch.float32) for _ in range(3))
    grid = (sizes.chunks, sizes.B * sizes.H)
    common.gate_kernel[grid](i, f, runs, hi, lo, peak, sizes.T, sizes.H, SEGMENTED=sizes.segmented, L=chunk)
    return Gates(i, f, hi, lo, peak)


def run_states(
    k: Tensor,
    v: Tensor,
    gates: Gates,
    runs: Tensor | None,
    start: tuple[Tensor, ...],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return C (B H, chunks, Dk, Dv), n (B H, chunks, Dk) entering the chunks; m (B, H, T); final C and n."""
    B, H, G, T, Dk, Dv, chunks = sizes[:7]
    C = torch.empty(B * H, chunks, Dk, Dv, dtype=sizes.dtype)
    n = torch.empty(B * H, chunks, Dk)
    m = torch.empty(B, H, T)
    C_end, n_end = torch.empty_like(start[0]), torch.empty_like(start[1])
    launch = config.states
    fwd.state_kernel[Dk // launch.block_k, Dv // launch.block_v, B * H](
        k, v, gates.i, gates.hi, gates.lo, gates.peak, runs, *start, C, n, m, C_end, n_end,
        *k.stride()[:3], *v.stride()[:3], T, H, H // G, chunks, **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return C, n, m, C_end, n_end


def run_outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    runs: Tensor | None,
    m0: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor]:
    """Return h (B, H, T, Dv) and the denominators (B, H, T)."""
    B, H, G, T, _, Dv, chunks = sizes[:7]
    C, n, m = states
    h, den = torch.empty(B, H, T, Dv, dtype=v.dtype), torch.empty(B, H, T)
    launch = config.output
    fwd.output_kernel[chunks, B * H, Dv // launch.block_v](
        q, k, v, gates.i, gates.hi, gates.lo, m, m0, runs, C, n, h, den,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], T, H, H // G, chunks,
        **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return h, den


def _rows(x: Tensor) -> Tensor:
    """Make the features of a token adjacent in memory; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()

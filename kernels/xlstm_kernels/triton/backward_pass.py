"""Backward pass of the chunkwise mLSTM: launches its kernels.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_kernels.triton import mlstm_backward as kernels
from xlstm_kernels.triton.common import on_device_of, strides
from xlstm_kernels.triton.configs import MLSTMConfig
from xlstm_kernels.triton.forward_pass import run_states
from xlstm_kernels.triton.mlstm_tensors import Gates, Inputs, Kept, Rows, Sizes, sizes_of


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
            dk, d_write = run_key_grads(inputs, gates, rows, (dC, dn), sizes, config)
            shared = (inputs, gates, rows, (dC, dn), d_write, sizes, config)
            dq, di, df = run_query_gate_grads(*shared)
        if values:
            dv = run_value_grads(inputs, gates, rows, dC, sizes, config)
    return [dq, dk, dv, di, df, dC0, dn0 - (dC0 * centre).sum(-1)]


def run_denominator_grads(
    h_centred: Tensor, dh: Tensor, den: Tensor, sizes: Sizes, config: MLSTMConfig
) -> Tensor:
    """Return d_den (B, H, T), the gradients of the denominators."""
    d_den = torch.empty_like(den)
    kernels.denominator_kernel[(sizes.chunks * sizes.B * sizes.H,)](
        h_centred_ptr=h_centred, dh_ptr=dh, den_ptr=den, d_den_ptr=d_den,
        T=sizes.T, chunks=sizes.chunks, DOT=sizes.dot, L=config.chunk, DV=sizes.Dv,
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
    kernels.state_grad_kernel[(sizes.state_tiles(launch),)](
        q_ptr=inputs.q, dh_ptr=rows.dh, den_ptr=rows.den, d_den_ptr=rows.d_den,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        dC_end_ptr=dC_end, dn_end_ptr=dn_end, dC_ptr=dC, dn_ptr=dn, dC0_ptr=dC0, dn0_ptr=dn0,
        T=T, H=H, chunks=chunks,
        **strides(q=inputs.q), **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return dC, dn, dC0, dn0


def run_key_grads(
    inputs: Inputs,
    gates: Gates,
    rows: Rows,
    state_grads: tuple[Tensor, Tensor],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor]:
    """Return dk (B, H, T, Dk) and d_write (B, H, T), which the gates' gradients need."""
    B, H, G, T, Dk, _, chunks = sizes[:7]
    dC, dn = state_grads
    dk = torch.empty(B, H, T, Dk, dtype=inputs.k.dtype, device=inputs.k.device)
    d_write = torch.empty_like(rows.m)
    kernels.key_grad_kernel[(chunks * B * H,)](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        dh_ptr=rows.dh, den_ptr=rows.den, d_den_ptr=rows.d_den,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        dC_ptr=dC, dn_ptr=dn, dk_ptr=dk, d_write_ptr=d_write,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.head_settings(config.key_grads, config.chunk),
    )  # fmt: skip
    return dk, d_write


def run_query_gate_grads(
    inputs: Inputs,
    gates: Gates,
    rows: Rows,
    state_grads: tuple[Tensor, Tensor],
    d_write: Tensor,
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq (B, H, T, Dk), di and df (B, H, T); computes the states again."""
    B, H, G, T, Dk, _, chunks = sizes[:7]
    C, n, _, _, _ = run_states(inputs, gates, sizes, config)
    dC, dn = state_grads
    dq = torch.empty(B, H, T, Dk, dtype=inputs.q.dtype, device=inputs.q.device)
    di, df = torch.empty_like(gates.i), torch.empty_like(gates.f)
    kernels.query_gate_grad_kernel[(chunks * B * H,)](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        dh_ptr=rows.dh, den_ptr=rows.den, d_den_ptr=rows.d_den,
        i_ptr=gates.i, f_ptr=gates.f, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        C_ptr=C, n_ptr=n, dC_ptr=dC, dn_ptr=dn, d_write_ptr=d_write,
        dq_ptr=dq, di_ptr=di, df_ptr=df,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.head_settings(config.query_gate_grads, config.chunk),
    )  # fmt: skip
    return dq, di, df


def run_value_grads(
    inputs: Inputs, gates: Gates, rows: Rows, dC: Tensor, sizes: Sizes, config: MLSTMConfig
) -> Tensor:
    """Return dv (B, G, T, Dv)."""
    B, H, G, T, _, Dv, chunks = sizes[:7]
    dv = torch.empty(B, G, T, Dv, dtype=inputs.v.dtype, device=inputs.v.device)
    launch = config.value_grads
    kernels.value_grad_kernel[chunks * B * G, Dv // launch.block_v](
        q_ptr=inputs.q, k_ptr=inputs.k, dh_ptr=rows.dh, den_ptr=rows.den,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs, dC_ptr=dC, dv_ptr=dv,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k), **sizes.head_settings(launch, config.chunk),
    )  # fmt: skip
    return dv

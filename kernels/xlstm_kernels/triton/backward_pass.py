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
from xlstm_kernels.triton.mlstm_tensors import GateParts, Gates, Inputs, Kept, Rows, Sizes, sizes_of


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
    di, df = i.new_empty(0), f.new_empty(0)
    with on_device_of(dh):
        d_den = run_denominator_grads(known.h_centred, dh, known.den, sizes)
        rows = Rows(dh, known.den, d_den, known.m)
        ends = dC_end, dn_end
        dC, dn, dC0, dn0 = run_state_grads(inputs, gates, rows, ends, sizes, config)
        parts = queries_and_keys, values
        shared = (inputs, gates, rows, (dC, dn))
        (dq, dk, dv), found = run_token_grads(*shared, parts, sizes, config)
        if queries_and_keys:
            di, df = run_gate_grads(inputs, gates, rows.m, found, sizes)
    return [dq, dk, dv, di, df, dC0, dn0 - (dC0 * centre).sum(-1)]


def run_denominator_grads(h_centred: Tensor, dh: Tensor, den: Tensor, sizes: Sizes) -> Tensor:
    """Return d_den (B, H, T), the gradients of the denominators."""
    d_den = torch.empty_like(den)
    kernels.denominator_kernel[(sizes.token_tiles,)](
        h_centred_ptr=h_centred, dh_ptr=dh, den_ptr=den, d_den_ptr=d_den,
        T=sizes.T, chunks=sizes.chunks, DOT=sizes.dot, L=sizes.chunk, BT=sizes.tile, DV=sizes.Dv,
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
        **strides(q=inputs.q), **sizes.head_settings(launch),
    )  # fmt: skip
    return dC, dn, dC0, dn0


def run_token_grads(
    inputs: Inputs,
    gates: Gates,
    rows: Rows,
    state_grads: tuple[Tensor, Tensor],
    wanted: tuple[bool, bool],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[tuple[Tensor, Tensor, Tensor], GateParts]:
    """Return dq, dk (B, H, T, Dk) and dv (B, G, T, Dv), and the parts of the gates' gradients.

    wanted: whether dq, dk and the parts are, and whether dv is; what is not wanted is empty. For
    the former the states are computed again.
    """
    queries_and_keys, values = wanted
    H, G, chunks = sizes.H, sizes.G, sizes.chunks
    C = n = None
    parts = GateParts.empty(sizes, rows.m.device)
    tiles = sizes.chunk // sizes.tile
    programs = tiles if values else 0  # of a chunk of a value head, as the kernel counts them
    if queries_and_keys:
        C, n, _, _, _ = run_states(inputs, gates, sizes, config)
        programs += (H // G) * (3 * tiles + 1)
    dq, dk = (contiguous_like(x, queries_and_keys) for x in (inputs.q, inputs.k))
    dv = contiguous_like(inputs.v, values)
    dC, dn = state_grads
    kernels.token_grad_kernel[(chunks * sizes.B * G * programs,)](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        dh_ptr=rows.dh, den_ptr=rows.den, d_den_ptr=rows.d_den,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        C_ptr=C, n_ptr=n, dC_ptr=dC, dn_ptr=dn, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv,
        **{f"{name}_ptr": x for name, x in parts._asdict().items()},
        T=sizes.T, H=H, R=H // G, chunks=chunks,
        QUERIES_AND_KEYS=queries_and_keys, VALUES=values,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.token_settings(config.token_grads),
    )  # fmt: skip
    return (dq, dk, dv), parts


def contiguous_like(x: Tensor, wanted: bool) -> Tensor:
    """Make room for the gradient of x; none if it is not wanted."""
    return x.new_empty(x.shape if wanted else 0)


def run_gate_grads(
    inputs: Inputs, gates: Gates, m: Tensor, parts: GateParts, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Return di and df (B, H, T)."""
    di, df = torch.empty_like(gates.i), torch.empty_like(gates.f)
    kernels.gate_grad_kernel[(sizes.token_tiles,)](
        f_ptr=gates.f, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        **{f"{name}_ptr": x for name, x in parts._asdict().items()},
        di_ptr=di, df_ptr=df, T=sizes.T, H=sizes.H, chunks=sizes.chunks,
        SEGMENTED=sizes.segmented, L=sizes.chunk, BT=sizes.tile,
    )  # fmt: skip
    return di, df

"""Forward pass of the chunkwise mLSTM: launches its kernels.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_kernels.triton import common
from xlstm_kernels.triton import mlstm_forward as kernels
from xlstm_kernels.triton.common import on_device_of, strides
from xlstm_kernels.triton.configs import MLSTMConfig
from xlstm_kernels.triton.mlstm_tensors import Gates, Inputs, Kept, Sizes, sizes_of


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
        gates = sum_gates(i, f, runs, sizes)
        C, n, m, C_end, n_end = run_states(inputs, gates, sizes, config)
        h, h_centred, den = run_outputs(inputs, gates, (C, n, m), keep, sizes, config)
    kept = Kept(inputs.centre, *gates[2:], h_centred, den, m)
    return h, C_end, n_end, m[:, :, -1].clone(), *kept


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


def sum_gates(i: Tensor, f: Tensor, runs: Tensor | None, sizes: Sizes) -> Gates:
    """Sum the forget gates of each chunk; i, f (B, H, T)."""
    sum_high, sum_low, max_log_weight = (
        torch.empty(i.shape, dtype=torch.float32, device=i.device) for _ in range(3)
    )
    common.gate_kernel[(sizes.chunks * sizes.B * sizes.H,)](
        i_ptr=i, f_ptr=f, runs_ptr=runs,
        sum_high_ptr=sum_high, sum_low_ptr=sum_low, max_log_weight_ptr=max_log_weight,
        T=sizes.T, H=sizes.H, chunks=sizes.chunks, SEGMENTED=sizes.segmented, L=sizes.chunk,
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
    kernels.state_kernel[(sizes.state_tiles(launch),)](
        k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre, runs_ptr=inputs.runs,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        max_log_weight_ptr=gates.max_log_weight,
        C0_ptr=inputs.C0, n0_ptr=inputs.n0, m0_ptr=inputs.m0,
        C_ptr=C, n_ptr=n, m_ptr=m, C_end_ptr=C_end, n_end_ptr=n_end,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(k=inputs.k, v=inputs.v), **sizes.head_settings(launch),
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
    kernels.output_kernel[sizes.token_tiles, Dv // launch.block_v](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=m, m0_ptr=inputs.m0, runs_ptr=inputs.runs, C_ptr=C, n_ptr=n,
        h_ptr=h, h_centred_ptr=h_centred if keep else None, den_ptr=den,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.head_settings(launch),
    )  # fmt: skip
    return h, h_centred, den

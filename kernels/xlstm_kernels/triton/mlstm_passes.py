"""Forward and backward pass of the chunkwise mLSTM: launches their kernels.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xlstm_kernels.triton import mlstm_backward, mlstm_forward
from xlstm_kernels.triton.common import on_device_of, strides
from xlstm_kernels.triton.configs import Launch, MLSTMConfig
from xlstm_kernels.triton.mlstm_tensors import (
    Ends,
    GateParts,
    Gates,
    Inputs,
    Kept,
    Results,
    Rows,
    Sizes,
    States,
    kept_dtype,
    named_ends,
    sizes_of,
)


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
    keep_states: bool,
    cut: int = 0,
) -> Results:
    """Return h, the final C, n and m, and what the backward pass reads (`Kept`).

    settings: of `MLSTMConfig.numbers`. keep: whether a backward pass will follow. keep_states:
    whether to keep the states of the chunks too, the largest thing there is to keep. Otherwise the
    backward pass computes them again. cut: the most super-chunks of a row; 0: as the device needs.
    """
    config = MLSTMConfig.of_numbers(settings)
    sizes = sizes_of(q, v, runs is not None, config, cut)
    with on_device_of(q):
        gates, v_parts = run_chunks(i, f, v, runs, sizes)
        inputs = Inputs(q, k, v, *run_centre(v_parts, C0, n0, sizes), C0, n0, m0, runs)
        states, m, C_end, n_end = run_states(inputs, gates, sizes, config)
        h, h_centred, h_scale, den = run_outputs(inputs, gates, states, m, keep, sizes, config)
    if not keep_states:
        states = States.empty(sizes, q.device, wanted=False)
    of_rows = inputs.centre, inputs.v_max, inputs.C0_max
    kept = Kept(*of_rows, *gates[2:], h_centred, h_scale, den, m, *states)
    return h, C_end, n_end, m[:, :, -1].clone(), *kept


def run_chunks(
    i: Tensor, f: Tensor, v: Tensor, runs: Tensor | None, sizes: Sizes
) -> tuple[Gates, Tensor]:
    """Sum the forget gates of each chunk, i, f (B, H, T); and its values, v (B, G, T, Dv).

    Of these returns sum, sum of squares, smallest and largest: (B, G, chunks, 4, Dv).
    """
    B, H, G = sizes[:3]
    v_parts = torch.empty(B, G, sizes.chunks, 4, sizes.Dv, device=v.device)
    sum_high, sum_low, max_log_weight = (
        torch.empty(i.shape, dtype=torch.float32, device=i.device) for _ in range(3)
    )
    mlstm_forward.chunk_kernel[(sizes.chunks * B * (G + H),)](
        i_ptr=i, f_ptr=f, v_ptr=v, runs_ptr=runs,
        sum_high_ptr=sum_high, sum_low_ptr=sum_low, max_log_weight_ptr=max_log_weight,
        v_parts_ptr=v_parts, **strides(v=v), T=sizes.T, H=H, R=H // G, chunks=sizes.chunks,
        SEGMENTED=sizes.segmented, L=sizes.chunk, DV=sizes.Dv,
    )  # fmt: skip
    return Gates(i, f, sum_high, sum_low, max_log_weight), v_parts


def run_centre(
    v_parts: Tensor, C0: Tensor, n0: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `centre`, `v_max` and `C0_max` of `Inputs`; v_parts: of `run_chunks`."""
    B, H, G = sizes[:3]
    centre = torch.empty(B, G, sizes.Dv, device=v_parts.device)
    v_max = torch.empty(B, G, sizes.chunks, device=v_parts.device)
    C0_max = torch.empty_like(n0)
    mlstm_forward.centre_kernel[(B * H,)](
        v_parts_ptr=v_parts, C0_ptr=C0, n0_ptr=n0,
        centre_ptr=centre, v_max_ptr=v_max, C0_max_ptr=C0_max,
        T=sizes.T, H=H, R=H // G, chunks=sizes.chunks, DK=sizes.Dk, DV=sizes.Dv,
    )  # fmt: skip
    return centre, v_max, C0_max


def run_states(
    inputs: Inputs, gates: Gates, sizes: Sizes, config: MLSTMConfig
) -> tuple[States, Tensor, Tensor, Tensor]:
    """Carry the state over the chunks.

    Returns what enters each chunk, C of the centred values; m (B, H, T) of every token; and the
    final C and n.
    """
    states = States.empty(sizes, inputs.q.device)
    m = torch.empty_like(gates.sum_high)
    C_end, n_end = torch.empty_like(inputs.C0), torch.empty_like(inputs.n0)
    launch = config.states
    super_chunks = sizes.super_chunks(launch)
    ends, end_m = run_state_ends(inputs, gates, sizes, launch) if super_chunks > 1 else (None, None)
    mlstm_forward.state_kernel[(sizes.state_tiles(launch) * super_chunks,)](
        **what_states_read(inputs, gates, sizes, launch), **named_ends(ends), end_m_ptr=end_m,
        C0_ptr=inputs.C0, C0_max_ptr=inputs.C0_max, n0_ptr=inputs.n0, m0_ptr=inputs.m0,
        C_ptr=states.C, C_scale_ptr=states.scale, n_ptr=states.n,
        m_ptr=m, C_end_ptr=C_end, n_end_ptr=n_end,
    )  # fmt: skip
    return states, m, C_end, n_end


def run_state_ends(
    inputs: Inputs, gates: Gates, sizes: Sizes, launch: Launch
) -> tuple[Ends, Tensor]:
    """Compute what each super-chunk adds to the state, and the stabiliser of each."""
    ends = Ends.empty(sizes, launch, inputs.q.device)
    end_m = torch.empty(ends.log_f.shape, device=inputs.q.device)
    others = sizes.super_chunks(launch) - 1
    mlstm_forward.state_end_kernel[(sizes.state_tiles(launch) * others,)](
        **what_states_read(inputs, gates, sizes, launch), **named_ends(ends), end_m_ptr=end_m
    )
    return ends, end_m


def what_states_read(inputs: Inputs, gates: Gates, sizes: Sizes, launch: Launch) -> dict[str, Any]:
    """Return the arguments that the kernels of the states have in common."""
    return {
        "k_ptr": inputs.k, "v_ptr": inputs.v, "centre_ptr": inputs.centre,
        "v_max_ptr": inputs.v_max, "runs_ptr": inputs.runs,
        "i_ptr": gates.i, "sum_high_ptr": gates.sum_high, "sum_low_ptr": gates.sum_low,
        "max_log_weight_ptr": gates.max_log_weight,
        "T": sizes.T, "H": sizes.H, "R": sizes.H // sizes.G, "chunks": sizes.chunks,
        "span": sizes.span(launch),
        **strides(k=inputs.k, v=inputs.v), **sizes.head_settings(launch),
    }  # fmt: skip


def run_outputs(
    inputs: Inputs,
    gates: Gates,
    states: States,
    m: Tensor,
    keep: bool,
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h (B, H, T, Dv) in the dtype of v; `h_centred`, `h_scale` and `den` of `Kept`.

    The second and third are empty unless `keep`.
    """
    B, H, G, T, _, Dv, chunks = sizes[:7]
    h = torch.empty(B, H, T, Dv, dtype=inputs.v.dtype, device=inputs.v.device)
    den, launch = torch.empty_like(m), config.output
    h_centred, h_scale = m.new_empty(0, dtype=kept_dtype(h.dtype)), m.new_empty(0)
    if keep:
        h_centred = torch.empty_like(h, dtype=h_centred.dtype)
        h_scale = torch.empty(B, H, Dv // launch.block_v, T, device=m.device)
    mlstm_forward.output_kernel[sizes.token_tiles, Dv // launch.block_v](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        C_ptr=states.C, C_scale_ptr=states.scale, n_ptr=states.n,
        h_ptr=h, h_centred_ptr=h_centred if keep else None,
        h_scale_ptr=h_scale if keep else None, den_ptr=den,
        T=T, H=H, R=H // G, chunks=chunks,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.head_settings(launch),
    )  # fmt: skip
    return h, h_centred, h_scale, den


def launch_backward(
    grads: list[Tensor],
    arguments: list[Tensor],
    runs: Tensor | None,
    kept: list[Tensor],
    settings: list[int],
    queries_and_keys: bool,
    values: bool,
    cut: int = 0,
    start: bool = True,
) -> list[Tensor]:
    """Return the gradients of q, k, v, i, f, C0 and n0.

    grads: those of h and of the final C and n. arguments: q, k, v, i, f, C0, n0, m0. Those of q, k,
    i and f are empty unless `queries_and_keys`; that of v is empty unless `values`; those of C0 and
    n0 are empty unless `start`.
    """
    dh, dC_end, dn_end = (x.contiguous() for x in grads)
    q, k, v, i, f, C0, n0, m0 = arguments
    known, config = Kept(*kept), MLSTMConfig.of_numbers(settings)
    sizes = sizes_of(q, v, runs is not None, config, cut)
    inputs = Inputs(q, k, v, *known[:3], C0, n0, m0, runs)
    gates = Gates(i, f, known.sum_high, known.sum_low, known.max_log_weight)
    di, df = i.new_empty(0), f.new_empty(0)
    with on_device_of(dh):
        of_ends = dC_end, dn_end
        dh_h, dh_max, dC_end_max, dn_last = run_denominator_grads(known, dh, of_ends, sizes)
        rows = Rows(dh, known.den, dh_h, dh_max, known.m)
        ends = dC_end, dC_end_max, dn_last
        states = known.states
        again = queries_and_keys and states is None
        state_grads, dC0, dn0, found_states = run_state_grads(
            inputs, gates, rows, ends, again, sizes, config
        )
        states, parts = states or found_states, (queries_and_keys, values)
        shared = (inputs, gates, rows, states, state_grads)
        (dq, dk, dv), found = run_token_grads(*shared, parts, sizes, config)
        if queries_and_keys:
            di, df = run_gate_grads(inputs, gates, rows.m, found, sizes)
    of_states = [dC0.new_empty(0), dn0.new_empty(0)]
    if start:
        of_states = of_the_start(known.centre, dC0, dn0)
    return [dq, dk, dv, di, df, *of_states]


def of_the_start(centre: Tensor, dC0: Tensor, dn0: Tensor) -> list[Tensor]:
    """Return the gradients of C0 and n0, from those of the C of the centred values and of n0."""
    # That C is C0 - n0 centreᵀ, so n0 has a part in it.
    by_group = dC0.unflatten(1, (centre.shape[1], -1)) * centre[:, :, None, None]
    return [dC0, dn0 - by_group.sum(-1).flatten(1, 2)]


def run_denominator_grads(
    kept: Kept, dh: Tensor, ends: tuple[Tensor, Tensor], sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dh . h and the largest |dh| of each token, both (B, H, T).

    The gradient of a denominator is -(dh . h) over the denominator. ends: gradients of the final C
    and n. Of them returns, both (B, H, Dk), the largest |dC| of each row, and the gradient of the
    n that the last chunk leaves beside the C of the centred values.
    """
    dC_end, dn_end = ends
    dh_h, dh_max = torch.empty_like(kept.den), torch.empty_like(kept.den)
    dC_end_max, dn_last = torch.empty_like(dn_end), torch.empty_like(dn_end)
    heads = sizes.B * sizes.H
    mlstm_backward.denominator_kernel[(sizes.token_tiles + heads,)](
        h_centred_ptr=kept.h_centred, h_scale_ptr=kept.h_scale,
        dh_ptr=dh, dh_h_ptr=dh_h, dh_max_ptr=dh_max,
        centre_ptr=kept.centre, dC_end_ptr=dC_end, dn_end_ptr=dn_end,
        dC_end_max_ptr=dC_end_max, dn_last_ptr=dn_last,
        T=sizes.T, R=sizes.H // sizes.G, chunks=sizes.chunks, heads=heads,
        L=sizes.chunk, BT=sizes.tile, DK=sizes.Dk, DV=sizes.Dv,
        BV=sizes.Dv // kept.h_scale.shape[2],
    )  # fmt: skip
    return dh_h, dh_max, dC_end_max, dn_last


def run_state_grads(
    inputs: Inputs,
    gates: Gates,
    rows: Rows,
    ends: tuple[Tensor, Tensor, Tensor],
    again: bool,
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[States, Tensor, Tensor, States | None]:
    """Carry the gradient of the state, C of the centred values and n, back over the chunks.

    ends: the gradient of the final C, its bounds, and the gradient of the last n. again: whether to
    compute the states once more, in the same launch. Returns the gradients of the C and n that
    leave each chunk, of those that enter the first, and the states.
    """
    grads = States.empty(sizes, inputs.q.device)
    dC0, dn0 = torch.empty_like(inputs.C0), torch.empty_like(inputs.n0)
    dC_end, dC_end_max, dn_last = ends
    launch = config.state_grads
    super_chunks = sizes.super_chunks(launch)
    added: Ends | None = None
    read: dict[str, Any] = {
        "q_ptr": inputs.q, "dh_ptr": rows.dh, "den_ptr": rows.den,
        "dh_h_ptr": rows.dh_h, "dh_max_ptr": rows.dh_max,
        "sum_high_ptr": gates.sum_high, "sum_low_ptr": gates.sum_low,
        "m_ptr": rows.m, "m0_ptr": inputs.m0, "runs_ptr": inputs.runs,
        "T": sizes.T, "H": sizes.H, "chunks": sizes.chunks, "span": sizes.span(launch),
        **strides(q=inputs.q), **sizes.head_settings(launch),
    }  # fmt: skip
    if super_chunks > 1:
        added = Ends.empty(sizes, launch, inputs.q.device)
        others = sizes.state_tiles(launch) * (super_chunks - 1)
        mlstm_backward.state_grad_end_kernel[(others,)](**read, **named_ends(added))
    states, state_ends, end_m = None, None, None
    if again:
        states = States.empty(sizes, inputs.q.device)
        if super_chunks > 1:
            state_ends, end_m = run_state_ends(inputs, gates, sizes, launch)
    of_states = what_states_read(inputs, gates, sizes, launch) | named_states(states, "")
    walks = sizes.state_tiles(launch) * super_chunks
    mlstm_backward.state_grad_kernel[(walks * (2 if again else 1),)](
        **(of_states | read), **named_ends(added, "d"), **named_ends(state_ends), end_m_ptr=end_m,
        C0_ptr=inputs.C0, C0_max_ptr=inputs.C0_max, n0_ptr=inputs.n0,
        dC_end_ptr=dC_end, dC_end_max_ptr=dC_end_max, dn_last_ptr=dn_last,
        **named_states(grads, "d"), dC0_ptr=dC0, dn0_ptr=dn0,
    )  # fmt: skip
    return grads, dC0, dn0, states


def run_token_grads(
    inputs: Inputs,
    gates: Gates,
    rows: Rows,
    states: States | None,
    state_grads: States,
    wanted: tuple[bool, bool],
    sizes: Sizes,
    config: MLSTMConfig,
) -> tuple[tuple[Tensor, Tensor, Tensor], GateParts]:
    """Return dq, dk (B, H, T, Dk) and dv (B, G, T, Dv), and the parts of the gates' gradients.

    wanted: whether dq, dk and the parts are, for which the states are needed, and whether dv is;
    what is not wanted is empty.
    """
    queries_and_keys, values = wanted
    H, G, chunks = sizes.H, sizes.G, sizes.chunks
    parts = GateParts.empty(sizes, rows.m.device)
    tiles = sizes.chunk // sizes.tile
    programs = tiles if values else 0  # of a chunk of a value head, as the kernel counts them
    if queries_and_keys:
        programs += (H // G) * (3 * tiles + 1)
    dq, dk = (contiguous_like(x, queries_and_keys) for x in (inputs.q, inputs.k))
    dv = contiguous_like(inputs.v, values)
    mlstm_backward.token_grad_kernel[(chunks * sizes.B * G * programs,)](
        q_ptr=inputs.q, k_ptr=inputs.k, v_ptr=inputs.v, centre_ptr=inputs.centre,
        dh_ptr=rows.dh, den_ptr=rows.den, dh_h_ptr=rows.dh_h,
        i_ptr=gates.i, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=rows.m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        **named_states(states, ""), **named_states(state_grads, "d"),
        dq_ptr=dq, dk_ptr=dk, dv_ptr=dv,
        **{f"{name}_ptr": x for name, x in parts._asdict().items()},
        T=sizes.T, H=H, R=H // G, chunks=chunks,
        QUERIES_AND_KEYS=queries_and_keys, VALUES=values,
        **strides(q=inputs.q, k=inputs.k, v=inputs.v),
        **sizes.token_settings(config.token_grads),
    )  # fmt: skip
    return (dq, dk, dv), parts


def named_states(states: States | None, prefix: str) -> dict[str, Tensor | None]:
    """Name states or their gradients as kernels do: C_ptr, C_scale_ptr and n_ptr."""
    C, scale, n = states or (None, None, None)
    return {f"{prefix}C_ptr": C, f"{prefix}C_scale_ptr": scale, f"{prefix}n_ptr": n}


def contiguous_like(x: Tensor, wanted: bool) -> Tensor:
    """Make room for the gradient of x; none if it is not wanted."""
    return x.new_empty(x.shape if wanted else 0)


def run_gate_grads(
    inputs: Inputs, gates: Gates, m: Tensor, parts: GateParts, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Return di and df (B, H, T)."""
    di, df = torch.empty_like(gates.i), torch.empty_like(gates.f)
    mlstm_backward.gate_grad_kernel[(sizes.token_tiles,)](
        f_ptr=gates.f, sum_high_ptr=gates.sum_high, sum_low_ptr=gates.sum_low,
        m_ptr=m, m0_ptr=inputs.m0, runs_ptr=inputs.runs,
        **{f"{name}_ptr": x for name, x in parts._asdict().items()},
        di_ptr=di, df_ptr=df, T=sizes.T, H=sizes.H, chunks=sizes.chunks,
        SEGMENTED=sizes.segmented, L=sizes.chunk, BT=sizes.tile,
    )  # fmt: skip
    return di, df

"""Backward kernels of the chunkwise mLSTM.

The gradients of the states come first, in reverse order; then those of all chunks at once, in one
launch, by programs of several roles. The gates' gradients come last. With weights w_ts of the pairs
and a_ts = w_ts / den_t, the gradient of log w_ts is a_ts (dh_t . v_s - dh_t . h_t) (docs/math.md,
"Gradients"). So dh is never divided, and never rounded: its weights are. The values, and so h, are
taken less their common component (docs/kernels.md).
The letters and names are those of `triton/common.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import (
    UNSPECIALISED,
    chunk_decay,
    chunk_log_f,
    chunk_tile_and_head,
    entering_stabiliser,
    finite,
    last_token,
    load_tile,
    read_weights,
    scale_below,
    tile_head_and_super_chunk,
    unit_chunk_and_head,
)
from xlstm_kernels.triton.mlstm_forward import walk
from xlstm_kernels.triton.mlstm_roles import (
    inverse_denominators,
    key_role,
    pair_role,
    pass_role,
    query_role,
    value_role,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def denominator_kernel(
    h_centred_ptr, h_scale_ptr, dh_ptr, dh_h_ptr, dh_max_ptr,
    centre_ptr, dC_end_ptr, dn_end_ptr, dC_end_max_ptr, dn_last_ptr, T, R, chunks, heads,
    L: tl.constexpr, BT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute what the walk back reads of each tile of tokens, and of each head's final state.

    Grid (chunks * heads * L / BT + heads), heads = B H.
    """
    TILES: tl.constexpr = L // BT
    program, tiles = tl.program_id(0), tl.num_programs(0) - heads
    if program >= tiles:
        bh = (program - tiles).to(tl.int64)
        prepare_end(centre_ptr, dC_end_ptr, dn_end_ptr, dC_end_max_ptr, dn_last_ptr, bh, R, DK, DV)
    else:
        c, bh = unit_chunk_and_head(program // TILES, tiles // TILES, chunks)
        t0 = c * L + program % TILES * BT
        sum_denominators(
            h_centred_ptr, h_scale_ptr, dh_ptr, dh_h_ptr, dh_max_ptr, bh, t0, T, BT, DV, BV
        )


@triton.jit
def sum_denominators(
    h_centred_ptr, h_scale_ptr, dh_ptr, dh_h_ptr, dh_max_ptr, bh, t0, T,
    BT: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute dh . h and the largest |dh| of each token of a tile, both (B, H, T).

    BV: features that have a scale of h in common.
    """
    t = t0 + tl.arange(0, BT)
    dh_h, dh_max = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    COLUMNS: tl.constexpr = min(32, BV)
    for part in range(DV // BV):
        scale = tl.load(h_scale_ptr + (bh * (DV // BV) + part) * T + t, mask=t < T, other=0.0)
        for d in range(part * BV, part * BV + BV, COLUMNS):
            dv = d + tl.arange(0, COLUMNS)
            h_centred = load_tile(h_centred_ptr + bh * T * DV, DV, t0, T, dv, BT).to(tl.float32)
            dh = load_tile(dh_ptr + bh * T * DV, DV, t0, T, dv, BT).to(tl.float32)
            dh_h += tl.sum(h_centred * dh, 1) * scale
            dh_max = tl.maximum(dh_max, tl.max(tl.abs(dh), 1))
    tl.store(dh_h_ptr + bh * T + t, dh_h, mask=t < T)
    tl.store(dh_max_ptr + bh * T + t, dh_max, mask=t < T)


@triton.jit
def prepare_end(
    centre_ptr, dC_end_ptr, dn_end_ptr, dC_end_max_ptr, dn_last_ptr, bh, R,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of a head's last n and the largest |dC| of each row, both (B H, DK).

    The final C is that of the centred values plus n centreᵀ, so n has a part in it.
    """
    ROWS: tl.constexpr = min(32, DK)  # a tile that takes no more registers than the tokens' tiles
    COLUMNS: tl.constexpr = min(16, DV)
    centre_ptr += (bh // R) * DV  # value heads of all rows
    dC_end_ptr += bh * DK * DV
    for first in range(0, DK, ROWS):
        dk = first + tl.arange(0, ROWS)
        dn, most = tl.load(dn_end_ptr + bh * DK + dk), tl.zeros((ROWS,), tl.float32)
        for d in range(0, DV, COLUMNS):
            dv = d + tl.arange(0, COLUMNS)
            dC = tl.load(dC_end_ptr + dk[:, None] * DV + dv[None, :])
            dn += tl.sum(dC * tl.load(centre_ptr + dv)[None, :], 1)
            most = tl.maximum(most, tl.max(tl.abs(dC), 1))
        tl.store(dn_last_ptr + bh * DK + dk, dn)
        tl.store(dC_end_max_ptr + bh * DK + dk, finite(most))


@triton.jit
def carry_back(
    dC, dn, bound, q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr, sum_high_ptr, sum_low_ptr,
    m_ptr, m0_ptr, runs_ptr, q_t, bh, b, c, dk, dv, T,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Carry a tile of dC, its dn and its bound back over chunk c."""
    m_in = entering_stabiliser(m_ptr, m0_ptr, bh, c, T, L)
    m_end = tl.load(m_ptr + bh * T + last_token(c, T, L))
    decay = chunk_decay(sum_high_ptr, sum_low_ptr, m_in, m_end, runs_ptr, bh, b, c, T, SEGMENTED, L)
    dC, dn, bound = dC * decay, dn * decay, bound * decay
    for a in tl.static_range(0, L, BT):
        t0 = c * L + a
        t = t0 + tl.arange(0, BT)
        read = read_weights(
            sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, t, T, SEGMENTED, L
        )
        read *= inverse_denominators(den_ptr, bh, t, T)
        dh = load_tile(dh_ptr + bh * T * DV, DV, t0, T, dv, BT).to(DOT)
        dh_h = tl.load(dh_h_ptr + bh * T + t, mask=t < T, other=0.0)
        dh_max = tl.load(dh_max_ptr + bh * T + t, mask=t < T, other=0.0)
        # The weight goes on q and not on dh, as in `carry`.
        q = load_tile(q_ptr, q_t, t0, T, dk, BT).to(tl.float32) * read[:, None]
        dC = tl.dot(tl.trans(q.to(DOT)), dh, dC, input_precision=PRECISION)
        dn -= tl.sum(q * dh_h[:, None], 0)
        bound += tl.sum(tl.abs(q) * dh_max[:, None], 0)
    return dC, dn, bound


@triton.jit(do_not_specialize=UNSPECIALISED)
def state_grad_end_kernel(
    q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr,
    runs_ptr, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr,
    q_b, q_h, q_t, T, H, chunks, span,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute a tile of what a super-chunk adds to the gradient of the state at its start.

    Grid (B H * (super-chunks - 1) * DV / BV * DK / BK): all super-chunks but the first.
    """
    others = tl.cdiv(chunks, span) - 1
    tile_k, tile_v, bh, u = tile_head_and_super_chunk(tl.program_id(0), DK // BK, DV // BV, others)
    b, h = bh // H, bh % H
    dk, dv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    q_ptr += b * q_b + h * q_h
    dC = tl.zeros((BK, BV), tl.float32)
    dn, bound = tl.zeros((BK,), tl.float32), tl.zeros((BK,), tl.float32)
    log_f = tl.full((), 0.0, tl.float64)
    first = (u + 1) * span
    end = tl.minimum(first + span, chunks)
    for c in range(end - 1, first - 1, -1):
        dC, dn, bound = carry_back(
            dC, dn, bound, q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr, sum_high_ptr, sum_low_ptr,
            m_ptr, m0_ptr, runs_ptr, q_t, bh, b, c, dk, dv, T,
            SEGMENTED, PRECISION, DOT, L, BT, DV,
        )  # fmt: skip
        log_f += chunk_log_f(sum_high_ptr, sum_low_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L)
    slot = bh * others + u
    tl.store(end_C_ptr + slot * DK * DV + dk[:, None] * DV + dv[None, :], dC)
    if tile_v == 0:
        tl.store(end_n_ptr + slot * DK + dk, dn)
        tl.store(end_bound_ptr + slot * DK + dk, bound)
    if (tile_k == 0) & (tile_v == 0):
        tl.store(end_log_f_ptr + slot, log_f)


@triton.jit
def join_ends_back(
    dC, dn, bound, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, m_ptr, m0_ptr,
    bh, u, dk, dv, T, chunks, span, L: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Carry a tile of dC, its dn and its bound from the row's end back to that of super-chunk u."""
    others = tl.cdiv(chunks, span) - 1
    for after in range(others, u, -1):
        first, slot = after * span, bh * others + after - 1
        m_in = entering_stabiliser(m_ptr, m0_ptr, bh, first, T, L)
        last = tl.minimum(first + span, chunks) - 1
        m_end = tl.load(m_ptr + bh * T + last_token(last, T, L))
        decay = tl.exp((tl.load(end_log_f_ptr + slot) + (m_in - m_end)).to(tl.float32))
        tile = slot * DK * DV + dk[:, None] * DV + dv[None, :]
        dC = dC * decay + tl.load(end_C_ptr + tile)
        dn = dn * decay + tl.load(end_n_ptr + slot * DK + dk)
        bound = bound * decay + tl.load(end_bound_ptr + slot * DK + dk)
    return dC, dn, bound


@triton.jit
def walk_back(
    program,
    q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr,
    runs_ptr, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr,
    dC_end_ptr, dC_end_max_ptr, dn_last_ptr, dC_ptr, dC_scale_ptr, dn_ptr, dC0_ptr, dn0_ptr,
    q_b, q_h, q_t, T, H, chunks, span,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry one tile of the memory's gradient back over the chunks of a super-chunk.

    Stores the gradient of the state that leaves each chunk, dC in units of dC_scale as
    `mlstm_forward.walk` keeps C; and of the state that enters the first one. The pointers of the
    ends of super-chunks are None if one is a whole row.
    """
    super_chunks = tl.cdiv(chunks, span)
    tile_k, tile_v, bh, u = tile_head_and_super_chunk(program, DK // BK, DV // BV, super_chunks)
    b, h = bh // H, bh % H
    dk, dv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    tile = dk[:, None] * DV + dv[None, :]
    q_ptr += b * q_b + h * q_h
    dC = tl.load(dC_end_ptr + bh * DK * DV + tile)
    dn = tl.load(dn_last_ptr + bh * DK + dk)
    bound = tl.load(dC_end_max_ptr + bh * DK + dk)
    if end_C_ptr is not None:
        dC, dn, bound = join_ends_back(
            dC, dn, bound, end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, m_ptr, m0_ptr,
            bh, u, dk, dv, T, chunks, span, L, DK, DV,
        )  # fmt: skip
    end = tl.minimum(u * span + span, chunks)
    for c in range(end - 1, u * span - 1, -1):
        slot = bh * chunks + c
        scale, inverse = scale_below(bound)
        kept = (dC * inverse[:, None]).to(dC_ptr.dtype.element_ty)
        tl.store(dC_ptr + slot * DK * DV + tile, kept)
        if tile_v == 0:
            tl.store(dC_scale_ptr + slot * DK + dk, scale)
            tl.store(dn_ptr + slot * DK + dk, dn)
        dC, dn, bound = carry_back(
            dC, dn, bound, q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr, sum_high_ptr, sum_low_ptr,
            m_ptr, m0_ptr, runs_ptr, q_t, bh, b, c, dk, dv, T,
            SEGMENTED, PRECISION, DOT, L, BT, DV,
        )  # fmt: skip
    if u == 0:
        tl.store(dC0_ptr + bh * DK * DV + tile, dC)
        if tile_v == 0:
            tl.store(dn0_ptr + bh * DK + dk, dn)


@triton.jit(do_not_specialize=UNSPECIALISED)
def state_grad_kernel(
    q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr,
    runs_ptr, end_dC_ptr, end_dn_ptr, end_dbound_ptr, end_dlog_f_ptr,
    dC_end_ptr, dC_end_max_ptr, dn_last_ptr, dC_ptr, dC_scale_ptr, dn_ptr, dC0_ptr, dn0_ptr,
    k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr, max_log_weight_ptr,
    end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr,
    C0_ptr, C0_max_ptr, n0_ptr, C_ptr, C_scale_ptr, n_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks, span,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry the memory's gradient back over the chunks; and the memory over them once more.

    Grid (B H * super-chunks * DV / BV * DK / BK); twice that for both, `walk_back` and
    `mlstm_forward.walk` in turns. Neither waits for the other. C_ptr is None where the forward pass
    kept the states, or nothing reads them.
    """
    program = tl.program_id(0)
    if C_ptr is None:
        walk_back(
            program, q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr, sum_high_ptr, sum_low_ptr,
            m_ptr, m0_ptr, runs_ptr, end_dC_ptr, end_dn_ptr, end_dbound_ptr, end_dlog_f_ptr,
            dC_end_ptr, dC_end_max_ptr, dn_last_ptr, dC_ptr, dC_scale_ptr, dn_ptr, dC0_ptr, dn0_ptr,
            q_b, q_h, q_t, T, H, chunks, span,
            SEGMENTED, PRECISION, DOT, L, BT, DK, DV, BK, BV,
        )  # fmt: skip
    else:
        if program % 2 == 0:
            walk_back(
                program // 2, q_ptr, dh_ptr, den_ptr, dh_h_ptr, dh_max_ptr,
                sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
                end_dC_ptr, end_dn_ptr, end_dbound_ptr, end_dlog_f_ptr,
                dC_end_ptr, dC_end_max_ptr, dn_last_ptr, dC_ptr, dC_scale_ptr, dn_ptr,
                dC0_ptr, dn0_ptr, q_b, q_h, q_t, T, H, chunks, span,
                SEGMENTED, PRECISION, DOT, L, BT, DK, DV, BK, BV,
            )  # fmt: skip
        else:
            walk(
                program // 2, k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr,
                sum_high_ptr, sum_low_ptr, max_log_weight_ptr, runs_ptr,
                end_C_ptr, end_n_ptr, end_bound_ptr, end_log_f_ptr, end_m_ptr,
                C0_ptr, C0_max_ptr, n0_ptr, m0_ptr, C_ptr, C_scale_ptr, n_ptr, None, None, None,
                k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks, span,
                SEGMENTED, PRECISION, DOT, L, BT, DK, DV, BK, BV,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def token_grad_kernel(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, dh_h_ptr,
    sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    C_ptr, C_scale_ptr, n_ptr, dC_ptr, dC_scale_ptr, dn_ptr, dq_ptr, dk_ptr, dv_ptr,
    d_read_ptr, d_write_ptr, d_earlier_ptr, d_keys_ptr, d_inside_ptr, d_pass_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    QUERIES_AND_KEYS: tl.constexpr, VALUES: tl.constexpr,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dv, and the parts of the gates' gradients, of all chunks at once.

    Grid: for each chunk and value head, L / BT programs of dv if VALUES; and for each of its R
    query heads, if QUERIES_AND_KEYS, L / BT each of dq, of dk and of pairs, and one of <C, dC>.
    """
    # Programs that read the same tokens and states are neighbours, so that the caches hold them.
    # Those with the most work come first: dv takes all heads of the group.
    TILES: tl.constexpr = L // BT
    of_values: tl.constexpr = TILES if VALUES else 0
    of_a_head: tl.constexpr = 3 * TILES + 1 if QUERIES_AND_KEYS else 0
    size = of_values + R * of_a_head
    c, bg = unit_chunk_and_head(tl.program_id(0) // size, tl.num_programs(0) // size, chunks)
    role = tl.program_id(0) % size
    G = H // R
    b, group = bg // G, bg % G
    v_ptr += b * v_b + group * v_h
    centre_ptr += bg * DV
    # Two conditions each: what is not asked for is not compiled, and its pointers may be None.
    if VALUES:  # noqa: SIM102
        if role < of_values:
            value_role(
                q_ptr + b * q_b, k_ptr + b * k_b, i_ptr, dh_ptr, den_ptr,
                sum_high_ptr, sum_low_ptr, m_ptr, runs_ptr, dC_ptr, dC_scale_ptr, dv_ptr,
                q_h, q_t, k_h, k_t, b, bg, b * H + group * R, group * R, c, role, T, R, chunks,
                SEGMENTED, PRECISION, DOT, L, BT, DK, DV, COLUMNS, DEPTH,
            )  # fmt: skip
    if QUERIES_AND_KEYS:  # noqa: SIM102
        if role >= of_values:
            h = group * R + (role - of_values) // of_a_head
            part = (role - of_values) % of_a_head
            bh = b * H + h
            q_ptr += b * q_b + h * q_h
            k_ptr += b * k_b + h * k_h
            if part < TILES:
                query_role(
                    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, dh_h_ptr,
                    sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
                    C_ptr, C_scale_ptr, n_ptr, dq_ptr, d_read_ptr,
                    q_t, k_t, v_t, b, bh, c, TILES - 1 - part, T, chunks,
                    SEGMENTED, PRECISION, DOT, L, BT, DK, DV, COLUMNS, DEPTH,
                )  # fmt: skip
            elif part < 2 * TILES:
                key_role(
                    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, dh_h_ptr,
                    sum_high_ptr, sum_low_ptr, m_ptr, runs_ptr,
                    dC_ptr, dC_scale_ptr, dn_ptr, dk_ptr, d_write_ptr,
                    q_t, k_t, v_t, b, bh, c, part - TILES, T, chunks,
                    SEGMENTED, PRECISION, DOT, L, BT, DK, DV, COLUMNS, DEPTH,
                )  # fmt: skip
            elif part < 3 * TILES:
                pair_role(
                    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, dh_h_ptr,
                    sum_high_ptr, sum_low_ptr, m_ptr, runs_ptr,
                    d_earlier_ptr, d_keys_ptr, d_inside_ptr,
                    q_t, k_t, v_t, b, bh, c, part - 2 * TILES, T,
                    SEGMENTED, PRECISION, DOT, L, BT, DK, DV, DEPTH,
                )  # fmt: skip
            else:
                pass_role(
                    C_ptr, C_scale_ptr, n_ptr, dC_ptr, dC_scale_ptr, dn_ptr, d_pass_ptr,
                    bh * chunks + c, DK, DV, DEPTH,
                )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def gate_grad_kernel(
    f_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    d_read_ptr, d_write_ptr, d_earlier_ptr, d_keys_ptr, d_inside_ptr, d_pass_ptr, di_ptr, df_ptr,
    T, H, chunks, SEGMENTED: tl.constexpr, L: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Add up di and df of a tile of a chunk. Grid (chunks * B H * L / BT)."""
    TILES: tl.constexpr = L // BT
    c, a, bh = chunk_tile_and_head(chunks, TILES)
    b = bh // H
    first = a * BT
    r, x = first + tl.arange(0, BT), tl.arange(0, L)  # gates of the tile, tokens of the chunk
    row, every = bh * T + c * L + r, bh * T + c * L + x
    inside, any_inside = c * L + r < T, c * L + x < T
    d_write = tl.load(d_write_ptr + every, mask=any_inside, other=0.0)
    d_read = tl.load(d_read_ptr + every, mask=any_inside, other=0.0)
    of_tile = any_inside & (x >= first) & (x < first + BT)
    d_read += tl.load(d_earlier_ptr + every, mask=of_tile, other=0.0)
    di = tl.load(d_write_ptr + row, mask=inside, other=0.0)
    for later in range(a, TILES):
        keys = d_keys_ptr + (bh * TILES + later) * T + c * L
        di += tl.load(keys + r, mask=inside, other=0.0)
        if later > a:
            up_to_tile = any_inside & (x < first + BT)
            d_write += tl.load(keys + x, mask=up_to_tile, other=0.0)
    # At gate r: keys written before r and read after the tile or the chunk; queries at r or later
    # that read what was written before the tile or the chunk; pairs inside the tile; and what
    # passes through the whole chunk.
    crossing = tl.where(x[None, :] < r[:, None], d_write[None, :], d_read[None, :])
    m_in = entering_stabiliser(m_ptr, m0_ptr, bh, c, T, L)
    m_end = tl.load(m_ptr + bh * T + last_token(c, T, L))
    decay = chunk_decay(sum_high_ptr, sum_low_ptr, m_in, m_end, runs_ptr, bh, b, c, T, SEGMENTED, L)
    d_log_f = tl.sum(crossing, 1) + tl.load(d_inside_ptr + row, mask=inside, other=0.0)
    d_log_f += decay * tl.load(d_pass_ptr + bh * chunks + c)
    f = tl.load(f_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(di_ptr + row, di, mask=inside)
    # The derivative of log sigmoid(f) is sigmoid(-f).
    tl.store(df_ptr + row, d_log_f / (1.0 + tl.exp(f)), mask=inside)

"""Backward kernels of the chunkwise mLSTM.

The gradients of the states come first, in reverse order; then those of all chunks at once. With
h = num / den: d_num = dh / den and d_den = -(d_num . h) (docs/math.md, "Gradients"). The values,
and so the h in d_den, are taken less their common component (docs/kernels.md).
The letters and names are those of `triton/common.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import (
    LENGTHS,
    chunk_and_head,
    load_centred,
    load_rows,
    pair_weights,
    state_weights,
    tile_and_head,
)


@triton.jit(do_not_specialize=LENGTHS)
def denominator_kernel(
    h_centred_ptr, dh_ptr, den_ptr, d_den_ptr, T, chunks,
    DOT: tl.constexpr, L: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Compute d_den (B, H, T), the gradient of the denominator. Grid (chunks * B H)."""
    c, bh = chunk_and_head(chunks)
    t, dv = c * L + tl.arange(0, L), tl.arange(0, DV)
    # d_num is rounded here as the products round it. The weighted sum of d_num . v + d_den over a
    # row is 0 only if both terms use the same d_num, and the gradient of the forget gate adds up
    # whatever is left of that sum.
    h_centred = load_rows(h_centred_ptr + bh * T * DV, DV, t, T, dv).to(tl.float32)
    d_num = load_numerator_gradient(dh_ptr, den_ptr, bh, t, T, dv, DV).to(DOT).to(tl.float32)
    tl.store(d_den_ptr + bh * T + t, -tl.sum(h_centred * d_num, 1), mask=t < T)


@triton.jit
def load_numerator_gradient(dh_ptr, den_ptr, bh, t, T, dv, DV: tl.constexpr):
    """Load dh and compute d_num = dh / den of the chunk's tokens, (L, BV) in float32."""
    den = tl.load(den_ptr + bh * T + t, mask=t < T, other=1.0)
    return load_rows(dh_ptr + bh * T * DV, DV, t, T, dv).to(tl.float32) / den[:, None]


@triton.jit(do_not_specialize=LENGTHS)
def state_grad_kernel(
    q_ptr, dh_ptr, den_ptr, d_den_ptr, i_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    dC_end_ptr, dn_end_ptr, dC_ptr, dn_ptr, dC0_ptr, dn0_ptr,
    q_b, q_h, q_t, T, H, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry one tile of the memory's gradient back over the chunks. Grid (B H * DV / BV * DK / BK).

    Stores the gradient of the state that leaves each chunk, and of the state that enters the first
    one.
    """
    tile_k, tile_v, bh = tile_and_head(DK // BK, DV // BV)
    b, h = bh // H, bh % H
    dk, dv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    tile = dk[:, None] * DV + dv[None, :]
    q_ptr += b * q_b + h * q_h
    dC = tl.load(dC_end_ptr + bh * DK * DV + tile)
    dn = tl.load(dn_end_ptr + bh * DK + dk)
    for back in range(chunks):
        c = chunks - 1 - back
        slot = bh * chunks + c
        tl.store(dC_ptr + slot * DK * DV + tile, dC.to(dC_ptr.dtype.element_ty))
        if tile_v == 0:
            tl.store(dn_ptr + slot * DK + dk, dn)
        t = c * L + tl.arange(0, L)
        read, _, decay = state_weights(
            sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L
        )
        d_num = load_numerator_gradient(dh_ptr, den_ptr, bh, t, T, dv, DV).to(
            dC_ptr.dtype.element_ty
        )
        d_den = tl.load(d_den_ptr + bh * T + t, mask=t < T, other=0.0)
        # On q and not on d_num, as in `state_kernel`.
        q = load_rows(q_ptr, q_t, t, T, dk).to(tl.float32) * read[:, None]
        dC = tl.dot(tl.trans(q.to(d_num.dtype)), d_num, dC * decay, input_precision=PRECISION)
        dn = dn * decay + tl.sum(q * d_den[:, None], 0)
    tl.store(dC0_ptr + bh * DK * DV + tile, dC)
    if tile_v == 0:
        tl.store(dn0_ptr + bh * DK + dk, dn)


@triton.jit(do_not_specialize=LENGTHS)
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, d_den_ptr,
    sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr, dC_ptr, dn_ptr, dk_ptr, d_write_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute dk of one chunk. Grid (chunks * B H).

    Also writes d_write (B, H, T), the gradient of the log-weight with which a token is written to
    the leaving state.
    """
    c, bh = chunk_and_head(chunks)
    b, h = bh // H, bh % H
    slot = bh * chunks + c
    t = c * L + tl.arange(0, L)
    inside = t < T
    dtype = dC_ptr.dtype.element_ty
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    d_den = tl.load(d_den_ptr + bh * T + t, mask=inside, other=0.0)
    # Tiles of pairs have keys as rows here, as dk has.
    d_weights = tl.zeros((L, L), tl.float32) + d_den[None, :]
    for d in range(0, DV, BV):
        dv = d + tl.arange(0, BV)
        d_num = load_numerator_gradient(dh_ptr, den_ptr, bh, t, T, dv, DV).to(dtype)
        v = load_centred(v_ptr, v_t, centre_ptr, t, T, dv).to(dtype)
        d_weights = tl.dot(v, tl.trans(d_num), d_weights, input_precision=PRECISION)
    d_scores = d_weights * pair_weights(
        sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L, True
    )
    d_scores = d_scores.to(dtype)
    _, write, _ = state_weights(
        sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L
    )
    d_write = tl.zeros((L,), tl.float32)
    for d in range(0, DK, BK):
        dk = d + tl.arange(0, BK)
        to_state = tl.zeros((L, BK), tl.float32)
        for j in range(0, DV, BV):
            dv = j + tl.arange(0, BV)
            dC = tl.load(dC_ptr + slot * DK * DV + dk[:, None] * DV + dv[None, :])
            v = load_centred(v_ptr, v_t, centre_ptr, t, T, dv).to(dtype)
            to_state = tl.dot(v, tl.trans(dC), to_state, input_precision=PRECISION)
        dn = tl.load(dn_ptr + slot * DK + dk)
        to_state = (to_state + dn[None, :]) * write[:, None]
        k = load_rows(k_ptr, k_t, t, T, dk).to(dtype)
        d_write += tl.sum(k.to(tl.float32) * to_state, 1)
        q = load_rows(q_ptr, q_t, t, T, dk).to(dtype)
        dkey = tl.dot(d_scores, q, to_state, input_precision=PRECISION)
        out = bh * T * DK + t[:, None].to(tl.int64) * DK + dk[None, :]
        tl.store(dk_ptr + out, dkey.to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(d_write_ptr + bh * T + t, d_write, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def query_gate_grad_kernel(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, f_ptr, dh_ptr, den_ptr, d_den_ptr,
    sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    C_ptr, n_ptr, dC_ptr, dn_ptr, d_write_ptr, dq_ptr, di_ptr, df_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute dq, di and df of one chunk. Grid (chunks * B H).

    Reads d_write, which `key_grad_kernel` wrote.
    """
    c, bh = chunk_and_head(chunks)
    b, h = bh // H, bh % H
    slot = bh * chunks + c
    offsets = tl.arange(0, L)
    t = c * L + offsets
    inside = t < T
    dtype = C_ptr.dtype.element_ty
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    scores = tl.zeros((L, L), tl.float32)
    for d in range(0, DK, BK):
        dk = d + tl.arange(0, BK)
        q = load_rows(q_ptr, q_t, t, T, dk).to(dtype)
        k = load_rows(k_ptr, k_t, t, T, dk).to(dtype)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    d_den = tl.load(d_den_ptr + bh * T + t, mask=inside, other=0.0)
    d_weights = tl.zeros((L, L), tl.float32) + d_den[:, None]
    for d in range(0, DV, BV):
        dv = d + tl.arange(0, BV)
        d_num = load_numerator_gradient(dh_ptr, den_ptr, bh, t, T, dv, DV).to(dtype)
        v = load_centred(v_ptr, v_t, centre_ptr, t, T, dv).to(dtype)
        d_weights = tl.dot(d_num, tl.trans(v), d_weights, input_precision=PRECISION)
    d_scores = d_weights * pair_weights(
        sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L, False
    )
    d_log = d_scores * scores  # gradient of D_ts, the log-weight of each pair
    d_scores = d_scores.to(dtype)
    # The gradient of log f_r is the sum of d_log over the pairs (s, t), s < r <= t, that cross r;
    # here those inside the chunk. No other pair enters, as it would in cumulative sums of q . dq -
    # k . dk: where the true sum is small, their rounding would remain.
    later = (offsets[:, None] <= offsets[None, :]).to(dtype)  # (r, t): 1 where t >= r
    before = offsets[None, :] < offsets[:, None]  # (r, s): s < r
    d_sums = tl.dot(later, d_log.to(dtype), input_precision=PRECISION)
    d_log_f = tl.sum(tl.where(before, d_sums, 0.0), 1)

    # The pairs that cross the border of the chunk: queries that read the entering state, keys
    # written to the leaving one.
    read, _, decay = state_weights(
        sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L
    )
    d_read = tl.zeros((L,), tl.float32)
    d_pass = tl.zeros((BK,), tl.float32)
    for d in range(0, DK, BK):
        dk = d + tl.arange(0, BK)
        from_state = tl.zeros((L, BK), tl.float32)
        for j in range(0, DV, BV):
            dv = j + tl.arange(0, BV)
            tile = slot * DK * DV + dk[:, None] * DV + dv[None, :]
            C, dC = tl.load(C_ptr + tile), tl.load(dC_ptr + tile)
            d_num = load_numerator_gradient(dh_ptr, den_ptr, bh, t, T, dv, DV).to(dtype)
            from_state = tl.dot(d_num, tl.trans(C), from_state, input_precision=PRECISION)
            d_pass += tl.sum(C.to(tl.float32) * dC.to(tl.float32), 1)
        n, dn = tl.load(n_ptr + slot * DK + dk), tl.load(dn_ptr + slot * DK + dk)
        d_pass += n * dn
        from_state = (from_state + d_den[:, None] * n[None, :]) * read[:, None]
        q = load_rows(q_ptr, q_t, t, T, dk).to(dtype)
        k = load_rows(k_ptr, k_t, t, T, dk).to(dtype)
        d_read += tl.sum(q.to(tl.float32) * from_state, 1)
        out = bh * T * DK + t[:, None].to(tl.int64) * DK + dk[None, :]
        dq = tl.dot(d_scores, k, from_state, input_precision=PRECISION)
        tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None])
    d_write = tl.load(d_write_ptr + bh * T + t, mask=inside, other=0.0)
    # At token r: keys written before r, queries that read at r or later, and what passes through
    # the whole chunk.
    crossing = tl.sum(tl.where(before, d_write[None, :], d_read[None, :]), 1)
    d_log_f += crossing + decay * tl.sum(d_pass, 0)
    f = tl.load(f_ptr + bh * T + t, mask=inside, other=0.0).to(tl.float32)
    tl.store(di_ptr + bh * T + t, tl.sum(d_log, 0) + d_write, mask=inside)
    # The derivative of log sigmoid(f) is sigmoid(-f).
    tl.store(df_ptr + bh * T + t, d_log_f / (1.0 + tl.exp(f)), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def value_grad_kernel(
    q_ptr, k_ptr, i_ptr, dh_ptr, den_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    dC_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute dv of one chunk and value head. Grid (chunks * B G, DV / BV).

    The program sums over the head's queries in a fixed order, so that no atomics are needed.
    """
    c, bg = chunk_and_head(chunks)
    tile_v = tl.program_id(1)
    G = H // R
    b = bg // G
    t = c * L + tl.arange(0, L)
    dv = tile_v * BV + tl.arange(0, BV)
    dtype = dC_ptr.dtype.element_ty
    total = tl.zeros((L, BV), tl.float32)
    for r in range(R):
        h = (bg % G) * R + r
        bh = b * H + h
        slot = bh * chunks + c
        scores = tl.zeros((L, L), tl.float32)  # keys as rows, as dv has
        to_state = tl.zeros((L, BV), tl.float32)
        for d in range(0, DK, BK):
            dk = d + tl.arange(0, BK)
            q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, dk).to(dtype)
            k = load_rows(k_ptr + b * k_b + h * k_h, k_t, t, T, dk).to(dtype)
            dC = tl.load(dC_ptr + slot * DK * DV + dk[:, None] * DV + dv[None, :])
            scores = tl.dot(k, tl.trans(q), scores, input_precision=PRECISION)
            to_state = tl.dot(k, dC, to_state, input_precision=PRECISION)
        _, write, _ = state_weights(
            sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L
        )
        weights = scores * pair_weights(
            sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L, True
        )
        d_num = load_numerator_gradient(dh_ptr, den_ptr, bh, t, T, dv, DV).to(dtype)
        total += tl.dot(
            weights.to(dtype), d_num, to_state * write[:, None], input_precision=PRECISION
        )
    out = dv_ptr + bg * T * DV + t[:, None].to(tl.int64) * DV + dv[None, :]
    tl.store(out, total.to(dv_ptr.dtype.element_ty), mask=(t < T)[:, None])

"""Roles of the programs of `token_grad_kernel`, which has what they share.

Each computes one tile of one gradient, whose rows are the rows of all its products.
The letters and names are those of `triton/common.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import (
    dot_state,
    last_token,
    load_centred,
    load_tile,
    pair_weights,
    read_weights,
    write_weights,
)


@triton.jit
def inverse_denominators(den_ptr, bh, t, T):
    """Load the denominators of the tokens t and invert them; 0 for tokens without any weight."""
    return 1.0 / tl.load(den_ptr + bh * T + t, mask=t < T, other=1.0)


@triton.jit
def query_role(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, dh_h_ptr,
    sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    C_ptr, C_scale_ptr, n_ptr, dq_ptr, d_read_ptr,
    q_t, k_t, v_t, b, bh, c, a, T, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries, and d_read.

    d_read (B, H, T) is the gradient of the log-weight with which a token reads the entering state.
    """
    BK: tl.constexpr = min(COLUMNS, DK)
    DEEP_V: tl.constexpr = min(DEPTH, DV)
    t0 = c * L + a * BT
    t = t0 + tl.arange(0, BT)
    slot = bh * chunks + c
    dh_h = tl.load(dh_h_ptr + bh * T + t, mask=t < T, other=0.0)
    read = read_weights(
        sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, t, T, SEGMENTED, L
    )
    inverse = inverse_denominators(den_ptr, bh, t, T)
    read *= inverse
    d_read = tl.zeros((BT,), tl.float32)
    for d in range(0, DK, BK):
        features = d + tl.arange(0, BK)
        dq = tl.zeros((BT, BK), tl.float32)
        for e in range(0, DV, DEEP_V):
            dv = e + tl.arange(0, DEEP_V)
            C = tl.load(C_ptr + slot * DK * DV + features[:, None] * DV + dv[None, :])
            dh = load_tile(dh_ptr + bh * T * DV, DV, t0, T, dv, BT).to(DOT)
            dq = dot_state(dh, tl.trans(C), dq, PRECISION)
        scale = tl.load(C_scale_ptr + slot * DK + features)
        n = tl.load(n_ptr + slot * DK + features)
        dq = (dq * scale[None, :] - dh_h[:, None] * n[None, :]) * read[:, None]
        q = load_tile(q_ptr, q_t, t0, T, features, BT).to(DOT)
        d_read += tl.sum(q.to(tl.float32) * dq, 1)
        for j in range(a + 1):
            s0 = c * L + j * BT
            s = s0 + tl.arange(0, BT)
            d_scores = tl.zeros((BT, BT), tl.float32) - dh_h[:, None]
            for e in range(0, DV, DEEP_V):
                dv = e + tl.arange(0, DEEP_V)
                dh = load_tile(dh_ptr + bh * T * DV, DV, t0, T, dv, BT).to(DOT)
                v = load_centred(v_ptr, v_t, centre_ptr, s0, T, dv, BT).to(DOT)
                d_scores = tl.dot(dh, tl.trans(v), d_scores, input_precision=PRECISION)
            d_scores *= pair_weights(
                sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, t, s, T, SEGMENTED, False
            )
            d_scores *= inverse[:, None]
            k = load_tile(k_ptr, k_t, s0, T, features, BT).to(DOT)
            dq = tl.dot(d_scores.to(DOT), k, dq, input_precision=PRECISION)
        out = bh * T * DK + t[:, None].to(tl.int64) * DK + features[None, :]
        tl.store(dq_ptr + out, dq.to(dq_ptr.dtype.element_ty), mask=(t < T)[:, None])
    tl.store(d_read_ptr + bh * T + t, d_read, mask=t < T)


@triton.jit
def pair_role(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, dh_h_ptr,
    sum_high_ptr, sum_low_ptr, m_ptr, runs_ptr, d_earlier_ptr, d_keys_ptr, d_inside_ptr,
    q_t, k_t, v_t, b, bh, c, a, T,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of the log-weights of a tile's queries, as `GateParts` describes."""
    # It computes the tiles of pairs of `query_role` again, which has no registers left for them.
    DEEP_K: tl.constexpr = min(DEPTH, DK)
    DEEP_V: tl.constexpr = min(DEPTH, DV)
    offsets = tl.arange(0, BT)
    t0 = c * L + a * BT
    t = t0 + offsets
    dh_h = tl.load(dh_h_ptr + bh * T + t, mask=t < T, other=0.0)
    inverse = inverse_denominators(den_ptr, bh, t, T)
    d_earlier = tl.zeros((BT,), tl.float32)
    for j in range(a + 1):
        s0 = c * L + j * BT
        s = s0 + offsets
        d_log = tl.zeros((BT, BT), tl.float32) - dh_h[:, None]
        for e in range(0, DV, DEEP_V):
            dv = e + tl.arange(0, DEEP_V)
            dh = load_tile(dh_ptr + bh * T * DV, DV, t0, T, dv, BT).to(DOT)
            v = load_centred(v_ptr, v_t, centre_ptr, s0, T, dv, BT).to(DOT)
            d_log = tl.dot(dh, tl.trans(v), d_log, input_precision=PRECISION)
        scores = tl.zeros((BT, BT), tl.float32)
        for d in range(0, DK, DEEP_K):
            dk = d + tl.arange(0, DEEP_K)
            q = load_tile(q_ptr, q_t, t0, T, dk, BT).to(DOT)
            k = load_tile(k_ptr, k_t, s0, T, dk, BT).to(DOT)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        # Gradient of D_ts, the log-weight of each pair.
        d_log *= scores * pair_weights(
            sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, t, s, T, SEGMENTED, False
        )
        d_log *= inverse[:, None]
        tl.store(d_keys_ptr + (bh * (L // BT) + a) * T + s, tl.sum(d_log, 0), mask=s < T)
        if j < a:
            d_earlier += tl.sum(d_log, 1)
        else:
            # The gradient of log f_r is the sum of d_log over the pairs (s, t), s < r <= t, that
            # cross r; here those inside the tile. No other pair enters, as it would in cumulative
            # sums of q . dq - k . dk: where the true sum is small, their rounding would remain.
            later = (offsets[:, None] <= offsets[None, :]).to(DOT)  # (r, t): 1 where t >= r
            before = offsets[None, :] < offsets[:, None]  # (r, s): s < r
            d_sums = tl.dot(later, d_log.to(DOT), input_precision=PRECISION)
            d_inside = tl.sum(tl.where(before, d_sums, 0.0), 1)
            tl.store(d_inside_ptr + bh * T + t, d_inside, mask=t < T)
    tl.store(d_earlier_ptr + bh * T + t, d_earlier, mask=t < T)


@triton.jit
def key_role(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, dh_ptr, den_ptr, dh_h_ptr,
    sum_high_ptr, sum_low_ptr, m_ptr, runs_ptr,
    dC_ptr, dC_scale_ptr, dn_ptr, dk_ptr, d_write_ptr,
    q_t, k_t, v_t, b, bh, c, j, T, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute dk of a tile of keys, and d_write.

    d_write (B, H, T) is the gradient of the log-weight with which a token is written to the leaving
    state.
    """
    BK: tl.constexpr = min(COLUMNS, DK)
    DEEP_V: tl.constexpr = min(DEPTH, DV)
    s0 = c * L + j * BT
    s = s0 + tl.arange(0, BT)
    slot = bh * chunks + c
    m_end = tl.load(m_ptr + bh * T + last_token(c, T, L))
    write = write_weights(
        sum_high_ptr, sum_low_ptr, i_ptr, m_end, runs_ptr, bh, b, c, s, T, SEGMENTED, L
    )
    d_write = tl.zeros((BT,), tl.float32)
    for d in range(0, DK, BK):
        features = d + tl.arange(0, BK)
        dk = tl.zeros((BT, BK), tl.float32)
        for e in range(0, DV, DEEP_V):
            dv = e + tl.arange(0, DEEP_V)
            dC = tl.load(dC_ptr + slot * DK * DV + features[:, None] * DV + dv[None, :])
            v = load_centred(v_ptr, v_t, centre_ptr, s0, T, dv, BT).to(DOT)
            dk = dot_state(v, tl.trans(dC), dk, PRECISION)
        scale = tl.load(dC_scale_ptr + slot * DK + features)
        dn = tl.load(dn_ptr + slot * DK + features)
        dk = (dk * scale[None, :] + dn[None, :]) * write[:, None]
        k = load_tile(k_ptr, k_t, s0, T, features, BT).to(DOT)
        d_write += tl.sum(k.to(tl.float32) * dk, 1)
        for a in range(j, L // BT):
            t0 = c * L + a * BT
            t = t0 + tl.arange(0, BT)
            dh_h = tl.load(dh_h_ptr + bh * T + t, mask=t < T, other=0.0)
            # Tiles of pairs have keys as rows here, as dk has.
            d_scores = tl.zeros((BT, BT), tl.float32) - dh_h[None, :]
            for e in range(0, DV, DEEP_V):
                dv = e + tl.arange(0, DEEP_V)
                dh = load_tile(dh_ptr + bh * T * DV, DV, t0, T, dv, BT).to(DOT)
                v = load_centred(v_ptr, v_t, centre_ptr, s0, T, dv, BT).to(DOT)
                d_scores = tl.dot(v, tl.trans(dh), d_scores, input_precision=PRECISION)
            d_scores *= pair_weights(
                sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, t, s, T, SEGMENTED, True
            )
            d_scores *= inverse_denominators(den_ptr, bh, t, T)[None, :]
            q = load_tile(q_ptr, q_t, t0, T, features, BT).to(DOT)
            dk = tl.dot(d_scores.to(DOT), q, dk, input_precision=PRECISION)
        out = bh * T * DK + s[:, None].to(tl.int64) * DK + features[None, :]
        tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=(s < T)[:, None])
    tl.store(d_write_ptr + bh * T + s, d_write, mask=s < T)


@triton.jit
def value_role(
    q_ptr, k_ptr, i_ptr, dh_ptr, den_ptr, sum_high_ptr, sum_low_ptr, m_ptr, runs_ptr,
    dC_ptr, dC_scale_ptr, dv_ptr, q_h, q_t, k_h, k_t, b, bg, first_bh, first_h, c, j, T, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute dv of a tile of keys and one value head.

    Sums over the group's query heads, from the first one, in a fixed order: no atomics are needed.
    """
    BV: tl.constexpr = min(COLUMNS, DV)
    DEEP_K: tl.constexpr = min(DEPTH, DK)
    s0 = c * L + j * BT
    s = s0 + tl.arange(0, BT)
    for e in range(0, DV, BV):
        dv = e + tl.arange(0, BV)
        total = tl.zeros((BT, BV), tl.float32)
        for r in range(R):
            bh = first_bh + r
            q_of_head = q_ptr + (first_h + r) * q_h
            k_of_head = k_ptr + (first_h + r) * k_h
            m_end = tl.load(m_ptr + bh * T + last_token(c, T, L))
            write = write_weights(
                sum_high_ptr, sum_low_ptr, i_ptr, m_end, runs_ptr, bh, b, c, s, T, SEGMENTED, L
            )
            for d in range(0, DK, DEEP_K):
                dk = d + tl.arange(0, DEEP_K)
                # The weight on k and not on the product, which would take another tile of sums.
                scale = tl.load(dC_scale_ptr + (bh * chunks + c) * DK + dk)
                k = load_tile(k_of_head, k_t, s0, T, dk, BT).to(tl.float32) * write[:, None]
                k = (k * scale[None, :]).to(DOT)
                tile = (bh * chunks + c) * DK * DV + dk[:, None] * DV + dv[None, :]
                # No gate's gradient is a small difference of dv: the digits of DOT are enough.
                dC = tl.load(dC_ptr + tile).to(DOT)
                total = tl.dot(k, dC, total, input_precision=PRECISION)
            for a in range(j, L // BT):
                t0 = c * L + a * BT
                t = t0 + tl.arange(0, BT)
                scores = tl.zeros((BT, BT), tl.float32)  # keys as rows, as dv has
                for d in range(0, DK, DEEP_K):
                    dk = d + tl.arange(0, DEEP_K)
                    q = load_tile(q_of_head, q_t, t0, T, dk, BT).to(DOT)
                    k = load_tile(k_of_head, k_t, s0, T, dk, BT).to(DOT)
                    scores = tl.dot(k, tl.trans(q), scores, input_precision=PRECISION)
                weights = scores * pair_weights(
                    sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, t, s, T,
                    SEGMENTED, True,
                )  # fmt: skip
                dh = load_tile(dh_ptr + bh * T * DV, DV, t0, T, dv, BT).to(DOT)
                weights *= inverse_denominators(den_ptr, bh, t, T)[None, :]
                total = tl.dot(weights.to(DOT), dh, total, input_precision=PRECISION)
        out = dv_ptr + bg * T * DV + s[:, None].to(tl.int64) * DV + dv[None, :]
        tl.store(out, total.to(dv_ptr.dtype.element_ty), mask=(s < T)[:, None])


@triton.jit
def pass_role(
    C_ptr, C_scale_ptr, n_ptr, dC_ptr, dC_scale_ptr, dn_ptr, d_pass_ptr, slot,
    DK: tl.constexpr, DV: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Compute <C, dC> + <n, dn> of a chunk: the state that enters it, the gradient that leaves."""
    BK: tl.constexpr = min(DEPTH, DK)
    BV: tl.constexpr = min(DEPTH, DV)
    total = tl.zeros((BK,), tl.float32)
    for d in range(0, DK, BK):
        dk = d + tl.arange(0, BK)
        rows = tl.zeros((BK,), tl.float32)
        for e in range(0, DV, BV):
            tile = slot * DK * DV + dk[:, None] * DV + (e + tl.arange(0, BV))[None, :]
            C, dC = tl.load(C_ptr + tile), tl.load(dC_ptr + tile)
            rows += tl.sum(C.to(tl.float32) * dC.to(tl.float32), 1)
        row = slot * DK + dk
        total += rows * tl.load(C_scale_ptr + row) * tl.load(dC_scale_ptr + row)
        total += tl.load(n_ptr + row) * tl.load(dn_ptr + row)
    tl.store(d_pass_ptr + slot, tl.sum(total, 0))

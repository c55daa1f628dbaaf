"""Forward kernels of the chunkwise mLSTM.

The states come first, chunk after chunk; then the outputs of all chunks at once (docs/kernels.md).
The letters and names are those of `triton/common.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import (
    LENGTHS,
    LOG_ZERO,
    chunk_and_head,
    load_centred,
    load_rows,
    load_runs,
    pair_weights,
    state_weights,
    tile_and_head,
)


@triton.jit(do_not_specialize=LENGTHS)
def state_kernel(
    k_ptr, v_ptr, centre_ptr, i_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr, runs_ptr,
    C0_ptr, n0_ptr, m0_ptr, C_ptr, n_ptr, m_ptr, C_end_ptr, n_end_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry one (BK, BV) tile of the memory C over all chunks. Grid (B H * DV / BV * DK / BK).

    Stores the state as it enters each chunk and as it leaves the last one. The first program of a
    head also writes the stabiliser m (B, H, T) of every token.
    """
    tile_k, tile_v, bh = tile_and_head(DK // BK, DV // BV)
    b, h = bh // H, bh % H
    dk, dv = tile_k * BK + tl.arange(0, BK), tile_v * BV + tl.arange(0, BV)
    tile = dk[:, None] * DV + dv[None, :]
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    centre = tl.load(centre_ptr + dv)
    n = tl.load(n0_ptr + bh * DK + dk)
    C = tl.load(C0_ptr + bh * DK * DV + tile) - n[:, None] * centre[None, :]
    m = tl.load(m0_ptr + bh)
    for c in range(chunks):
        slot = bh * chunks + c
        tl.store(C_ptr + slot * DK * DV + tile, C.to(C_ptr.dtype.element_ty))
        if tile_v == 0:
            tl.store(n_ptr + slot * DK + dk, n)
        t = c * L + tl.arange(0, L)
        inside = t < T
        row, end = bh * T + t, bh * T + tl.minimum(c * L + L, T) - 1
        sum_high = tl.load(sum_high_ptr + row, mask=inside, other=0.0)
        sum_low = tl.load(sum_low_ptr + row, mask=inside, other=0.0)
        i = tl.load(i_ptr + row, mask=inside, other=LOG_ZERO).to(tl.float32)
        high_end, low_end = tl.load(sum_high_ptr + end), tl.load(sum_low_ptr + end)
        reads, writes, passes = inside, inside, T > 0
        if SEGMENTED:
            run, entering, leaving = load_runs(runs_ptr, b, c, t, T, L)
            reads, writes, passes = run == entering, run == leaving, entering == leaving
        if (tile_k == 0) & (tile_v == 0):
            max_log_weight = tl.load(max_log_weight_ptr + row, mask=inside, other=LOG_ZERO)
            tl.store(
                m_ptr + row,
                tl.maximum(max_log_weight, tl.where(reads, sum_high + m, LOG_ZERO)),
                mask=inside,
            )
        max_of_chunk = tl.load(max_log_weight_ptr + end)
        m_end = tl.maximum(max_of_chunk, tl.where(passes, high_end + m, LOG_ZERO))
        # As `state_weights` does, which reads the m of every token: only this loop knows them yet.
        log_write = ((high_end - sum_high) + (i - m_end)) + (low_end - sum_low)
        write = tl.exp(tl.where(writes, log_write, LOG_ZERO))
        decay = tl.exp(tl.where(passes, (high_end + (m - m_end)) + low_end, LOG_ZERO))
        v = load_centred(v_ptr, v_t, centre_ptr, t, T, dv).to(C_ptr.dtype.element_ty)
        # The weight goes on k and not on v: features are positive, and the rounding of the weighted
        # ones averages out in q . k. On v it put df in bfloat16 over its bound.
        key = load_rows(k_ptr, k_t, t, T, dk).to(tl.float32) * write[:, None]
        C = tl.dot(tl.trans(key.to(v.dtype)), v, C * decay, input_precision=PRECISION)
        n = n * decay + tl.sum(key, 0)
        m = m_end
    # Inside the loop C is that of the centred values; C + n centreᵀ is that of the values
    # themselves.
    tl.store(C_end_ptr + bh * DK * DV + tile, C + n[:, None] * centre[None, :])
    if tile_v == 0:
        tl.store(n_end_ptr + bh * DK + dk, n)


# T is left to Triton, which compiles for lengths divisible by 16 and for others. Without that, the
# kernel takes 135 registers on Hopper at D = 128, and an SM holds one program in place of two.
@triton.jit(do_not_specialize=("chunks",))
def output_kernel(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    C_ptr, n_ptr, h_ptr, h_centred_ptr, den_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute h and its denominator for one chunk. Grid (chunks * B H, DV / BV).

    Reads the state that enters the chunk and the chunk's own tokens. Also writes `h_centred`, which
    is h less the common component of the values, unless its pointer is None (nothing requires
    gradients).
    """
    c, bh = chunk_and_head(chunks)
    tile_v = tl.program_id(1)
    b, h = bh // H, bh % H
    slot = bh * chunks + c
    t = c * L + tl.arange(0, L)
    dv = tile_v * BV + tl.arange(0, BV)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    scores = tl.zeros((L, L), tl.float32)
    num = tl.zeros((L, BV), tl.float32)
    den = tl.zeros((L,), tl.float32)
    for d in range(0, DK, BK):
        dk = d + tl.arange(0, BK)
        q = load_rows(q_ptr, q_t, t, T, dk).to(C_ptr.dtype.element_ty)
        k = load_rows(k_ptr, k_t, t, T, dk).to(C_ptr.dtype.element_ty)
        C = tl.load(C_ptr + slot * DK * DV + dk[:, None] * DV + dv[None, :])
        n = tl.load(n_ptr + slot * DK + dk)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        num = tl.dot(q, C, num, input_precision=PRECISION)
        den += tl.sum(q.to(tl.float32) * n[None, :], 1)
    read, _, _ = state_weights(
        sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L
    )
    weights = scores * pair_weights(
        sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L, False
    )
    v = load_centred(v_ptr, v_t, centre_ptr, t, T, dv).to(C_ptr.dtype.element_ty)
    num = tl.dot(weights.to(v.dtype), v, num * read[:, None], input_precision=PRECISION)
    den = den * read + tl.sum(weights, 1)
    # A denominator of exactly 0 is stored as inf, which makes h and its gradient 0.
    den = tl.where(den == 0.0, float("inf"), den)
    h_centred = num / den[:, None]
    has_weight = tl.where(den == float("inf"), 0.0, 1.0)
    output = has_weight[:, None] * tl.load(centre_ptr + dv)[None, :] + h_centred
    out = bh * T * DV + t[:, None].to(tl.int64) * DV + dv[None, :]
    tl.store(h_ptr + out, output.to(h_ptr.dtype.element_ty), mask=(t < T)[:, None])
    if h_centred_ptr is not None:
        tl.store(
            h_centred_ptr + out,
            h_centred.to(h_centred_ptr.dtype.element_ty),
            mask=(t < T)[:, None],
        )
    if tile_v == 0:
        tl.store(den_ptr + bh * T + t, den, mask=t < T)

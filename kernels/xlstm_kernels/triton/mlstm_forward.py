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
    chunk_decay,
    chunk_tile_and_head,
    dot_state,
    last_token,
    load_centred,
    load_run,
    load_tile,
    pair_weights,
    read_weights,
    run_before,
    scale_below,
    tile_and_head,
    write_weights,
)


@triton.jit(do_not_specialize=LENGTHS)
def state_kernel(
    k_ptr, v_ptr, centre_ptr, v_max_ptr, i_ptr, sum_high_ptr, sum_low_ptr, max_log_weight_ptr,
    runs_ptr, C0_ptr, C0_max_ptr, n0_ptr, m0_ptr, C_ptr, C_scale_ptr, n_ptr, m_ptr,
    C_end_ptr, n_end_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry one (BK, BV) tile of the memory C over all chunks. Grid (B H * DV / BV * DK / BK).

    Stores the state as it enters each chunk and as it leaves the last one. C is kept in units of
    C_scale (B H, chunks, Dk), in which float16 holds it. The first program of a head also writes
    the stabiliser m (B, H, T) of every token.
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
    # The programs of a head agree on the scale of a row, because each carries the same bound of
    # |C|: what the row would be if no terms cancelled.
    v_max_ptr += (b * (H // R) + h // R) * chunks
    bound = tl.load(C0_max_ptr + bh * DK + dk)
    m = tl.load(m0_ptr + bh)
    for c in range(chunks):
        slot, end = bh * chunks + c, last_token(c, T, L)
        scale, inverse = scale_below(bound)
        tl.store(C_ptr + slot * DK * DV + tile, (C * inverse[:, None]).to(C_ptr.dtype.element_ty))
        if tile_v == 0:
            tl.store(C_scale_ptr + slot * DK + dk, scale)
            tl.store(n_ptr + slot * DK + dk, n)
        max_of_chunk = tl.load(max_log_weight_ptr + bh * T + end)
        v_max = tl.load(v_max_ptr + c)
        passes = T > 0
        if SEGMENTED:
            passes = run_before(runs_ptr, b, c, T, L) == tl.load(runs_ptr + b * T + end)
        high_end = tl.load(sum_high_ptr + bh * T + end)
        m_end = tl.maximum(max_of_chunk, tl.where(passes, high_end + m, LOG_ZERO))
        decay = chunk_decay(
            sum_high_ptr, sum_low_ptr, m, m_end, runs_ptr, bh, b, c, T, SEGMENTED, L
        )
        C, n, bound = C * decay, n * decay, bound * decay
        if (tile_k == 0) & (tile_v == 0):
            t = c * L + tl.arange(0, L)
            row, reads = bh * T + t, t < T
            if SEGMENTED:
                reads = load_run(runs_ptr, b, t, T) == run_before(runs_ptr, b, c, T, L)
            max_log_weight = tl.load(max_log_weight_ptr + row, mask=t < T, other=LOG_ZERO)
            sum_high = tl.load(sum_high_ptr + row, mask=t < T, other=0.0)
            read_max = tl.where(reads, sum_high + m, LOG_ZERO)
            tl.store(m_ptr + row, tl.maximum(max_log_weight, read_max), mask=t < T)
        for a in tl.static_range(0, L, BT):
            t0 = c * L + a
            t = t0 + tl.arange(0, BT)
            write = write_weights(
                sum_high_ptr, sum_low_ptr, i_ptr, m_end, runs_ptr, bh, b, c, t, T, SEGMENTED, L
            )
            v = load_centred(v_ptr, v_t, centre_ptr, t0, T, dv, BT).to(DOT)
            # The weight goes on k and not on v: features are positive, and the rounding of the
            # weighted ones averages out in q . k. On v it put df in bfloat16 over its bound.
            key = load_tile(k_ptr, k_t, t0, T, dk, BT).to(tl.float32) * write[:, None]
            C = tl.dot(tl.trans(key.to(DOT)), v, C, input_precision=PRECISION)
            n += tl.sum(key, 0)
            bound += tl.sum(tl.abs(key), 0) * v_max
        m = m_end
    # Inside the loop C is that of the centred values; C + n centreᵀ is that of the values
    # themselves.
    tl.store(C_end_ptr + bh * DK * DV + tile, C + n[:, None] * centre[None, :])
    if tile_v == 0:
        tl.store(n_end_ptr + bh * DK + dk, n)


@triton.jit(do_not_specialize=LENGTHS)
def output_kernel(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr,
    C_ptr, C_scale_ptr, n_ptr, h_ptr, h_centred_ptr, h_scale_ptr, den_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, BT: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Compute h and its denominator for a tile of a chunk. Grid (chunks * B H * L / BT, DV / BV).

    Reads the state that enters the chunk, and the chunk's tokens up to the tile's end. Also writes
    `h_centred`, which is h less the common component of the values, in units of `h_scale`
    (B, H, DV / BV, T), unless their pointers are None (nothing requires gradients).
    """
    c, a, bh = chunk_tile_and_head(chunks, L // BT)
    tile_v = tl.program_id(1)
    b, h = bh // H, bh % H
    slot = bh * chunks + c
    t0 = c * L + a * BT
    t = t0 + tl.arange(0, BT)
    dv = tile_v * BV + tl.arange(0, BV)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + (h // R) * v_h
    centre_ptr += (b * (H // R) + h // R) * DV
    num = tl.zeros((BT, BV), tl.float32)
    den = tl.zeros((BT,), tl.float32)
    for d in range(0, DK, BK):
        dk = d + tl.arange(0, BK)
        q = load_tile(q_ptr, q_t, t0, T, dk, BT).to(tl.float32)
        C = tl.load(C_ptr + slot * DK * DV + dk[:, None] * DV + dv[None, :])
        scale = tl.load(C_scale_ptr + slot * DK + dk)
        n = tl.load(n_ptr + slot * DK + dk)
        num = dot_state((q * scale[None, :]).to(DOT), C, num, PRECISION)
        den += tl.sum(q * n[None, :], 1)
    read = read_weights(
        sum_high_ptr, sum_low_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, t, T, SEGMENTED, L
    )
    num, den = num * read[:, None], den * read
    for j in range(a + 1):
        s0 = c * L + j * BT
        s = s0 + tl.arange(0, BT)
        scores = tl.zeros((BT, BT), tl.float32)
        for d in range(0, DK, BK):
            dk = d + tl.arange(0, BK)
            q = load_tile(q_ptr, q_t, t0, T, dk, BT).to(DOT)
            k = load_tile(k_ptr, k_t, s0, T, dk, BT).to(DOT)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        weights = scores * pair_weights(
            sum_high_ptr, sum_low_ptr, i_ptr, m_ptr, runs_ptr, bh, b, t, s, T, SEGMENTED, False
        )
        v = load_centred(v_ptr, v_t, centre_ptr, s0, T, dv, BT).to(DOT)
        num = tl.dot(weights.to(DOT), v, num, input_precision=PRECISION)
        den += tl.sum(weights, 1)
    # A denominator of exactly 0 is stored as inf, which makes h and its gradient 0.
    den = tl.where(den == 0.0, float("inf"), den)
    h_centred = num / den[:, None]
    has_weight = tl.where(den == float("inf"), 0.0, 1.0)
    output = has_weight[:, None] * tl.load(centre_ptr + dv)[None, :] + h_centred
    out = bh * T * DV + t[:, None].to(tl.int64) * DV + dv[None, :]
    tl.store(h_ptr + out, output.to(h_ptr.dtype.element_ty), mask=(t < T)[:, None])
    if h_centred_ptr is not None:
        scale, inverse = scale_below(tl.max(tl.abs(h_centred), 1))
        h_centred = (h_centred * inverse[:, None]).to(h_centred_ptr.dtype.element_ty)
        tl.store(h_centred_ptr + out, h_centred, mask=(t < T)[:, None])
        tl.store(h_scale_ptr + (bh * (DV // BV) + tile_v) * T + t, scale, mask=t < T)
    if tile_v == 0:
        tl.store(den_ptr + bh * T + t, den, mask=t < T)

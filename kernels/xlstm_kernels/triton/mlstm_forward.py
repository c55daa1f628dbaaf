"""Forward kernels of the chunkwise mLSTM: states entering the chunks (in order), then outputs (all chunks at once)."""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are what Triton makes of a launch: pointers, numbers, tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import (
    LOG_ZERO,
    load_centred,
    load_rows,
    load_runs,
    pair_weights,
    place,
    state_weights,
)


@triton.jit
def state_kernel(
    k_ptr, v_ptr, centre_ptr, i_ptr, hi_ptr, lo_ptr, peak_ptr, runs_ptr, C0_ptr, n0_ptr, m0_ptr,
    C_ptr, n_ptr, m_ptr, C_end_ptr, n_end_ptr,
    k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Carry one (BK, BV) tile of the memory over all chunks; stores it as it enters each, and as it leaves the last.

    The first program of a head also writes the stabiliser m (B, H, T) of every token. Grid (B H * DV / BV * DK / BK).
    """
    ik, iv = tl.program_id(0) % (DK // BK), tl.program_id(0) // (DK // BK) % (DV // BV)
    bh = (tl.program_id(0) // (DK // BK * (DV // BV))).to(tl.int64)
    b, h = bh // H, bh % H
    dk, dv = ik * BK + tl.arange(0, BK), iv * BV + tl.arange(0, BV)
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
        if iv == 0:
            tl.store(n_ptr + slot * DK + dk, n)
        t = c * L + tl.arange(0, L)
        inside = t < T
        at, end = bh * T + t, bh * T + tl.minimum(c * L + L, T) - 1
        hi = tl.load(hi_ptr + at, mask=inside, other=0.0)
        lo = tl.load(lo_ptr + at, mask=inside, other=0.0)
        i = tl.load(i_ptr + at, mask=inside, other=LOG_ZERO).to(tl.float32)
        hi_end, lo_end = tl.load(hi_ptr + end), tl.load(lo_ptr + end)
        reads, writes, passes = inside, inside, T > 0
        if SEGMENTED:
            run, entering, leaving = load_runs(runs_ptr, b, c, t, T, L)
            reads, writes, passes = run == entering, run == leaving, entering == leaving
        if (ik == 0) & (iv == 0):
            peak = tl.load(peak_ptr + at, mask=inside, other=LOG_ZERO)
            tl.store(m_ptr + at, tl.maximum(peak, tl.where(reads, hi + m, LOG_ZERO)), mask=inside)
        m_end = tl.maximum(tl.load(peak_ptr + end), tl.where(passes, hi_end + m, LOG_ZERO))
        write = tl.exp(tl.where(writes, ((hi_end - hi) + (i - m_end)) + (lo_end - lo), LOG_ZERO))
        decay = tl.exp(tl.where(passes, (hi_end + (m - m_end)) + lo_end, LOG_ZERO))
        v = load_centred(v_ptr, v_t, centre_ptr, t, T, dv).to(C_ptr.dtype.element_ty)
        key = load_rows(k_ptr, k_t, t, T, dk).to(tl.float32) * write[:, None]
        C = tl.dot(tl.trans(key.to(v.dtype)), v, C * decay, input_precision=PRECISION)
        n = n * decay + tl.sum(key, 0)
        m = m_end
    tl.store(C_end_ptr + bh * DK * DV + tile, C + n[:, None] * centre[None, :])
    if iv == 0:
        tl.store(n_end_ptr + bh * DK + dk, n)


@triton.jit
def output_kernel(
    q_ptr, k_ptr, v_ptr, centre_ptr, i_ptr, hi_ptr, lo_ptr, m_ptr, m0_ptr, runs_ptr, C_ptr, n_ptr, h_ptr, ratio_ptr,
    den_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, T, H, R, chunks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, L: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """h, h less the common component, and the denominator of one chunk: of the state that enters and its own tokens.

    A denominator of exactly 0 is stored as inf, which makes h and its gradient 0. Grid (B H, chunks, DV / BV).
    """
    c, bh = place()
    iv = tl.program_id(2)
    b, h = bh // H, bh % H
    slot = bh * chunks + c
    t = c * L + tl.arange(0, L)
    dv = iv * BV + tl.arange(0, BV)
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
        hi_ptr, lo_ptr, i_ptr, m_ptr, m0_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L
    )
    weights = scores * pair_weights(
        hi_ptr, lo_ptr, i_ptr, m_ptr, runs_ptr, bh, b, c, T, SEGMENTED, L
    )
    v = load_centred(v_ptr, v_t, centre_ptr, t, T, dv).to(C_ptr.dtype.element_ty)
    num = tl.dot(weights.to(v.dtype), v, num * read[:, None], input_precision=PRECISION)
    den = den * read + tl.sum(weights, 1)
    den = tl.where(den == 0.0, float("inf"), den)
    ratio = num / den[:, None]
    h = tl.where(den == float("inf"), 0.0, 1.0)[:, None] * tl.load(centre_ptr + dv)[None, :] + ratio
    out = bh * T * DV + t[:, None].to(tl.int64) * DV + dv[None, :]
    tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask=(t < T)[:, None])
    if ratio_ptr is not None:
        tl.store(ratio_ptr + out, ratio.to(ratio_ptr.dtype.element_ty), mask=(t < T)[:, None])
    if iv == 0:
        tl.store(den_ptr + bh * T + t, den, mask=t < T)

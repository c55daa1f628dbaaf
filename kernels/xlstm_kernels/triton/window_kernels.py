"""Kernels of sliding-window attention with sinks: forward, and gradients without atomics.

Block c of queries sees the blocks of keys from first_block(c) to c, its band, where window, document and the sinks
inside the band are a mask; and the sinks before the band, which are of one document only, that of the band's first
token. Those sinks' gradients are written per block of queries and summed in order afterwards.
Letters: L tokens of a block, R = H / G. Softmax in float32.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are what Triton makes of a launch: pointers, numbers, tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import load_rows, place

NEGATIVE = tl.constexpr(
    -1e30
)  # score of a masked pair: finite, so that rows that see nothing yet stay numbers


@triton.jit
def first_block(c, window, L: tl.constexpr):
    """First block of keys in the band of block c of queries."""
    return tl.maximum(c * L - window + 1, 0) // L


@triton.jit
def load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED: tl.constexpr):
    """Document of each token and the document's first token; one document from token 0 if there are no segments."""
    run = t * 0
    start = t * 0
    if SEGMENTED:
        run = tl.load(runs_ptr + b * T + t, mask=t < T, other=-1)
        start = tl.load(starts_ptr + b * T + t, mask=t < T, other=0)
    return run, start


@triton.jit
def load_sinks(
    runs_ptr,
    starts_ptr,
    b,
    c,
    T,
    window,
    sinks,
    SEGMENTED: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
):
    """Positions of the sinks before the band, whether each counts, and their document."""
    band = first_block(c, window, L) * L
    run, start = load_documents(runs_ptr, starts_ptr, b, band, T, SEGMENTED)
    at = start + tl.arange(0, S)
    return at, (tl.arange(0, S) < sinks) & (at < band), run


@triton.jit
def in_band(t, s, run_t, run_s, start_s, T, window, sinks):
    """Whether queries t see keys s of their band, (L, L)."""
    near = (t[:, None] - s[None, :] < window) | (s - start_s < sinks)[None, :]
    return near & (t[:, None] >= s[None, :]) & (run_t[:, None] == run_s[None, :]) & (t < T)[:, None]


@triton.jit
def window_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, out_ptr, log_total_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Attend from one block of queries; also stores the logarithm of each softmax's sum. Grid (B H, blocks)."""
    c, bh = place()
    b, h = bh // H, bh % H
    d = tl.arange(0, D)
    t = c * L + tl.arange(0, L)
    k_ptr += b * k_b + (h // R) * k_h
    v_ptr += b * v_b + (h // R) * v_h
    q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
    run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
    peak = tl.full((L,), NEGATIVE, tl.float32)
    total = tl.zeros((L,), tl.float32)
    out = tl.zeros((L, D), tl.float32)
    if S > 0:
        at, counts, sink_run = load_sinks(
            runs_ptr, starts_ptr, b, c, T, window, sinks, SEGMENTED, L, S
        )
        sink_k = load_rows(k_ptr, k_t, at, T, d).to(DOT)
        sink_v = load_rows(v_ptr, v_t, at, T, d).to(DOT)
        sink_visible = (run == sink_run)[:, None] & counts[None, :]
        sink_scores = tl.where(
            sink_visible, tl.dot(q, tl.trans(sink_k), input_precision=PRECISION) * scale, NEGATIVE
        )
        peak = tl.max(sink_scores, 1)
        sink_weights = tl.where(sink_visible, tl.exp(sink_scores - peak[:, None]), 0.0)
        total = tl.sum(sink_weights, 1)
        out = tl.dot(sink_weights.to(DOT), sink_v, out, input_precision=PRECISION)
    for j in range(first_block(c, window, L), c + 1):
        s = j * L + tl.arange(0, L)
        run_s, start_s = load_documents(runs_ptr, starts_ptr, b, s, T, SEGMENTED)
        k = load_rows(k_ptr, k_t, s, T, d).to(DOT)
        v = load_rows(v_ptr, v_t, s, T, d).to(DOT)
        visible = in_band(t, s, run, run_s, start_s, T, window, sinks)
        scores = tl.where(
            visible, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, NEGATIVE
        )
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.where(visible, tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(DOT), v, out * shrink[:, None], input_precision=PRECISION)
        peak = higher
    total = tl.where(t < T, total, 1.0)  # every token of the row sees itself
    at = out_ptr + bh * T * D + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])
    tl.store(log_total_ptr + bh * T + t, peak + tl.log(total), mask=t < T)


@triton.jit
def mean_grad_kernel(out_ptr, dout_ptr, mean_ptr, T, L: tl.constexpr, D: tl.constexpr):
    """Mean gradient of a query's weights, sum(out * dout), (B, H, T). Grid (B H, blocks)."""
    c, bh = place()
    t, d = c * L + tl.arange(0, L), tl.arange(0, D)
    out = load_rows(out_ptr + bh * T * D, D, t, T, d).to(tl.float32)
    dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(tl.float32)
    tl.store(mean_ptr + bh * T + t, tl.sum(out * dout, 1), mask=t < T)


@triton.jit
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, log_total_ptr, mean_ptr, dq_ptr, sink_dk_ptr, sink_dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and its part of the gradients of the sinks before its band. Grid (B H, blocks)."""
    c, bh = place()
    b, h = bh // H, bh % H
    d = tl.arange(0, D)
    t = c * L + tl.arange(0, L)
    k_ptr += b * k_b + (h // R) * k_h
    v_ptr += b * v_b + (h // R) * v_h
    q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
    dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(DOT)
    log_total = tl.load(log_total_ptr + bh * T + t, mask=t < T, other=0.0)
    mean = tl.load(mean_ptr + bh * T + t, mask=t < T, other=0.0)
    run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
    dq = tl.zeros((L, D), tl.float32)
    if S > 0:
        at, counts, sink_run = load_sinks(
            runs_ptr, starts_ptr, b, c, T, window, sinks, SEGMENTED, L, S
        )
        sink_k = load_rows(k_ptr, k_t, at, T, d).to(DOT)
        sink_v = load_rows(v_ptr, v_t, at, T, d).to(DOT)
        sink_visible = (run == sink_run)[:, None] & counts[None, :] & (t < T)[:, None]
        sink_scores = (
            tl.dot(q, tl.trans(sink_k), input_precision=PRECISION) * scale - log_total[:, None]
        )
        sink_weights = tl.exp(tl.where(sink_visible, sink_scores, NEGATIVE))
        sink_d_weights = tl.dot(dout, tl.trans(sink_v), input_precision=PRECISION)
        sink_d_scores = (sink_weights * (sink_d_weights - mean[:, None]) * scale).to(DOT)
        dq = tl.dot(sink_d_scores, sink_k, dq, input_precision=PRECISION)
        row = tl.arange(0, S)
        part = ((bh * blocks + c) * sinks + row)[:, None] * D + d[None, :]
        kept = (row < sinks)[:, None]
        tl.store(
            sink_dk_ptr + part,
            tl.dot(tl.trans(sink_d_scores), q, input_precision=PRECISION),
            mask=kept,
        )
        tl.store(
            sink_dv_ptr + part,
            tl.dot(tl.trans(sink_weights.to(DOT)), dout, input_precision=PRECISION),
            mask=kept,
        )
    for j in range(first_block(c, window, L), c + 1):
        s = j * L + tl.arange(0, L)
        run_s, start_s = load_documents(runs_ptr, starts_ptr, b, s, T, SEGMENTED)
        k = load_rows(k_ptr, k_t, s, T, d).to(DOT)
        v = load_rows(v_ptr, v_t, s, T, d).to(DOT)
        visible = in_band(t, s, run, run_s, start_s, T, window, sinks)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - log_total[:, None]
        weights = tl.exp(tl.where(visible, scores, NEGATIVE))
        d_weights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None]) * scale
        dq = tl.dot(d_scores.to(DOT), k, dq, input_precision=PRECISION)
    at = dq_ptr + bh * T * D + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def key_value_grad_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, log_total_ptr, mean_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """dk, dv of one block of keys from the queries whose band holds it, over the group's heads. Grid (B G, blocks)."""
    j, bg = place()
    G = H // R
    b = bg // G
    d = tl.arange(0, D)
    s = j * L + tl.arange(0, L)
    k = load_rows(k_ptr + b * k_b + (bg % G) * k_h, k_t, s, T, d).to(DOT)
    v = load_rows(v_ptr + b * v_b + (bg % G) * v_h, v_t, s, T, d).to(DOT)
    run_s, start_s = load_documents(runs_ptr, starts_ptr, b, s, T, SEGMENTED)
    dk = tl.zeros((L, D), tl.float32)
    dv = tl.zeros((L, D), tl.float32)
    end = tl.minimum((j * L + L + window - 2) // L + 1, blocks)
    readers = end - j
    for step in range(readers * R):
        h = (bg % G) * R + step // readers
        bh = b * H + h
        t = (j + step % readers) * L + tl.arange(0, L)
        q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
        dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(DOT)
        log_total = tl.load(log_total_ptr + bh * T + t, mask=t < T, other=0.0)
        mean = tl.load(mean_ptr + bh * T + t, mask=t < T, other=0.0)
        run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
        visible = in_band(t, s, run, run_s, start_s, T, window, sinks)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - log_total[:, None]
        weights = tl.exp(tl.where(visible, scores, NEGATIVE))
        dv = tl.dot(tl.trans(weights.to(DOT)), dout, dv, input_precision=PRECISION)
        d_weights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean[:, None]) * scale
        dk = tl.dot(tl.trans(d_scores.to(DOT)), q, dk, input_precision=PRECISION)
    at = bg * T * D + s[:, None].to(tl.int64) * D + d[None, :]
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=(s < T)[:, None])
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=(s < T)[:, None])


@triton.jit
def sink_grad_kernel(
    runs_ptr, starts_ptr, sink_dk_ptr, sink_dv_ptr, dk_ptr, dv_ptr, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, L: tl.constexpr, D: tl.constexpr, S: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add what later queries give to a document's sinks: the sum, in order, over the blocks that read them.

    Those blocks are neighbours; the program of the first of them does the work. Grid (B G, blocks).
    """
    c, bg = place()
    G = H // R
    b = bg // G
    row, d = tl.arange(0, S), tl.arange(0, D)
    run, start = load_documents(
        runs_ptr, starts_ptr, b, first_block(c, window, L) * L, T, SEGMENTED
    )
    band_before = first_block(tl.maximum(c - 1, 0), window, L) * L
    run_before, _start_before = load_documents(runs_ptr, starts_ptr, b, band_before, T, SEGMENTED)
    dk = tl.zeros((S, D), tl.float32)
    dv = tl.zeros((S, D), tl.float32)
    ours = (c == 0) | (run != run_before)
    more = ours
    first = c
    while more & (first < blocks):
        block = first + tl.arange(0, AT_ONCE)
        band = first_block(block, window, L) * L
        run_block, _start_block = load_documents(runs_ptr, starts_ptr, b, band, T, SEGMENTED)
        same = (block < blocks) & (run_block == run)
        kept = same[:, None, None] & (row < sinks)[None, :, None]
        for r in range(R):
            bh = b * H + (bg % G) * R + r
            part = ((bh * blocks + block)[:, None] * sinks + row[None, :])[:, :, None] * D + d[
                None, None, :
            ]
            dk += tl.sum(tl.load(sink_dk_ptr + part, mask=kept, other=0.0), 0)
            dv += tl.sum(tl.load(sink_dv_ptr + part, mask=kept, other=0.0), 0)
        first += AT_ONCE
        more = tl.sum(same.to(tl.int32), 0) == AT_ONCE
    at = start + row
    run_at, _start_at = load_documents(runs_ptr, starts_ptr, b, at, T, SEGMENTED)
    written = (row < tl.where(ours, sinks, 0)) & (at < T) & (run_at == run)
    out = bg * T * D + at[:, None].to(tl.int64) * D + d[None, :]
    old_k = tl.load(dk_ptr + out, mask=written[:, None], other=0.0).to(tl.float32)
    old_v = tl.load(dv_ptr + out, mask=written[:, None], other=0.0).to(tl.float32)
    tl.store(dk_ptr + out, (old_k + dk).to(dk_ptr.dtype.element_ty), mask=written[:, None])
    tl.store(dv_ptr + out, (old_v + dv).to(dv_ptr.dtype.element_ty), mask=written[:, None])

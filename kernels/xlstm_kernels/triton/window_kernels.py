"""Kernels of sliding-window attention with sinks: forward, and gradients without atomics.

Block c of queries sees two kinds of keys. Its band, the blocks of keys from first_block(c) to c:
there, window, document and sinks are a mask. And the sinks before the band: they belong to one
document only, that of the band's first token. The gradients of those sinks are written per block
of queries and summed in order afterwards. The softmax is in float32.
The letters and names are those of `triton/common.py`; S: rows of a tile of sinks.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import LENGTHS, chunk_and_head, load_rows

# Score of a masked pair. Finite, so that exp(score - maximum) of a row that sees nothing yet is a
# number and not nan.
NEGATIVE = tl.constexpr(-1e30)


@triton.jit
def first_block(c, window, L: tl.constexpr):
    """Return the first block of keys in the band of block c of queries."""
    return tl.maximum(c * L - window + 1, 0) // L


@triton.jit
def load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED: tl.constexpr):
    """Load the document of each token and the position of that document's first token.

    Without segments there is one document, which starts at token 0.
    """
    run = t * 0
    start = t * 0
    if SEGMENTED:
        run = tl.load(runs_ptr + b * T + t, mask=t < T, other=-1)
        start = tl.load(starts_ptr + b * T + t, mask=t < T, other=0)
    return run, start


@triton.jit
def load_sinks(
    runs_ptr, starts_ptr, b, c, T, window, sinks,
    SEGMENTED: tl.constexpr, L: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Load the sinks before the band of block c: positions, whether each is used, their document.

    The tile has S rows. A row is used if it is a sink and lies before the band.
    """
    band = first_block(c, window, L) * L
    run, start = load_documents(runs_ptr, starts_ptr, b, band, T, SEGMENTED)
    sink_t = start + tl.arange(0, S)
    return sink_t, (tl.arange(0, S) < sinks) & (sink_t < band), run


@triton.jit
def in_band(t, s, run_t, run_s, start_s, T, window, sinks):
    """Say whether queries t see keys s of their band.

    What belongs to queries is a column and what belongs to keys a row, (L, 1) and (1, L), or the
    other way round; so is the result, (L, L).
    """
    near = (t - s < window) | (s - start_s < sinks)
    return near & (t >= s) & (run_t == run_s) & (t < T)


@triton.jit(do_not_specialize=LENGTHS)
def window_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, out_ptr, logsumexp_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Attend from one block of queries. Grid (blocks * B H).

    Also stores the logsumexp of each query's scores, for the backward pass.
    """
    c, bh = chunk_and_head(blocks)
    b, h = bh // H, bh % H
    d = tl.arange(0, D)
    t = c * L + tl.arange(0, L)
    k_ptr += b * k_b + (h // R) * k_h
    v_ptr += b * v_b + (h // R) * v_h
    q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
    run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
    row_max = tl.full((L,), NEGATIVE, tl.float32)
    total = tl.zeros((L,), tl.float32)
    out = tl.zeros((L, D), tl.float32)
    if S > 0:
        sink_t, sink_used, sink_run = load_sinks(
            runs_ptr, starts_ptr, b, c, T, window, sinks, SEGMENTED, L, S
        )
        sink_k = load_rows(k_ptr, k_t, sink_t, T, d).to(DOT)
        sink_v = load_rows(v_ptr, v_t, sink_t, T, d).to(DOT)
        sink_visible = (run == sink_run)[:, None] & sink_used[None, :]
        sink_products = tl.dot(q, tl.trans(sink_k), input_precision=PRECISION)
        sink_scores = tl.where(sink_visible, sink_products * scale, NEGATIVE)
        row_max = tl.max(sink_scores, 1)
        sink_weights = tl.where(sink_visible, tl.exp(sink_scores - row_max[:, None]), 0.0)
        total = tl.sum(sink_weights, 1)
        out = tl.dot(sink_weights.to(DOT), sink_v, out, input_precision=PRECISION)
    # The running softmax of flash attention: `rescale` brings what is summed to the new maximum.
    for j in range(first_block(c, window, L), c + 1):
        s = j * L + tl.arange(0, L)
        run_s, start_s = load_documents(runs_ptr, starts_ptr, b, s, T, SEGMENTED)
        k = load_rows(k_ptr, k_t, s, T, d).to(DOT)
        v = load_rows(v_ptr, v_t, s, T, d).to(DOT)
        visible = in_band(
            t[:, None], s[None, :], run[:, None], run_s[None, :], start_s[None, :],
            T, window, sinks,
        )  # fmt: skip
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(visible, products * scale, NEGATIVE)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.where(visible, tl.exp(scores - new_max[:, None]), 0.0)
        rescale = tl.exp(row_max - new_max)
        total = total * rescale + tl.sum(weights, 1)
        out = tl.dot(weights.to(DOT), v, out * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    # A token of the row sees itself, so its total is not 0; the tokens after the end see nothing.
    total = tl.where(t < T, total, 1.0)
    tile = out_ptr + bh * T * D + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(tile, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])
    tl.store(logsumexp_ptr + bh * T + t, row_max + tl.log(total), mask=t < T)


@triton.jit(do_not_specialize=LENGTHS)
def mean_grad_kernel(
    out_ptr, dout_ptr, mean_grad_ptr, T, blocks, L: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Compute the mean gradient of each query's weights (B, H, T). Grid (blocks * B H).

    The mean is over the keys, weighted by the softmax: sum(out * dout).
    """
    c, bh = chunk_and_head(blocks)
    t, d = c * L + tl.arange(0, L), tl.arange(0, D)
    out = load_rows(out_ptr + bh * T * D, D, t, T, d).to(tl.float32)
    dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(tl.float32)
    tl.store(mean_grad_ptr + bh * T + t, tl.sum(out * dout, 1), mask=t < T)


@triton.jit(do_not_specialize=LENGTHS)
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr, dq_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Compute dq of one block of queries. Grid (blocks * B H)."""
    c, bh = chunk_and_head(blocks)
    b, h = bh // H, bh % H
    d = tl.arange(0, D)
    t = c * L + tl.arange(0, L)
    k_ptr += b * k_b + (h // R) * k_h
    v_ptr += b * v_b + (h // R) * v_h
    q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
    dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(DOT)
    logsumexp = tl.load(logsumexp_ptr + bh * T + t, mask=t < T, other=0.0)
    mean_grad = tl.load(mean_grad_ptr + bh * T + t, mask=t < T, other=0.0)
    run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
    dq = tl.zeros((L, D), tl.float32)
    if S > 0:
        sink_t, sink_used, sink_run = load_sinks(
            runs_ptr, starts_ptr, b, c, T, window, sinks, SEGMENTED, L, S
        )
        sink_k = load_rows(k_ptr, k_t, sink_t, T, d).to(DOT)
        sink_v = load_rows(v_ptr, v_t, sink_t, T, d).to(DOT)
        sink_visible = (run == sink_run)[:, None] & sink_used[None, :] & (t < T)[:, None]
        sink_products = tl.dot(q, tl.trans(sink_k), input_precision=PRECISION)
        sink_scores = sink_products * scale - logsumexp[:, None]
        sink_weights = tl.exp(tl.where(sink_visible, sink_scores, NEGATIVE))
        sink_d_weights = tl.dot(dout, tl.trans(sink_v), input_precision=PRECISION)
        sink_d_scores = (sink_weights * (sink_d_weights - mean_grad[:, None]) * scale).to(DOT)
        dq = tl.dot(sink_d_scores, sink_k, dq, input_precision=PRECISION)
    for j in range(first_block(c, window, L), c + 1):
        s = j * L + tl.arange(0, L)
        run_s, start_s = load_documents(runs_ptr, starts_ptr, b, s, T, SEGMENTED)
        k = load_rows(k_ptr, k_t, s, T, d).to(DOT)
        v = load_rows(v_ptr, v_t, s, T, d).to(DOT)
        visible = in_band(
            t[:, None], s[None, :], run[:, None], run_s[None, :], start_s[None, :],
            T, window, sinks,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - logsumexp[:, None]
        weights = tl.exp(tl.where(visible, scores, NEGATIVE))
        d_weights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean_grad[:, None]) * scale
        dq = tl.dot(d_scores.to(DOT), k, dq, input_precision=PRECISION)
    tile = dq_ptr + bh * T * D + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(tile, dq.to(dq_ptr.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def sink_part_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr,
    sink_dk_ptr, sink_dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Compute what one block of queries gives to the gradients of the sinks before its band.

    Grid (blocks * B H). The sinks are the rows of all tiles, as of their gradients: no product is
    transposed.
    """
    c, bh = chunk_and_head(blocks)
    b, h = bh // H, bh % H
    d = tl.arange(0, D)
    t = c * L + tl.arange(0, L)
    k_ptr += b * k_b + (h // R) * k_h
    v_ptr += b * v_b + (h // R) * v_h
    q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
    dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(DOT)
    logsumexp = tl.load(logsumexp_ptr + bh * T + t, mask=t < T, other=0.0)
    mean_grad = tl.load(mean_grad_ptr + bh * T + t, mask=t < T, other=0.0)
    run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
    sink_t, sink_used, sink_run = load_sinks(
        runs_ptr, starts_ptr, b, c, T, window, sinks, SEGMENTED, L, S
    )
    sink_k = load_rows(k_ptr, k_t, sink_t, T, d).to(DOT)
    sink_v = load_rows(v_ptr, v_t, sink_t, T, d).to(DOT)
    visible = sink_used[:, None] & (run == sink_run)[None, :] & (t < T)[None, :]
    scores = tl.dot(sink_k, tl.trans(q), input_precision=PRECISION) * scale - logsumexp[None, :]
    weights = tl.exp(tl.where(visible, scores, NEGATIVE))
    d_weights = tl.dot(sink_v, tl.trans(dout), input_precision=PRECISION)
    d_scores = weights * (d_weights - mean_grad[None, :]) * scale
    sink = tl.arange(0, S)
    part = ((bh * blocks + c) * sinks + sink)[:, None] * D + d[None, :]
    kept = (sink < sinks)[:, None]
    sink_dk = tl.dot(d_scores.to(DOT), q, input_precision=PRECISION)
    tl.store(sink_dk_ptr + part, sink_dk, mask=kept)
    sink_dv = tl.dot(weights.to(DOT), dout, input_precision=PRECISION)
    tl.store(sink_dv_ptr + part, sink_dv, mask=kept)


@triton.jit(do_not_specialize=LENGTHS)
def key_value_grad_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr,
    dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one block of keys and values. Grid (blocks * B G).

    Sums over the heads of the group and over the queries whose band holds the block.
    """
    j, bg = chunk_and_head(blocks)
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
    readers = end - j  # blocks of queries whose band holds this block of keys
    for step in range(readers * R):
        h = (bg % G) * R + step // readers
        bh = b * H + h
        t = (j + step % readers) * L + tl.arange(0, L)
        q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
        dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(DOT)
        logsumexp = tl.load(logsumexp_ptr + bh * T + t, mask=t < T, other=0.0)
        mean_grad = tl.load(mean_grad_ptr + bh * T + t, mask=t < T, other=0.0)
        run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
        # Keys are the rows of these tiles, as of dk and dv: no product is transposed.
        visible = in_band(
            t[None, :], s[:, None], run[None, :], run_s[:, None], start_s[:, None],
            T, window, sinks,
        )  # fmt: skip
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - logsumexp[None, :]
        weights = tl.exp(tl.where(visible, scores, NEGATIVE))
        dv = tl.dot(weights.to(DOT), dout, dv, input_precision=PRECISION)
        d_weights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        d_scores = weights * (d_weights - mean_grad[None, :]) * scale
        dk = tl.dot(d_scores.to(DOT), q, dk, input_precision=PRECISION)
    tile = bg * T * D + s[:, None].to(tl.int64) * D + d[None, :]
    tl.store(dk_ptr + tile, dk.to(dk_ptr.dtype.element_ty), mask=(s < T)[:, None])
    tl.store(dv_ptr + tile, dv.to(dv_ptr.dtype.element_ty), mask=(s < T)[:, None])


@triton.jit(do_not_specialize=LENGTHS)
def sink_grad_kernel(
    runs_ptr, starts_ptr, sink_dk_ptr, sink_dv_ptr, dk_ptr, dv_ptr, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the sinks of a document get from later queries. Grid (blocks * B G).

    The blocks of queries that read the sinks of one document from before their band are neighbours.
    The program of the first of them sums their parts in order, AT_ONCE blocks at a time.
    """
    c, bg = chunk_and_head(blocks)
    G = H // R
    b = bg // G
    sink, d = tl.arange(0, S), tl.arange(0, D)
    run, start = load_documents(
        runs_ptr, starts_ptr, b, first_block(c, window, L) * L, T, SEGMENTED
    )
    band_before = first_block(tl.maximum(c - 1, 0), window, L) * L
    run_before, _start_before = load_documents(runs_ptr, starts_ptr, b, band_before, T, SEGMENTED)
    dk = tl.zeros((S, D), tl.float32)
    dv = tl.zeros((S, D), tl.float32)
    is_first = (c == 0) | (run != run_before)
    searching = is_first
    next_block = c
    while searching & (next_block < blocks):
        block = next_block + tl.arange(0, AT_ONCE)
        band = first_block(block, window, L) * L
        run_block, _start_block = load_documents(runs_ptr, starts_ptr, b, band, T, SEGMENTED)
        same = (block < blocks) & (run_block == run)
        kept = same[:, None, None] & (sink < sinks)[None, :, None]
        for r in range(R):
            bh = b * H + (bg % G) * R + r
            first_sink = (bh * blocks + block)[:, None] * sinks
            part = (first_sink + sink[None, :])[:, :, None] * D + d[None, None, :]
            dk += tl.sum(tl.load(sink_dk_ptr + part, mask=kept, other=0.0), 0)
            dv += tl.sum(tl.load(sink_dv_ptr + part, mask=kept, other=0.0), 0)
        next_block += AT_ONCE
        searching = tl.sum(same.to(tl.int32), 0) == AT_ONCE
    sink_t = start + sink
    run_sink, _start_sink = load_documents(runs_ptr, starts_ptr, b, sink_t, T, SEGMENTED)
    written = (sink < tl.where(is_first, sinks, 0)) & (sink_t < T) & (run_sink == run)
    out = bg * T * D + sink_t[:, None].to(tl.int64) * D + d[None, :]
    old_k = tl.load(dk_ptr + out, mask=written[:, None], other=0.0).to(tl.float32)
    old_v = tl.load(dv_ptr + out, mask=written[:, None], other=0.0).to(tl.float32)
    tl.store(dk_ptr + out, (old_k + dk).to(dk_ptr.dtype.element_ty), mask=written[:, None])
    tl.store(dv_ptr + out, (old_v + dv).to(dv_ptr.dtype.element_ty), mask=written[:, None])

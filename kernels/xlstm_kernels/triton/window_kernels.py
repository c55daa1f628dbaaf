"""Kernels of sliding-window attention with sinks: forward, and gradients without atomics.

Block c of queries sees two kinds of keys. Its band, the blocks of keys from first_block(c) to c:
there, window, document and sinks are a mask, and blocks that all queries see whole are not masked.
And the sinks before the band: they belong to one document only, that of the band's first token;
`window_sinks.py` has their gradients. The softmax is in float32.
The letters and names are those of `triton/common.py`; S: rows of a tile of sinks.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

import triton
import triton.language as tl

from xlstm_kernels.triton.common import (
    UNSPECIALISED,
    bound,
    chunk_and_head,
    load_rows,
    through_bound,
)

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


@triton.jit
def band_of_block(starts_ptr, b, c, T, window, SEGMENTED: tl.constexpr, L: tl.constexpr):
    """Return the first block of keys that block c of queries sees, and the first interior one.

    Every query of block c sees every key of the blocks from the interior one on, before block c.
    """
    first = first_block(c, window, L)
    interior = tl.maximum(c * L + 2 * L - 1 - window, 0) // L
    if SEGMENTED:
        # The first query's document is the earliest one that is read, the last query's the only one
        # that all queries can share.
        starts_ptr += b * T
        first = tl.maximum(first, tl.load(starts_ptr + c * L) // L)
        last_start = tl.load(starts_ptr + tl.minimum(c * L + L, T) - 1)
        interior = tl.maximum(interior, (last_start + L - 1) // L)
    return first, tl.minimum(tl.maximum(interior, first), c)


@triton.jit
def edge_block(step, first, interior, c):
    """Return the block of keys of a step that masks: those before the interior, then block c."""
    return tl.where(step < interior - first, first + step, c)


@triton.jit
def attend_block(
    q, k_ptr, v_ptr, runs_ptr, starts_ptr, k_t, v_t, j, b, t, run, row_max, total, out,
    scale, T, window, sinks, MASKED: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Take block j of keys into the running softmax: `row_max`, `total` and `out`."""
    s, d = j * L + tl.arange(0, L), tl.arange(0, D)
    k = load_rows(k_ptr, k_t, s, T, d).to(DOT)
    v = load_rows(v_ptr, v_t, s, T, d).to(DOT)
    scores = bound(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, CAP)
    if MASKED:
        run_s, start_s = load_documents(runs_ptr, starts_ptr, b, s, T, SEGMENTED)
        visible = in_band(
            t[:, None], s[None, :], run[:, None], run_s[None, :], start_s[None, :],
            T, window, sinks,
        )  # fmt: skip
        scores = tl.where(visible, scores, NEGATIVE)
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp(scores - new_max[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    # The running softmax of flash attention: `rescale` brings what is summed to the new maximum.
    rescale = tl.exp(row_max - new_max)
    total = total * rescale + tl.sum(weights, 1)
    out = tl.dot(weights.to(DOT), v, out * rescale[:, None], input_precision=PRECISION)
    return new_max, total, out


@triton.jit(do_not_specialize=UNSPECIALISED)
def window_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, sink_logits_ptr, out_ptr, logsumexp_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Attend from one block of queries. Grid (blocks * B H).

    Also stores the logsumexp of each query's scores, for the backward pass. sink_logits_ptr (H): of
    each head the logit that is in the softmax's denominator alone; None where there is none.
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
        sink_scores = tl.where(sink_visible, bound(sink_products * scale, CAP), NEGATIVE)
        row_max = tl.max(sink_scores, 1)
        sink_weights = tl.where(sink_visible, tl.exp(sink_scores - row_max[:, None]), 0.0)
        total = tl.sum(sink_weights, 1)
        out = tl.dot(sink_weights.to(DOT), sink_v, out, input_precision=PRECISION)
    first, interior = band_of_block(starts_ptr, b, c, T, window, SEGMENTED, L)
    for step in range(0, interior - first + 1):
        j = edge_block(step, first, interior, c)
        row_max, total, out = attend_block(
            q, k_ptr, v_ptr, runs_ptr, starts_ptr, k_t, v_t, j, b, t, run, row_max, total, out,
            scale, T, window, sinks, True, SEGMENTED, PRECISION, DOT, L, D, CAP,
        )  # fmt: skip
    for j in range(interior, c):
        row_max, total, out = attend_block(
            q, k_ptr, v_ptr, runs_ptr, starts_ptr, k_t, v_t, j, b, t, run, row_max, total, out,
            scale, T, window, sinks, False, SEGMENTED, PRECISION, DOT, L, D, CAP,
        )  # fmt: skip
    if sink_logits_ptr is not None:
        extra = tl.load(sink_logits_ptr + h).to(tl.float32)
        new_max = tl.maximum(row_max, extra)
        rescale = tl.exp(row_max - new_max)
        total = total * rescale + tl.exp(extra - new_max)
        out = out * rescale[:, None]
        row_max = new_max
    # A token of the row sees itself, so its total is not 0; the tokens after the end see nothing.
    total = tl.where(t < T, total, 1.0)
    tile = out_ptr + bh * T * D + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(tile, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=(t < T)[:, None])
    tl.store(logsumexp_ptr + bh * T + t, row_max + tl.log(total), mask=t < T)


@triton.jit(do_not_specialize=UNSPECIALISED)
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


@triton.jit
def load_query_block(
    q_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr, q_b, q_h, q_t, b, h, H, t, T,
    DOT: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Load what the gradients read of queries t of head h: q, dout, logsumexp, mean gradient."""
    d, bh = tl.arange(0, D), b * H + h
    q = load_rows(q_ptr + b * q_b + h * q_h, q_t, t, T, d).to(DOT)
    dout = load_rows(dout_ptr + bh * T * D, D, t, T, d).to(DOT)
    logsumexp = tl.load(logsumexp_ptr + bh * T + t, mask=t < T, other=0.0)
    mean_grad = tl.load(mean_grad_ptr + bh * T + t, mask=t < T, other=0.0)
    return q, dout, logsumexp, mean_grad


@triton.jit
def query_grad_block(
    q, dout, k_ptr, v_ptr, runs_ptr, starts_ptr, k_t, v_t, j, b, t, run, logsumexp, mean_grad, dq,
    scale, T, window, sinks, MASKED: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, DOT: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Add to dq what comes from block j of keys."""
    s, d = j * L + tl.arange(0, L), tl.arange(0, D)
    k = load_rows(k_ptr, k_t, s, T, d).to(DOT)
    v = load_rows(v_ptr, v_t, s, T, d).to(DOT)
    bounded = bound(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, CAP)
    scores = bounded - logsumexp[:, None]
    if MASKED:
        run_s, start_s = load_documents(runs_ptr, starts_ptr, b, s, T, SEGMENTED)
        visible = in_band(
            t[:, None], s[None, :], run[:, None], run_s[None, :], start_s[None, :],
            T, window, sinks,
        )  # fmt: skip
        scores = tl.where(visible, scores, NEGATIVE)
    d_weights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    d_scores = tl.exp(scores) * (d_weights - mean_grad[:, None]) * scale
    d_scores = through_bound(d_scores, bounded, CAP)
    return tl.dot(d_scores.to(DOT), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=UNSPECIALISED)
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr, dq_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Compute dq of one block of queries. Grid (blocks * B H)."""
    c, bh = chunk_and_head(blocks)
    b, h = bh // H, bh % H
    d = tl.arange(0, D)
    t = c * L + tl.arange(0, L)
    k_ptr += b * k_b + (h // R) * k_h
    v_ptr += b * v_b + (h // R) * v_h
    q, dout, logsumexp, mean_grad = load_query_block(
        q_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr, q_b, q_h, q_t, b, h, H, t, T, DOT, D
    )
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
        sink_bounded = bound(sink_products * scale, CAP)
        sink_scores = sink_bounded - logsumexp[:, None]
        sink_weights = tl.exp(tl.where(sink_visible, sink_scores, NEGATIVE))
        sink_d_weights = tl.dot(dout, tl.trans(sink_v), input_precision=PRECISION)
        sink_d_scores = sink_weights * (sink_d_weights - mean_grad[:, None]) * scale
        sink_d_scores = through_bound(sink_d_scores, sink_bounded, CAP).to(DOT)
        dq = tl.dot(sink_d_scores, sink_k, dq, input_precision=PRECISION)
    first, interior = band_of_block(starts_ptr, b, c, T, window, SEGMENTED, L)
    for step in range(0, interior - first + 1):
        j = edge_block(step, first, interior, c)
        dq = query_grad_block(
            q, dout, k_ptr, v_ptr, runs_ptr, starts_ptr, k_t, v_t, j, b, t, run, logsumexp,
            mean_grad, dq, scale, T, window, sinks, True, SEGMENTED, PRECISION, DOT, L, D, CAP,
        )  # fmt: skip
    for j in range(interior, c):
        dq = query_grad_block(
            q, dout, k_ptr, v_ptr, runs_ptr, starts_ptr, k_t, v_t, j, b, t, run, logsumexp,
            mean_grad, dq, scale, T, window, sinks, False, SEGMENTED, PRECISION, DOT, L, D, CAP,
        )  # fmt: skip
    tile = dq_ptr + bh * T * D + t[:, None].to(tl.int64) * D + d[None, :]
    tl.store(tile, dq.to(dq_ptr.dtype.element_ty), mask=(t < T)[:, None])


@triton.jit
def key_value_grad_block(
    k, v, q_ptr, dout_ptr, runs_ptr, starts_ptr, logsumexp_ptr, mean_grad_ptr, q_b, q_h, q_t,
    c, b, h, H, s, run_s, start_s, dk, dv, scale, T, window, sinks,
    MASKED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    Q: tl.constexpr, D: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what comes from queries c Q to c Q + Q - 1 of head h.

    Without MASKED, queries see every key of their document. Queries after the end of the row add
    nothing: their dout and mean gradient are 0.
    """
    t = c * Q + tl.arange(0, Q)
    q, dout, logsumexp, mean_grad = load_query_block(
        q_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr, q_b, q_h, q_t, b, h, H, t, T, DOT, D
    )
    run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
    # Keys are the rows of these tiles, as of dk and dv: no product is transposed.
    bounded = bound(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale, CAP)
    scores = bounded - logsumexp[None, :]
    if MASKED:
        visible = in_band(
            t[None, :], s[:, None], run[None, :], run_s[:, None], start_s[:, None],
            T, window, sinks,
        )  # fmt: skip
        scores = tl.where(visible, scores, NEGATIVE)
    elif SEGMENTED:
        scores = tl.where(run[None, :] == run_s[:, None], scores, NEGATIVE)
    weights = tl.exp(scores)
    dv = tl.dot(weights.to(DOT), dout, dv, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    d_scores = weights * (d_weights - mean_grad[None, :]) * scale
    d_scores = through_bound(d_scores, bounded, CAP)
    dk = tl.dot(d_scores.to(DOT), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def key_value_grad_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr,
    dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, CAP: tl.constexpr,
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
    # Queries come Q at a time. The interior: those after block j whose window holds all its keys.
    units = L // Q
    # All queries of a last block see j's sinks, past its window too: j is in the block's band, so
    # that `sink_part_kernel` leaves its sinks to this one.
    end = tl.minimum(((j * L + L + window - 2) // L + 1) * units, (T + Q - 1) // Q)
    diagonal = tl.minimum(j * units + units, end)
    interior = tl.minimum(tl.maximum(j * L + window, 0) // Q, end)
    inner = tl.maximum(interior - diagonal, 0)
    edges = end - j * units - inner  # the diagonal, then those after the interior
    for step in range(edges * R):
        h, edge = (bg % G) * R + step // edges, j * units + step % edges
        c = tl.where(edge < diagonal, edge, edge + inner)
        dk, dv = key_value_grad_block(
            k, v, q_ptr, dout_ptr, runs_ptr, starts_ptr, logsumexp_ptr, mean_grad_ptr,
            q_b, q_h, q_t, c, b, h, H, s, run_s, start_s, dk, dv, scale, T, window, sinks,
            True, SEGMENTED, PRECISION, DOT, Q, D, CAP,
        )  # fmt: skip
    for step in range(inner * R):
        h, c = (bg % G) * R + step // inner, diagonal + step % inner
        dk, dv = key_value_grad_block(
            k, v, q_ptr, dout_ptr, runs_ptr, starts_ptr, logsumexp_ptr, mean_grad_ptr,
            q_b, q_h, q_t, c, b, h, H, s, run_s, start_s, dk, dv, scale, T, window, sinks,
            False, SEGMENTED, PRECISION, DOT, Q, D, CAP,
        )  # fmt: skip
    tile = bg * T * D + s[:, None].to(tl.int64) * D + d[None, :]
    tl.store(dk_ptr + tile, dk.to(dk_ptr.dtype.element_ty), mask=(s < T)[:, None])
    tl.store(dv_ptr + tile, dv.to(dv_ptr.dtype.element_ty), mask=(s < T)[:, None])

"""Kernels of the sinks' gradients: what each block of queries gives, then sums in a fixed order.

Only sinks before a block's band are counted here; those in the band are keys like others
(`window_kernels.py`). The letters and names are those of `triton/common.py`; S: rows of a tile of
sinks.
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
from xlstm_kernels.triton.window_kernels import (
    NEGATIVE,
    first_block,
    load_documents,
    load_query_block,
    load_sinks,
)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sink_part_kernel(
    q_ptr, k_ptr, v_ptr, runs_ptr, starts_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr,
    sink_dk_ptr, sink_dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CAP: tl.constexpr,
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
    q, dout, logsumexp, mean_grad = load_query_block(
        q_ptr, dout_ptr, logsumexp_ptr, mean_grad_ptr, q_b, q_h, q_t, b, h, H, t, T, DOT, D
    )
    run, _start = load_documents(runs_ptr, starts_ptr, b, t, T, SEGMENTED)
    sink_t, sink_used, sink_run = load_sinks(
        runs_ptr, starts_ptr, b, c, T, window, sinks, SEGMENTED, L, S
    )
    sink_k = load_rows(k_ptr, k_t, sink_t, T, d).to(DOT)
    sink_v = load_rows(v_ptr, v_t, sink_t, T, d).to(DOT)
    visible = sink_used[:, None] & (run == sink_run)[None, :] & (t < T)[None, :]
    bounded = bound(tl.dot(sink_k, tl.trans(q), input_precision=PRECISION) * scale, CAP)
    scores = bounded - logsumexp[None, :]
    weights = tl.exp(tl.where(visible, scores, NEGATIVE))
    d_weights = tl.dot(sink_v, tl.trans(dout), input_precision=PRECISION)
    d_scores = weights * (d_weights - mean_grad[None, :]) * scale
    d_scores = through_bound(d_scores, bounded, CAP)
    sink = tl.arange(0, S)
    part = ((bh * blocks + c) * sinks + sink)[:, None] * D + d[None, :]
    kept = (sink < sinks)[:, None]
    sink_dk = tl.dot(d_scores.to(DOT), q, input_precision=PRECISION)
    tl.store(sink_dk_ptr + part, sink_dk, mask=kept)
    sink_dv = tl.dot(weights.to(DOT), dout, input_precision=PRECISION)
    tl.store(sink_dv_ptr + part, sink_dv, mask=kept)


@triton.jit
def sink_document(runs_ptr, starts_ptr, b, c, T, window, SEGMENTED: tl.constexpr, L: tl.constexpr):
    """Return the document whose sinks block c reads, its first token, and if no block before does.

    The blocks of queries that read the sinks of one document from before their band are neighbours.
    """
    band = first_block(c, window, L) * L
    run, start = load_documents(runs_ptr, starts_ptr, b, band, T, SEGMENTED)
    band_before = first_block(tl.maximum(c - 1, 0), window, L) * L
    run_before, _start = load_documents(runs_ptr, starts_ptr, b, band_before, T, SEGMENTED)
    return run, start, (c == 0) | (run != run_before)


@triton.jit
def sum_sink_parts(
    runs_ptr, starts_ptr, sink_dk_ptr, sink_dv_ptr, c, first, apart, end, b, first_head, heads, run,
    searching, T, window, sinks, blocks, SEGMENTED: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr, S: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sum the parts of one document's sinks, (S, D) for dk and for dv.

    Reads block c and what of `first`, `first + apart` and so on lies after c, before `end` and in
    the document; of each, so many heads. Reads nothing if not `searching`.
    """
    sink, d = tl.arange(0, S), tl.arange(0, D)
    dk = tl.zeros((S, D), tl.float32)
    dv = tl.zeros((S, D), tl.float32)
    steps = (end - first + apart * AT_ONCE - 1) // (apart * AT_ONCE)
    for step in range(tl.where(searching, steps, 0)):
        block = tl.maximum(first + apart * (step * AT_ONCE + tl.arange(0, AT_ONCE)), c)
        band = first_block(block, window, L) * L
        run_block, _start = load_documents(runs_ptr, starts_ptr, b, band, T, SEGMENTED)
        same = (block < end) & (run_block == run)
        kept = same[:, None, None] & (sink < sinks)[None, :, None]
        for r in range(heads):
            first_sink = ((first_head + r) * blocks + block)[:, None] * sinks
            part = (first_sink + sink[None, :])[:, :, None] * D + d[None, None, :]
            dk += tl.sum(tl.load(sink_dk_ptr + part, mask=kept, other=0.0), 0)
            dv += tl.sum(tl.load(sink_dv_ptr + part, mask=kept, other=0.0), 0)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def sink_sum_kernel(
    runs_ptr, starts_ptr, sink_dk_ptr, sink_dv_ptr, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    AT_ONCE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Sum the parts of a document's sinks over its heads and over each RUN blocks, in place.

    Grid (blocks * B G). The sum is where the part of the first of these blocks and heads was.
    """
    c, bg = chunk_and_head(blocks)
    b, first_head = bg // (H // R), bg * R
    run, _start, is_first = sink_document(
        runs_ptr, starts_ptr, b, c, T, window, SEGMENTED, L
    )  # fmt: skip
    begins = is_first | (c % RUN == 0)
    end = tl.minimum((c // RUN + 1) * RUN, blocks)
    dk, dv = sum_sink_parts(
        runs_ptr, starts_ptr, sink_dk_ptr, sink_dv_ptr, c, c, 1, end, b, first_head, R, run,
        begins, T, window, sinks, blocks, SEGMENTED, L, D, S, AT_ONCE,
    )  # fmt: skip
    # All warps must have read the first part before one of them writes over it.
    tl.debug_barrier()
    sink, d = tl.arange(0, S), tl.arange(0, D)
    out = ((first_head * blocks + c) * sinks + sink)[:, None] * D + d[None, :]
    kept = (sink < tl.where(begins, sinks, 0))[:, None]
    tl.store(sink_dk_ptr + out, dk, mask=kept)
    tl.store(sink_dv_ptr + out, dv, mask=kept)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sink_grad_kernel(
    runs_ptr, starts_ptr, sink_dk_ptr, sink_dv_ptr, dk_ptr, dv_ptr, T, H, R, window, sinks, blocks,
    SEGMENTED: tl.constexpr, L: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    AT_ONCE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the sinks of a document get from later queries. Grid (blocks * B G).

    The program of the document's first block adds the sums of each RUN blocks, in order.
    """
    c, bg = chunk_and_head(blocks)
    b = bg // (H // R)
    run, start, is_first = sink_document(
        runs_ptr, starts_ptr, b, c, T, window, SEGMENTED, L
    )  # fmt: skip
    dk, dv = sum_sink_parts(
        runs_ptr, starts_ptr, sink_dk_ptr, sink_dv_ptr, c, c // RUN * RUN, RUN, blocks, b, bg * R,
        1, run, is_first, T, window, sinks, blocks, SEGMENTED, L, D, S, AT_ONCE,
    )  # fmt: skip
    sink, d = tl.arange(0, S), tl.arange(0, D)
    sink_t = start + sink
    run_sink, _start_sink = load_documents(runs_ptr, starts_ptr, b, sink_t, T, SEGMENTED)
    written = (sink < tl.where(is_first, sinks, 0)) & (sink_t < T) & (run_sink == run)
    out = bg * T * D + sink_t[:, None].to(tl.int64) * D + d[None, :]
    old_k = tl.load(dk_ptr + out, mask=written[:, None], other=0.0).to(tl.float32)
    old_v = tl.load(dv_ptr + out, mask=written[:, None], other=0.0).to(tl.float32)
    tl.store(dk_ptr + out, (old_k + dk).to(dk_ptr.dtype.element_ty), mask=written[:, None])
    tl.store(dv_ptr + out, (old_v + dv).to(dv_ptr.dtype.element_ty), mask=written[:, None])

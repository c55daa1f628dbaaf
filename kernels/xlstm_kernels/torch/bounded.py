"""Attention to window and sinks with bounded scores, or with a logit more in each softmax.

Torch's fused attention knows neither, so the scores of a block of queries are made one block after
the other: memory is linear in T for any window, also for one over everything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.registration import refuse_second_derivative, without_autocast
from xlstm_kernels.segments import document_runs, document_starts

# Queries of a block: so many, or fewer where their scores (B, H, queries, keys) would be more than
# this. A block has some of them and of their gradient, in fp32, at a time.
QUERIES_MAX, SCORES_MAX = 256, 1 << 26


class Block(NamedTuple):
    """Queries `first` to `end` and what they see: keys `low` to `high`, and sinks before these.

    sinks (B or 1, N): positions of the sinks. visible (B or 1, 1, L, N + high - low) bool.
    """

    first: int
    end: int
    low: int
    high: int
    sinks: Tensor
    visible: Tensor


def bounded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attend as `xlstm_kernels.sliding_window_attention`, which checks the arguments.

    There may be more keys than queries, (B, G, S, D): the queries are then those of the last T
    tokens, and segment_ids (B, S).
    """
    out, _ = forward(q, k, v, segment_ids, sink_logits, window, sinks, scale, softcap)
    return out


def bound(scores: Tensor, softcap: float | None) -> Tensor:
    """Bound scores x in place: c tanh(x / c) for a softcap c."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of tensors (N, G, rows, columns), in fp32 at least.

    In bf16, scores lose what the softmax and the difference to the mean are made of: the gradient
    is then five times as far off.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide or not a.is_cuda:
        return a.to(wide) @ b.to(wide)
    # Tensor cores multiply bf16 and add up in fp32; a product of fp32 copies would not use them.
    product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=wide)
    return product.unflatten(0, a.shape[:2])


@torch.library.custom_op("xlstm_kernels::bounded_window_torch", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    sink_logits: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the attention and the logsumexp of each softmax, (B, H, T) in fp32 at least."""
    with without_autocast(q.device):
        out, logsumexp = torch.empty_like(q, memory_format=torch.contiguous_format), _statistics(q)
        for block in _blocks(q, k, segment_ids, window, sinks):
            piece = slice(block.first, block.end)
            attended, total = _attend(q, k, v, sink_logits, block, scale, softcap)
            out[:, :, piece] = attended.view_as(out[:, :, piece])
            logsumexp[:, :, piece] = total.view_as(logsumexp[:, :, piece])
        return out, logsumexp


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    sink_logits: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _statistics(q)


def _statistics(q: Tensor) -> Tensor:
    """Return an empty (B, H, T) in fp32 at least."""
    return q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("xlstm_kernels::bounded_window_torch_backward", mutates_args=())
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    sink_logits: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """Return the gradients of q, k, v and, where they are given, of the sink logits."""
    with without_autocast(q.device):
        exact = logsumexp.dtype
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        # A key's gradient has a part of each block that sees it.
        dk, dv = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (k, v))
        # The mean gradient of a query's weights, weighted by these.
        mean = (dout.to(exact) * out.to(exact)).sum(dim=-1)  # (B, H, T)
        for block in _blocks(q, k, segment_ids, window, sinks):
            piece = slice(block.first, block.end)
            # Of the block's queries: the gradient of the output, the logsumexp, the mean gradient.
            known = (dout[:, :, piece], logsumexp[:, :, piece], mean[:, :, piece])
            parts = _differentiate(q, k, v, known, block, scale, softcap)
            dq[:, :, piece] = parts[0].view_as(dq[:, :, piece])
            _add(dk, parts[1], block)
            _add(dv, parts[2], block)
        grads = [dq, dk.to(k.dtype), dv.to(v.dtype)]
        if sink_logits is not None:
            share = (sink_logits.to(exact)[:, None] - logsumexp).exp_()
            grads.append(-(share * mean).sum(dim=(0, 2)).to(sink_logits.dtype))
        return grads


@backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    sink_logits: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    given = (q, k, v) if sink_logits is None else (q, k, v, sink_logits)
    return [x.new_empty(x.shape) for x in given]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, window, sinks, scale, softcap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the second one: zeros that nothing would read
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (window, sinks, scale, softcap)


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    dq, dk, dv, *d_sinks = backward(dout, *ctx.saved_tensors, *ctx.settings)
    grads = (dq, dk, dv, None, d_sinks[0] if d_sinks else None)
    wanted = [x if needs else None for x, needs in zip(grads, ctx.needs_input_grad, strict=False)]
    return (*wanted, *[None] * 4)


forward.register_autograd(_gradients, setup_context=_keep)
backward.register_autograd(functools.partial(refuse_second_derivative, "sliding_window_attention"))


def _blocks(
    q: Tensor, k: Tensor, segment_ids: Tensor | None, window: int, sinks: int
) -> Iterator[Block]:
    """Cut the queries (B, H, T, D) into blocks, and find what each sees of the keys."""
    (B, H, T, _), S, device = q.shape, k.shape[2], q.device
    before, window, sinks = S - T, min(window, S), min(sinks, S)
    # All fit that a block of this many queries sees; without any window that is everything.
    most = max(1, SCORES_MAX // (B * H * min(S, window + QUERIES_MAX + sinks)))
    runs = starts = None
    if segment_ids is not None:
        runs = document_runs(segment_ids)
        starts = document_starts(runs)
    size = min(QUERIES_MAX, most, T)
    for first in range(0, T, size):
        end = min(first + size, T)
        low = max(0, before + first - window + 1)
        yield _block(first, end, before, low, window, sinks, runs, starts, device)


def _block(
    first: int,
    end: int,
    before: int,
    low: int,
    window: int,
    sinks: int,
    runs: Tensor | None,
    starts: Tensor | None,
    device: torch.device,
) -> Block:
    """Find what queries see; runs, starts (B, S): documents and where they begin, None for one."""
    high = before + end
    t = torch.arange(before + first, high, device=device)[:, None]
    s = torch.arange(low, high, device=device)
    start = torch.zeros(1, 1, dtype=torch.int64, device=device)
    band_start = start if starts is None else starts[:, low:high]
    # (B or 1, L, keys): near, or a sink of the document.
    is_sink = (s - band_start < sinks)[:, None]
    visible = (s <= t) & ((t - s < window) | is_sink)
    # Sinks before the band belong to the document of its first token: a later one starts in it.
    if starts is not None:
        start = starts[:, low : low + 1]
    positions = start + torch.arange(sinks, device=device)  # (B or 1, N)
    seen = (positions < low)[:, None].expand(-1, end - first, -1)
    if runs is not None:
        own = runs[:, before + first : high, None]
        visible = visible & (own == runs[:, None, low:high])
        seen = seen & (own == runs[:, None, low : low + 1])
    # A document may have fewer sinks before the band: not seen, but the index must be valid.
    return Block(
        first, end, low, high, positions.clamp(max=low), torch.cat([seen, visible], dim=2)[:, None]
    )


def _read(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Read queries (B, G, R L, D) of a block, its keys and its values (B, G, N + keys, D)."""
    B, G = len(q), k.shape[1]
    queries = q[:, :, block.first : block.end].reshape(B, G, -1, q.shape[-1])
    found = []
    for x in (k, v):
        band = x[:, :, block.low : block.high]
        if block.sinks.shape[1]:
            held = x.gather(2, _index(block, x))
            band = torch.cat([held, band], dim=2)
        found.append(band.to(q.dtype))
    return queries, found[0], found[1]


def _index(block: Block, like: Tensor) -> Tensor:
    """Return the positions of a block's sinks as an index into (B, G, S, D)."""
    index = block.sinks[:, None, :, None]
    return index.expand(len(like), like.shape[1], -1, like.shape[3])


def _scores(
    queries: Tensor, keys: Tensor, block: Block, scale: float, softcap: float | None
) -> Tensor:
    """Return a block's scores (B, G, R L, N + keys), bounded; -inf where a key is not seen."""
    scores = bound(wide_product(queries, keys.mT).mul_(scale), softcap)
    tokens = block.end - block.first
    by_head = scores.unflatten(2, (-1, tokens))  # (B, G, R, L, keys)
    by_head.masked_fill_(~block.visible[:, :, None], -torch.inf)
    return scores


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    block: Block,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the attention (B, G, R L, D) of a block's queries, and the logsumexp (B, G, R L)."""
    queries, keys, values = _read(q, k, v, block)
    scores = _scores(queries, keys, block, scale, softcap)
    total = scores.logsumexp(dim=-1)
    if sink_logits is not None:
        total = torch.logaddexp(total, _of_rows(sink_logits.to(total), total))
    weights = scores.sub_(total.unsqueeze(-1)).exp_().to(q.dtype)
    return weights @ values, total


def _differentiate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: tuple[Tensor, Tensor, Tensor],
    block: Block,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a block's queries (B, G, R L, D), keys and values (B, G, keys, D).

    known: of the queries the gradient of their output (B, H, L, D), the logsumexp and the mean
    gradient of their weights (B, H, L).
    """
    queries, keys, values = _read(q, k, v, block)
    B, G, rows, _ = queries.shape
    d = known[0].reshape(B, G, rows, -1)
    total, mean = (x.reshape(B, G, rows, 1) for x in known[1:])
    scores = _scores(queries, keys, block, scale, softcap)
    weights = (scores - total).exp_()
    slope = wide_product(d, values.mT).sub_(mean).mul_(weights).mul_(scale)
    if softcap is not None:
        # Of c tanh(x / c): 1 - tanh^2. Where a key is not seen its weight is 0.
        inside = scores.masked_fill_(scores == -torch.inf, 0.0).div_(softcap)
        slope.mul_(inside.square_().neg_().add_(1.0))
    slope, weights = slope.to(q.dtype), weights.to(q.dtype)
    return slope @ keys, slope.mT @ queries, weights.mT @ d


def _of_rows(per_head: Tensor, like: Tensor) -> Tensor:
    """Give each row of `like` (B, G, R L) its head's number of (H,): (1, G, R L)."""
    groups, rows = like.shape[1:]
    heads = per_head.view(1, groups, -1, 1)
    return heads.expand(-1, -1, -1, rows // heads.shape[2]).flatten(2)


def _add(total: Tensor, part: Tensor, block: Block) -> None:
    """Add a block's gradients (B, G, N + keys, D) to those of all keys (B, G, S, D)."""
    count = block.sinks.shape[1]
    total[:, :, block.low : block.high] += part[:, :, count:]
    if count:
        total.scatter_add_(2, _index(block, total), part[:, :, :count].to(total.dtype))

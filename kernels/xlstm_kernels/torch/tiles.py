"""Sliding-window attention of rows of one document each, on a CPU: tile after tile.

A tile is a block of queries with the keys that at least one of them sees, for a few heads. So the
blocks of the first `window` tokens read no more than is there, masks touch a tile's edges only, and
its scores stay in a core's cache. (`window.py` masks the whole band of each block, which takes
documents too.) The backward pass makes the softmax of each tile again, so only inputs are kept.

Letters here, beyond the legend in `xlstm_kernels`: L queries of a tile, R = H / G query heads of a
group, P pairs of a row and a group that are worked on at once, S keys of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.registration import (
    keep_freed_memory,
    refuse_second_derivative,
    without_autocast,
)

# Queries of a tile: an eighth of the window, within these. Fewer make small products, more multiply
# masked pairs (docs/math.md, "Chunk size").
QUERIES_MIN, QUERIES_MAX = 32, 64
# Scores of a tile, for each thread: three such tensors stay in its cache.
SCORES_AT_ONCE = 1 << 17
# Multiplications of a tile's scores for one row. With fewer, calling torch takes longer than they,
# and bands call it less often.
PRODUCTS_MIN = 1 << 20


class Tile(NamedTuple):
    """Queries `first` to `end`, which see keys from `low` on and, before these, `sinks` tokens."""

    first: int
    end: int
    low: int
    sinks: int


class Plan:
    """How a call is cut, and the memory for the scores of its largest tile."""

    def __init__(self, q: Tensor, k: Tensor, window: int, sinks: int, buffers: int) -> None:
        """Plan a call; buffers: how many tensors of scores it needs."""
        (B, H, T, _), G = q.shape, k.shape[1]
        self.window, self.sinks, self.pairs = min(window, T), min(sinks, T), B * G
        self.length = _length(self.window)
        widest = H // G * self.length * min(T, self.window + self.length + self.sinks)
        most = max(1, SCORES_AT_ONCE * torch.get_num_threads() // widest)
        count = -(-self.pairs // most)
        self.at_once = -(-self.pairs // count)  # all parts alike, as far as that goes
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.memory = q.new_empty(buffers, self.at_once * widest, dtype=self.wide)
        hidden = q.new_full((self.length, self.length), -torch.inf, dtype=self.wide)
        # What is added to scores (L, L) at a tile's edges: of keys after the query, and of keys
        # that the window has left behind.
        self.after, self.behind = hidden.triu(1), hidden.tril()
        self.tiles = list(self._tiles(T))

    def _tiles(self, T: int) -> Iterator[Tile]:
        # No tile has queries on both sides of the window's length: either all its keys start at the
        # row's, or its band is as long as the window and the tile.
        W, L = self.window, self.length
        for first in range(0, W, L):
            yield Tile(first, min(first + L, W), 0, 0)
        for first in range(W, T, L):
            low = first - W
            yield Tile(first, min(first + L, T), low, min(self.sinks, low))

    def parts(self) -> Iterator[slice]:
        """Cut the pairs of a row and a group into parts."""
        for first in range(0, self.pairs, self.at_once):
            yield slice(first, min(first + self.at_once, self.pairs))

    def buffer(self, number: int, *shape: int) -> Tensor:
        """Return a tensor (P, R L, S) in the memory for scores."""
        numbers = shape[0] * shape[1] * shape[2]
        return self.memory[number, :numbers].view(shape)

    def copies(self, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Copy keys, scaled, and values (P, T, D) in the dtype of the scores."""
        return k.to(self.wide, copy=True).mul_(scale), v.to(self.wide, copy=True)


def tiles_pay(q: Tensor, k: Tensor, window: int) -> bool:
    """Return whether tiles are the faster way; the rows of the batch do not count."""
    (_, H, _, D), G = q.shape, k.shape[1]
    L = _length(window)
    # A compiler cannot ask for the threads.
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    products = H * L * (window + L) * D
    # The products of a tile are parallel over groups. Threads wait for each other after each of
    # torch's functions: so each of two needs the work that one alone needs.
    return threads <= G and products >= PRODUCTS_MIN * max(2, threads**2)


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int, scale: float
) -> Tensor:
    """Attend as `xlstm_kernels.sliding_window_attention`, which checks the arguments."""
    return forward(q, k, v, window, sinks, scale)


def _length(window: int) -> int:
    """Return L, the queries of a tile."""
    return min(max(QUERIES_MIN, min(window // 8, QUERIES_MAX)), window)


# Forward and backward pass are operators of their own, as in `chunkwise.py`.
@torch.library.custom_op("xlstm_kernels::window_tiles", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> Tensor:
    """Return the attention, contiguous."""
    keep_freed_memory()
    with without_autocast(q.device):
        G = k.shape[1]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        plan = Plan(q, k, window, sinks, buffers=2)
        q, all_out, k, v = _by_group(q, G), _by_group(out, G), k.flatten(0, 1), v.flatten(0, 1)
        for part in plan.parts():
            queries, k_part, v_part = q[part].to(plan.wide), k[part], v[part]
            keys, values = plan.copies(k_part, v_part, scale)
            for tile in plan.tiles:
                band = _band(keys, k_part, tile, scale)
                weights = _weights(plan, _rows(queries, tile), band, tile)
                attended = torch.bmm(weights, _band(values, v_part, tile))
                _write(all_out[part], attended, tile)
        return out


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("xlstm_kernels::window_tiles_backward", mutates_args=())
def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float
) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    with without_autocast(q.device):
        G = k.shape[1]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        plan = Plan(q, k, window, sinks, buffers=3)
        q, dout, all_dq = (_by_group(x, G) for x in (q, dout, dq))
        dk, dv = (torch.zeros(x.shape, dtype=plan.wide) for x in (k, v))
        results = all_dq, dk.flatten(0, 1), dv.flatten(0, 1)
        inputs = dout, q, k.flatten(0, 1), v.flatten(0, 1)
        for part in plan.parts():
            _differentiate(plan, part, inputs, results, scale)
        return [dq, dk.mul_(scale).to(k.dtype), dv.to(v.dtype)]


@backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _differentiate(
    plan: Plan,
    part: slice,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Write or add a part's gradients.

    inputs: dout, q (B G, R, T, D), k, v (B G, T, D). results: dq, dk, to be scaled, dv, likewise.
    """
    dout, q, k, v = (x[part] for x in inputs)
    dq, dk, dv = (x[part] for x in results)
    queries, d_queries = q.to(plan.wide), dout.to(plan.wide)
    keys, values = plan.copies(k, v, scale)
    for tile in plan.tiles:
        rows, d = _rows(queries, tile), _rows(d_queries, tile)
        band = _band(keys, k, tile, scale)
        weights = _weights(plan, rows, band, tile)
        _add(dv, torch.bmm(weights.mT, d), tile)
        slope = torch.bmm(d, _band(values, v, tile).mT, out=plan.buffer(0, *weights.shape))
        d_scores = torch.mul(slope, weights, out=plan.buffer(2, *weights.shape))
        d_scores.addcmul_(weights, d_scores.sum(dim=-1, keepdim=True), value=-1.0)
        _add(dk, torch.bmm(d_scores.mT, rows), tile)
        _write(dq, torch.bmm(d_scores, band), tile)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    found = backward(dout, *ctx.saved_tensors, *ctx.settings)
    wanted = [x if needs else None for x, needs in zip(found, ctx.needs_input_grad, strict=False)]
    return (*wanted, None, None, None)


forward.register_autograd(_gradients, setup_context=_keep)
backward.register_autograd(functools.partial(refuse_second_derivative, "sliding_window_attention"))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """View, or copy, x (B, H, T, D) as (B G, R, T, D)."""
    B, H, T, D = x.shape
    return x.reshape(B * groups, H // groups, T, D)


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """Read a tile's queries of x (P, R, T, D), (P, R L, D)."""
    return x[:, :, tile.first : tile.end].flatten(1, 2)


def _write(x: Tensor, rows: Tensor, tile: Tile) -> None:
    """Write what `_rows` reads."""
    x[:, :, tile.first : tile.end] = rows.unflatten(1, (x.shape[1], -1))


def _band(x: Tensor, given: Tensor, tile: Tile, scale: float = 1.0) -> Tensor:
    """Return what a tile sees of keys or values, (P, S, D): its sinks and then its band.

    given (P, T, D). x: a copy of it. The sinks are written there, before the band: no later tile
    reads those tokens, and a copy of the band would cost more.
    """
    low = tile.low - tile.sinks
    if tile.sinks:
        x[:, low : tile.low] = given[:, : tile.sinks].to(x.dtype) * scale
    return x[:, low : tile.end]


def _add(total: Tensor, part: Tensor, tile: Tile) -> None:
    """Add the gradients (P, S, D) of what `_band` returns to those of all tokens (P, T, D)."""
    total[:, tile.low : tile.end].add_(part[:, tile.sinks :])
    if tile.sinks:
        total[:, : tile.sinks].add_(part[:, : tile.sinks])


def _weights(plan: Plan, rows: Tensor, band: Tensor, tile: Tile) -> Tensor:
    """Return the softmax (P, R L, S) of queries (P, R L, D), scaled, over their keys (P, S, D)."""
    L = tile.end - tile.first
    shape = (len(rows), rows.shape[1], band.shape[1])
    scores = torch.bmm(rows, band.mT, out=plan.buffer(0, *shape))
    by_head = scores.unflatten(1, (-1, L))  # (P, R, L, S)
    by_head[..., -L:].add_(plan.after[:L, :L])
    if tile.first >= plan.window:
        # Sinks inside of the band are seen also where the window has left them behind.
        first = min(max(plan.sinks - tile.low, 0), L)
        by_head[..., tile.sinks + first : tile.sinks + L].add_(plan.behind[:L, first:L])
    return torch.softmax(scores, dim=-1, out=plan.buffer(1, *shape))

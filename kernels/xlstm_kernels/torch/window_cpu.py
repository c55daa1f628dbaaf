"""Sliding-window attention in blocks of queries on a CPU, with products of many blocks at a time.

Scores lie keys by queries, so that the softmax's sums run over whole rows of memory. It is a power
of 2, which is the faster function: keys are scaled by log2(e) too. Scores of a part of the blocks
stay in a core's cache; the backward pass makes them again.

Letters here, beyond the legend in `xlstm_kernels`: C blocks, L queries of a block, R = H / G query
heads of a group, span = L + W - 1 keys of a band, S keys that the blocks of a part read (of each
band from the first that one of them sees, then N sinks), P blocks of a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.registration import keep_freed_memory
from xlstm_kernels.torch.band_plan import band_plan

# Scores, keys and values of a part: so that they stay near a core's cache.
NUMBERS_AT_ONCE = 1 << 19
PLANS, PLAN_AT_MOST = 4, 1 << 22  # that are kept for later calls, and numbers of one
LOG2E = math.log2(math.e)


class Plan(NamedTuple):
    """What all layers of a model read alike.

    sinks (B C G N): rows of the sinks in what `Work.tokens` returns. bias (B or 1, C, 1, span + N,
    L R): what is added to scores. skip (B or 1, C): keys at a band's start that no query sees.
    """

    sinks: Tensor
    bias: Tensor
    skip: Tensor


class Plans:
    """The latest plans, for the other layers and for the backward pass."""

    def __init__(self) -> None:
        """Start with none."""
        self.kept: tuple[tuple[tuple[object, ...], Tensor | None, Plan], ...] = ()

    def find(self, key: tuple[object, ...], segment_ids: Tensor | None) -> Plan | None:
        """Return the plan for these segment ids, by what they are: a caller may change them.

        key: all else that a plan depends on, and the dtype of the ids.
        """
        for known, ids, plan in self.kept:
            if known != key:
                continue
            if ids is None or segment_ids is None or torch.equal(ids, segment_ids):
                return plan
        return None

    def keep(self, key: tuple[object, ...], segment_ids: Tensor | None, plan: Plan) -> None:
        """Keep a plan, and forget the oldest; nobody may write into the segment ids."""
        # A new tuple each time, so threads need no lock: at worst a plan is made twice.
        self.kept = ((key, segment_ids, plan), *self.kept[: PLANS - 1])


_plans = Plans()


class Part(NamedTuple):
    """Blocks of some rows: all of each row, or some blocks of one row.

    skip: keys at the start of each of their bands that no query sees.
    """

    rows: slice
    blocks: slice
    skip: int

    def flat(self, per_row: int, each: int = 1) -> slice:
        """Return where it is among the blocks of all rows, each of them `each` times."""
        start = (self.rows.start * per_row + self.blocks.start) * each
        return slice(start, start + self.shape[0] * self.shape[1] * each)

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows, and the blocks of each: P together."""
        rows, blocks = self.rows, self.blocks
        return rows.stop - rows.start, blocks.stop - blocks.start


class Work:
    """A call cut into blocks and parts."""

    def __init__(
        self, q: Tensor, k: Tensor, segment_ids: Tensor | None, window: int, sinks: int
    ) -> None:
        """Cut a call with queries q (B, H, T, D) and keys like k (B, G, T, D)."""
        (self.B, H, self.T, self.D), self.G = q.shape, k.shape[1]
        self.R, self.back, self.N = H // self.G, min(window, self.T) - 1, sinks
        self.L = block_length(self.T, window, self.R)
        self.C = -(-self.T // self.L)
        self.span = self.L + self.back
        self.length = self.back + self.C * self.L  # of a row with all that its blocks read
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.plan = self._plan(segment_ids)
        numbers = self.G * (self.span + sinks) * (self.R * self.L + 2 * self.D)  # of a block
        self.at_once = max(1, NUMBERS_AT_ONCE // numbers)

    def _plan(self, segment_ids: Tensor | None) -> Plan:
        ids_dtype = None if segment_ids is None else segment_ids.dtype
        sizes = self.B, self.G, self.T, self.R, self.L, self.back, self.N
        key = (*sizes, self.wide, ids_dtype)
        found = _plans.find(key, segment_ids)
        if found is not None:
            return found
        # Outside of inference mode, because training may read it too.
        with torch.inference_mode(False):
            ids = None if segment_ids is None else segment_ids.clone()
            plan = self._new_plan(ids)
        if plan.bias.numel() <= PLAN_AT_MOST:
            _plans.keep(key, ids, plan)
        return plan

    def _new_plan(self, segment_ids: Tensor | None) -> Plan:
        device = torch.device("cpu")
        found = band_plan(segment_ids, device, self.T, self.L, self.back + 1, self.N)
        rows = torch.arange(self.B, device=device)[:, None, None] * self.length + self.back
        groups = torch.arange(self.G, device=device)[:, None] * (self.B * self.length)
        sinks = (rows + found.sinks).unsqueeze(2) + groups
        seen = torch.cat([found.seen, found.seen_sinks], dim=2).unsqueeze(4)
        bias = torch.where(seen, 0.0, -torch.inf).to(self.wide).expand(-1, -1, -1, -1, self.R)
        return Plan(sinks.flatten(), bias.flatten(3).unsqueeze(2), found.skip)

    def parts(self) -> Iterator[Part]:
        """Cut the blocks into parts."""
        rows = self.at_once // self.C
        if rows:
            for row in range(0, self.B, rows):
                yield self._part(slice(row, min(row + rows, self.B)), slice(0, self.C))
            return
        count = -(-self.C // self.at_once)
        length = -(-self.C // count)  # all parts alike, as far as that goes
        for row in range(self.B):
            for block in range(0, self.C, length):
                blocks = slice(block, min(block + length, self.C))
                yield self._part(slice(row, row + 1), blocks)

    def _part(self, rows: slice, blocks: slice) -> Part:
        return Part(rows, blocks, int(self._of(self.plan.skip, rows, blocks).min()))

    def blocks(self, x: Tensor, part: Part) -> Tensor:
        """Copy the part of x (B, H, T, D), (P G, L R, D)."""
        x, missing = self._tokens_of(x, part)
        x = F.pad(x, (0, 0, 0, missing)) if missing else x
        x = x.unflatten(2, (-1, self.L)).unflatten(1, (self.G, -1)).permute(0, 3, 1, 4, 2, 5)
        out = x.new_empty(x.shape, dtype=self.wide)
        return out.copy_(x).view(-1, self.R * self.L, self.D)

    def write(self, out: Tensor, x: Tensor, part: Part) -> None:
        """Write x, as `blocks` returns it, to its part of out (B, H, T, D)."""
        out, missing = self._tokens_of(out, part)
        x = x.view(*part.shape, self.G, self.L, self.R, self.D).permute(0, 2, 4, 1, 3, 5)
        if missing:
            out.copy_(x.flatten(3, 4).flatten(1, 2)[:, :, : out.shape[2]])
        else:
            out.view(x.shape).copy_(x)

    def _tokens_of(self, x: Tensor, part: Part) -> tuple[Tensor, int]:
        """View the part of x (B, H, T, D); and how many tokens its last block lacks."""
        first, end = part.blocks.start * self.L, part.blocks.stop * self.L
        return x[part.rows, :, first:end], max(0, end - self.T)

    def tokens(self, x: Tensor, scale: float) -> Tensor:
        """Copy keys or values x (B, G, T, D), scaled, into (G, B, back + C L, D); the rest is 0."""
        out = x.new_empty(self.G, self.B, self.length, self.D, dtype=self.wide)
        out[:, :, : self.back] = 0.0
        if self.T % self.L:
            out[:, :, self.back + self.T :] = 0.0
        rows = out[:, :, self.back : self.back + self.T].copy_(x.transpose(0, 1))
        if scale != 1.0:
            rows.mul_(scale)
        return out

    def gather(self, tokens: Tensor, part: Part) -> Tensor:
        """Collect what each block of a part reads of `tokens`, (P G, S, D)."""
        bands = self._bands(tokens, part, 0, self.span - part.skip)
        if not self.N:
            return bands.flatten(0, 2)
        sinks = tokens.view(-1, self.D).index_select(0, self._sinks(part))
        sinks = sinks.view(*bands.shape[:3], self.N, self.D)
        return torch.cat([bands, sinks], dim=3).flatten(0, 2)

    def add(self, total: Tensor, d: Tensor, part: Part) -> None:
        """Add the gradients d (P G, S, D) of what `gather` returns to those of all tokens."""
        d = d.view(*part.shape, self.G, -1, self.D)
        length = self.span - part.skip
        bands = d[..., :length, :]
        # Bands of neighbours overlap. Pieces of L tokens do not, nor do those of other rows.
        if part.shape[1] * self.L < length:
            for block, d_band in enumerate(bands.split(1, dim=1), part.blocks.start):
                alone = part._replace(blocks=slice(block, block + 1))
                self._bands(total, alone, 0, length).add_(d_band)
        else:
            for first in range(0, length, self.L):
                piece = bands[..., first : first + self.L, :]
                self._bands(total, part, first, piece.shape[3]).add_(piece)
        if self.N:
            d_sinks = d[..., length:, :].reshape(-1, self.D)
            total.view(-1, self.D).index_add_(0, self._sinks(part), d_sinks)

    def all_rows(self, tokens: Tensor, like: Tensor, scale: float) -> Tensor:
        """Undo `tokens`, scaled, in the shape and dtype of `like`."""
        rows = tokens[:, :, self.back : self.back + self.T]
        if scale != 1.0:
            rows.mul_(scale)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        return out.copy_(rows.transpose(0, 1))

    def scores(self, keys: Tensor, queries: Tensor, part: Part) -> Tensor:
        """Return the masked scores (P G, S, L R) of keys (P G, S, D)."""
        scores = torch.bmm(keys, queries.mT)
        bias = self._of(self.plan.bias, part.rows, part.blocks)[..., part.skip :, :]
        scores.view(-1, bias.shape[1], self.G, *bias.shape[3:]).add_(bias)
        return scores

    def sums(self, logsumexp: Tensor, part: Part) -> Tensor:
        """View the part of (B C, G, L R), as (P G, 1, L R)."""
        return logsumexp[part.flat(self.C)].flatten(0, 1).unsqueeze(1)

    def _bands(self, tokens: Tensor, part: Part, first: int, length: int) -> Tensor:
        """View keys `first` on of what is read of each band, (rows, blocks, G, length, D)."""
        group, row, token, _ = tokens.stride()
        at = part.rows.start * row + (part.blocks.start * self.L + part.skip + first) * token
        strides = (row, self.L * token, group, token, 1)
        return tokens.as_strided((*part.shape, self.G, length, self.D), strides, at)

    def _of(self, x: Tensor, rows: slice, blocks: slice) -> Tensor:
        """View blocks of x (B or 1, C, ...)."""
        return x[rows if len(x) == self.B else slice(None), blocks]

    def _sinks(self, part: Part) -> Tensor:
        return self.plan.sinks[part.flat(self.C, self.G * self.N)]


def block_length(T: int, window: int, heads: int) -> int:
    """Return L, the queries of a block, where `heads` query heads share a key."""
    if heads == 1:
        return min(64 if window >= 256 else 32, T)
    return min(16 if window <= 64 else 32, T)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention, and log2 of the sums of each softmax's powers, (B C, G, L R)."""
    keep_freed_memory()
    work = Work(q, k, segment_ids, window, sinks)
    all_keys, all_values = work.tokens(k, scale * LOG2E), work.tokens(v, 1.0)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    logsumexp = q.new_empty(work.B * work.C, work.G, work.R * work.L, dtype=work.wide)
    for part in work.parts():
        _attend_part(work, part, (q, all_keys, all_values), (out, logsumexp))
    return out, logsumexp


def _attend_part(
    work: Work,
    part: Part,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
) -> None:
    """Write what `attend` returns of a part; its memory is free for the next one.

    inputs: q, and all keys and values as `Work.tokens` returns them.
    """
    q, all_keys, all_values = inputs
    out, logsumexp = results
    weights = work.scores(work.gather(all_keys, part), work.blocks(q, part), part)
    highest = weights.amax(dim=1, keepdim=True)
    total = weights.sub_(highest).exp2_().sum(dim=1, keepdim=True)
    attended = torch.bmm(weights.div_(total).mT, work.gather(all_values, part))
    work.write(out, attended, part)
    torch.add(highest, total.log2_(), out=work.sums(logsumexp, part))


def differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    logsumexp: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of q, k and v; logsumexp: of `attend`."""
    work = Work(q, k, segment_ids, window, sinks)
    # The product of these scales is that of the scores: so each d_scores is right for the queries.
    all_keys, all_values = work.tokens(k, scale * LOG2E), work.tokens(v, 1.0 / LOG2E)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = torch.zeros_like(all_keys), torch.zeros_like(all_values)
    inputs = dout, q, all_keys, all_values
    for part in work.parts():
        _differentiate_part(work, part, inputs, logsumexp, (dq, dk, dv))
    return [dq, work.all_rows(dk, k, scale * LOG2E), work.all_rows(dv, v, 1.0)]


def _differentiate_part(
    work: Work,
    part: Part,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    logsumexp: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write or add the gradients of a part; its memory is free for the next one.

    inputs: dout, q, and all keys and values as `Work.tokens` returns them. results: of q, and of
    the keys and values, likewise.
    """
    dout, q, all_keys, all_values = inputs
    dq, dk, dv = results
    keys, values = work.gather(all_keys, part), work.gather(all_values, part)
    rows, d = work.blocks(q, part), work.blocks(dout, part)
    weights = work.scores(keys, rows, part).sub_(work.sums(logsumexp, part)).exp2_()
    work.add(dv, torch.bmm(weights, d), part)
    d_scores = torch.bmm(values, d.mT).mul_(weights)
    d_scores.addcmul_(weights, d_scores.sum(dim=1, keepdim=True), value=-1.0)
    work.add(dk, torch.bmm(d_scores, rows), part)
    work.write(dq, torch.bmm(d_scores.mT, keys), part)

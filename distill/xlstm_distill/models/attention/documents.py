"""Causal attention inside the documents of packed rows on a CPU, many short documents at a time.

PyTorch's fused kernel is slow for short documents: it needs a call for each, and its products are
small. Here documents of like length are laid side by side. Block number j of the queries of all of
them is one batched product with their keys up to the block's end, so hardly anything is computed
that causality hides. Scores lie keys by queries, and the softmax is a power of 2: see
`xlstm_kernels.torch.window_cpu`.

Letters here, beyond B, T, H, G and D: N documents of a part, P tokens of its longest one in whole
blocks, L queries of a block, R = H / G query heads of a group, S keys up to a block's end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.registration import keep_freed_memory

LONG = 1024  # tokens from which the fused kernel is hardly slower, in less memory
LANES = 32  # torch finds maxima 10 to 30 times as fast where R L is a multiple of it
FEWEST_QUERIES = 16  # of a block
LIKE = 4  # how many times as long as its shortest a part's longest document may be
NUMBERS_AT_ONCE = 1 << 21  # of a part, so that they stay near a core's cache
LOG2E = math.log2(math.e)


class Part(NamedTuple):
    """Documents that are computed at once, the longest first.

    read (N G P): rows of (B T G, ...); past a document's end its last token again, which is finite
    where the document is. write (N G P): rows likewise; past the end the one behind all tokens.
    counts: how many documents have each block. bias (L, L R): added to a block's last scores.
    """

    read: Tensor
    write: Tensor
    counts: list[int]
    bias: Tensor


class Documents:
    """Where the documents of a batch are, and how layers take them: made once for all layers.

    A document is a run of equal ids.
    """

    def __init__(self, segment_ids: Tensor) -> None:
        """Find the documents of segment_ids (B, T), on a CPU."""
        ids = segment_ids.numpy()
        begins = np.ones(ids.shape, dtype=bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=ids.size)
        order = np.argsort(-lengths, kind="stable")
        self.shape, self.starts, self.lengths = ids.shape, starts[order], lengths[order]
        self.long = int(np.searchsorted(-self.lengths, -LONG, side="right"))
        self._parts: dict[tuple[int, int, int], list[Part]] = {}

    def each(self, count: int | None = None) -> list[tuple[int, slice]]:
        """Return row and tokens of the longest documents, or of all."""
        tokens = self.shape[1]
        found = []
        for start, length in zip(self.starts[:count], self.lengths[:count], strict=True):
            row, first = divmod(int(start), tokens)
            found.append((row, slice(first, first + int(length))))
        return found

    def parts(self, groups: int, shared: int, width: int) -> list[Part]:
        """Cut all but the long documents into parts for G, R, and D of keys and values together."""
        key = (groups, shared, width)
        if key not in self._parts:
            self._parts[key] = self._cut(groups, shared, width)
        return self._parts[key]

    def _cut(self, groups: int, shared: int, width: int) -> list[Part]:
        found, start = [], self.long
        while start < len(self.lengths):
            longest = int(self.lengths[start])
            block = max(FEWEST_QUERIES, LANES // math.gcd(LANES, shared))
            if 2 * longest <= block:
                block = longest
            padded = -(-longest // block) * block
            each = groups * padded * ((shared + 1) * width + block * shared)
            alike = int(np.searchsorted(-self.lengths, -(longest / LIKE), side="right"))
            end = min(alike, start + max(1, NUMBERS_AT_ONCE // each))
            found.append(self._part(slice(start, end), padded, block, groups, shared))
            start = end
        return found

    def _part(self, which: slice, padded: int, block: int, groups: int, shared: int) -> Part:
        starts, lengths = self.starts[which, None], self.lengths[which, None]
        places = np.arange(padded)
        tokens = starts + np.minimum(places, lengths - 1)
        read = tokens[:, None] * groups + np.arange(groups)[:, None]
        behind = self.shape[0] * self.shape[1] * groups
        write = np.where((places < lengths)[:, None], read, behind)
        counts = [int((lengths > first).sum()) for first in range(0, padded, block)]
        bias = torch.full((block, block), -torch.inf).tril(-1).repeat_interleave(shared, dim=1)
        rows = torch.from_numpy(read.ravel()), torch.from_numpy(write.ravel())
        return Part(*rows, counts, bias)


def attend_in_documents(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents
) -> Tensor:
    """Attend inside documents, (B, T, H, Dv); q (B, H, T, D), k (B, G, T, D), v (B, G, T, Dv)."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        _attend_one_by_one(q, k, v, scale, documents.each(), out)
        return out
    keep_freed_memory()
    (B, H, T, D), G, Dv = q.shape, k.shape[1], v.shape[3]
    # Modes, as that of the linear layers, would look at each of these small operators. Autocast
    # would round the weights to 16 bits.
    with torch._C.DisableTorchFunction(), torch.autocast("cpu", enabled=False):
        queries = q.transpose(1, 2).reshape(B * T * G, H // G * D)
        keys, values = (x.transpose(1, 2).reshape(B * T * G, x.shape[3]) for x in (k, v))
        found = q.new_empty(B * T * G + 1, H // G * Dv)
        for part in documents.parts(G, H // G, D + Dv):
            _attend_part(queries, keys, values, scale, part, found)
    out = found[:-1].view(B, T, H, Dv)
    # Here autocast stays: q and k may be fp32 beside v in 16 bits, which the kernel does not take.
    _attend_one_by_one(q, k, v, scale, documents.each(documents.long), out)
    return out


def _attend_part(q: Tensor, k: Tensor, v: Tensor, scale: float, part: Part, out: Tensor) -> None:
    """Write what a part attends to; q and out (B T G, R D), k and v (B T G, D)."""
    L, LR = part.bias.shape
    blocks, D = len(part.counts), k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    given = [x.index_select(0, part.read).to(wide) for x in (q, k, v)]
    queries = given[0].view(-1, blocks, LR, D)
    keys, values = (x.view(-1, blocks * L, x.shape[1]) for x in given[1:])
    attended = queries.new_empty(*queries.shape[:3], v.shape[1])
    groups = len(keys) // part.counts[0]
    most = max(count * (block + 1) for block, count in enumerate(part.counts))
    memory = queries.new_empty(most * groups * L * LR)
    for block, count in enumerate(part.counts):
        n, S = count * groups, (block + 1) * L
        weights = memory[: n * S * LR].view(n, S, LR)
        read = queries[:n, block].mT
        torch.baddbmm(weights, keys[:n, :S], read, beta=0, alpha=scale * LOG2E, out=weights)
        weights[:, -L:].add_(part.bias)
        weights.sub_(weights.amax(dim=1, keepdim=True)).exp2_()
        total = weights.sum(dim=1, keepdim=True).mT
        torch.div(torch.bmm(weights.mT, values[:n, :S]), total, out=attended[:n, block])
    out.index_copy_(0, part.write, attended.view(len(part.write), -1).to(out.dtype))


def _attend_one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    places: list[tuple[int, slice]],
    out: Tensor,
) -> None:
    """Write what documents attend to into out (B, T, H, D), by the kernel that needs no mask."""
    for row, tokens in places:
        queries, keys, values = (x[row : row + 1, :, tokens] for x in (q, k, v))
        found = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[row, tokens] = found[0].transpose(0, 1)

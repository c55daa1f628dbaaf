"""Both passes of the chunkwise mLSTM: states over the chunks, then all chunks at once.

Letters here, beyond the legend in `xlstm_kernels`: C chunks of L tokens, R = H / G query heads of a
group, P = B G C chunks of all groups, Dw = Dv + 1 (v and a column of ones, which carries the
normaliser). memory: [C, n] of docs/math.md, (Dk, Dw).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.torch.weights import Chunks, Documents, Weights, gate_grads, write_weights

PRODUCTS_AT_ONCE = 1 << 16  # on a CPU, so that they stay in the cache


class Part(NamedTuple):
    """Rows, groups and tokens that a pass works on at once; chunks: their first, of all parts'."""

    rows: slice
    groups: slice
    tokens: slice
    chunks: int

    def heads(self, R: int) -> tuple[slice, slice]:
        """Return what selects the rows and query heads."""
        return self.rows, slice(self.groups.start * R, self.groups.stop * R)

    def of(self, x: Tensor, R: int = 1) -> Tensor:
        """View the part of x (B, G R, T, ...)."""
        return x[(*self.heads(R), self.tokens)]


class Tokens(NamedTuple):
    """Arguments of a call; shapes as in `xlstm_kernels.mlstm`. documents: None for one a row."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor
    documents: Documents | None

    def part(self, part: Part) -> Tokens:
        """View a part."""
        documents, at = self.documents, part.tokens
        if documents is not None:
            runs = documents.runs[part.rows]
            entering = runs[:, at.start - 1] if at.start else documents.entering[part.rows]
            documents = Documents(runs[:, at], entering)
        R = self.q.shape[1] // self.v.shape[1]
        q, k, i, f = (part.of(x, R) for x in (self.q, self.k, self.i, self.f))
        return Tokens(q, k, part.of(self.v), i, f, documents)


class Kept(NamedTuple):
    """What the backward pass reads of X chunks of heads, in the dtype that they are computed in.

    weights (X, L L + L), as `Weights.of` reads it. scores (X, L, L): products of queries and keys,
    weighed. outputs (X, L, Dw): numerators and denominators; these are inf where they are 0. states
    (X + R, Dk, Dw): the memory before each chunk.
    """

    weights: Tensor
    scores: Tensor
    outputs: Tensor
    states: Tensor

    @classmethod
    def empty(cls, sizes: Chunks, like: Tensor) -> Kept:
        """Allocate it for all chunks of `sizes`."""
        X, L, Dw = sizes.P * sizes.R, sizes.L, sizes.Dv + 1
        return cls(
            like.new_empty(X, L * L + L),
            like.new_empty(X, L, L),
            like.new_empty(X, L, Dw),
            like.new_empty(X + sizes.R, sizes.Dk, Dw),
        )

    def part(self, first: int, sizes: Chunks) -> Kept:
        """View the chunks of `sizes` from `first` on, as (P, R, ...).

        The states have R more, which are the next part's first.
        """
        at = slice(first * sizes.R, (first + sizes.P) * sizes.R)
        weights, scores, outputs = (x[at].unflatten(0, (-1, sizes.R)) for x in self[:3])
        return Kept(weights, scores, outputs, self.states[at.start : at.stop + sizes.R])


class InChunks(NamedTuple):
    """Queries, keys and values of a part, chunk by chunk, in the dtype to compute in.

    q, k (P R, L, Dk); v (P, L, Dw), with its column of ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: Chunks

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, length: int, dtype: torch.dtype) -> InChunks:
        """Cut a part (B, heads, T, features) into chunks of `length` tokens."""
        (B, H, T, Dk), (G, Dv) = q.shape, (v.shape[1], v.shape[3])
        sizes = Chunks(B, G, H // G, T, Dk, Dv, length)
        q, k, v = (sizes.split(x, dtype).flatten(0, 1) for x in (q, k, v))
        return cls(q, k, F.pad(v, (0, 1), value=1.0), sizes)

    def reading_queries(self, weights: Weights) -> Tensor:
        """Weigh the queries of the entering state, (P R, L, Dk)."""
        return self.q * weights.read.flatten(0, 1).unsqueeze(-1)

    def written_keys(self, weights: Weights) -> Tensor:
        """Weigh the keys of the leaving state, (P, L, R Dk).

        The heads of a group share v. Their keys are the columns of one matrix, so that v is not
        repeated.
        """
        sizes = self.sizes
        if sizes.R == 1:
            return self.k * weights.write.view(sizes.P, sizes.L, 1)
        keys = self.k.view(sizes.P, sizes.R, sizes.L, sizes.Dk)
        written = keys.new_empty(sizes.P, sizes.L, sizes.R, sizes.Dk)
        torch.mul(keys, weights.write.unsqueeze(-1), out=written.transpose(1, 2))
        return written.flatten(2)

    def of_group(self, x: Tensor) -> Tensor:
        """View x (P R, rows, ...) as (P, R rows, ...): the rows of a group's heads."""
        return x.view(self.sizes.P, -1, x.shape[2])

    def over_time(self, x: Tensor) -> Tensor:
        """View x (P R, ...) as (B G, C, R, ...)."""
        sizes = self.sizes
        return x.view(-1, sizes.C, sizes.R, *x.shape[1:])


def run_part(tokens: Tokens, memory: Tensor, m: Tensor, kept: Kept, h: Tensor) -> None:
    """Write h (B, H, T, Dv) and what the backward pass reads of a part.

    memory (B, H, Dk, Dw), m (B, H): before the part; changed in place to those after it.
    """
    q, k, v, i, f, documents = tokens
    chunks = InChunks.of(q, k, v, kept.scores.shape[-1], m.dtype)
    m.copy_(write_weights(i, f, documents, m, chunks.sizes, kept.weights))
    weights = Weights.of(kept.weights)

    heads = chunks.sizes.R
    # What a chunk writes goes where the next chunk's state is. After a head's last chunk, that is
    # the first state of the next head, so `_carry` takes it out.
    updates = kept.states[heads:].view(chunks.sizes.P, -1, memory.shape[-1])
    torch.bmm(chunks.written_keys(weights).mT, chunks.v, out=updates)
    _carry(chunks, kept.states, weights, memory)
    entering = kept.states[:-heads]

    scores, out = kept.scores.flatten(0, 1), kept.outputs.flatten(0, 1)
    torch.bmm(chunks.q, chunks.k.mT, out=scores).mul_(weights.pairs.flatten(0, 1))
    torch.bmm(chunks.reading_queries(weights), entering, out=out)
    chunks.of_group(out).baddbmm_(chunks.of_group(scores), chunks.v)
    num, den = kept.outputs[..., :-1], kept.outputs[..., -1]
    den.masked_fill_(den == 0, torch.inf)  # so that h and its gradient are 0
    ratio = chunks.sizes.place(h, num.dtype)
    torch.div(num, den.unsqueeze(-1), out=ratio)
    chunks.sizes.join(ratio, h)


def _carry(chunks: InChunks, states: Tensor, weights: Weights, memory: Tensor) -> None:
    """Make states (P R + R, Dk, Dw) of the chunks' updates, and the memory the one after them."""
    R, like = chunks.sizes.R, memory.shape
    after = chunks.over_time(states[R:])[:, -1].clone()
    entering = chunks.over_time(states[:-R])
    entering[:, 0] = memory.view_as(after)
    decay = chunks.over_time(weights.decay.flatten())[..., None, None].unbind(1)
    steps = entering.unbind(1)
    for c in range(len(steps) - 1):
        steps[c + 1].addcmul_(steps[c], decay[c])
    memory.copy_(after.addcmul_(steps[-1], decay[-1]).view(like))


class Gradients(NamedTuple):
    """Where the gradients go: shapes as in `Tokens`; v is None if it is not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    i: Tensor
    f: Tensor

    def part(self, part: Part, R: int) -> Gradients:
        """View a part."""
        v = None if self.v is None else part.of(self.v)
        q, k, i, f = (part.of(x, R) for x in (self.q, self.k, self.i, self.f))
        return Gradients(q, k, v, i, f)


def differentiate_part(
    tokens: Tokens, kept: Kept, dh: Tensor, d_memory: Tensor, out: Gradients
) -> None:
    """Write the gradients of a part; docs/math.md, "Gradients".

    dh (B, H, T, Dv). d_memory (B, H, Dk, Dw): gradient of the memory after the part, changed in
    place to that of the memory before it.
    """
    chunks = InChunks.of(*tokens[:3], kept.scores.shape[-1], kept.scores.dtype)
    weights, sizes = Weights.of(kept.weights), chunks.sizes
    pairs, scores = weights.pairs.flatten(0, 1), kept.scores.flatten(0, 1)
    entering, d_out = kept.states[: -sizes.R], _output_grads(kept, dh, sizes)

    reading = chunks.reading_queries(weights)
    d_states = torch.empty_like(kept.states)
    torch.bmm(reading.mT, d_out, out=d_states[: -sizes.R])
    _carry_back(chunks, d_states, weights, d_memory)
    leaving = d_states[sizes.R :]

    d_scores = (chunks.of_group(d_out) @ chunks.v.mT).view_as(scores)
    d_sums = torch.empty_like(kept.weights).flatten(0, 1)  # of the log-weights
    d_pairs, d_read = Weights.of(d_sums)
    torch.mul(d_scores, scores, out=d_pairs)
    d_scores.mul_(pairs)
    dq = sizes.place(out.q, scores.dtype)
    _query_grads(chunks, weights, (d_out, entering, d_scores), reading, (dq.flatten(0, 1), d_read))
    del reading  # so that the keys' gradients can have its memory
    dk, d_write = _key_grads(chunks, weights, leaving, d_scores)
    if out.v is not None:
        dv = sizes.place(out.v, scores.dtype)
        rows = chunks.written_keys(weights), leaving.view(sizes.P, -1, sizes.Dv + 1)[..., :-1]
        torch.bmm(*rows, out=dv.flatten(0, 1))
        dv.flatten(0, 1).baddbmm_(chunks.of_group(scores).mT, chunks.of_group(d_out)[..., :-1])
        sizes.join(dv, out.v)

    # The weights of a chunk's last token are also those of the leaving state.
    d_pairs[:, -1] += d_write
    d_read[:, -1] += _dots(entering.flatten(1), leaving.flatten(1)) * weights.decay.flatten()
    di, df = gate_grads(d_sums, tokens.f, sizes)
    sizes.join(dq, out.q)
    sizes.join(dk, out.k)
    sizes.join(di, out.i)
    sizes.join(df, out.f)


def _output_grads(kept: Kept, dh: Tensor, sizes: Chunks) -> Tensor:
    """Return the gradients of numerators and denominators, (P R, L, Dw).

    For h = num / den: d_num = dh / den and d_den = -(d_num . num) / den. There is no square of den,
    which float32 cannot hold for den below 1e-19.
    """
    num, den = kept.outputs[..., :-1], kept.outputs[..., -1:]
    d_out = torch.empty_like(kept.outputs)
    d_num = d_out[..., :-1]
    torch.div(sizes.split(dh, num.dtype), den, out=d_num)
    torch.sum(d_num * num, dim=-1, keepdim=True, out=d_out[..., -1:]).div_(-den)
    return d_out.flatten(0, 1)


def _carry_back(chunks: InChunks, d_states: Tensor, weights: Weights, d_memory: Tensor) -> None:
    """Carry the gradients of the states (P R + R, Dk, Dw) and of the memory back, as `_carry`.

    Before: what each chunk adds to its entering state's, in the first P R. After: those of the
    leaving states, in the last P R.
    """
    R, like = chunks.sizes.R, d_memory.shape
    before = chunks.over_time(d_states[:-R])[:, 0].clone()
    leaving = chunks.over_time(d_states[R:])
    leaving[:, -1] = d_memory.view_as(before)
    decay = chunks.over_time(weights.decay.flatten())[..., None, None].unbind(1)
    steps = leaving.unbind(1)
    for c in reversed(range(len(steps) - 1)):
        steps[c].addcmul_(steps[c + 1], decay[c + 1])
    d_memory.copy_(before.addcmul_(steps[0], decay[0]).view(like))


def _query_grads(
    chunks: InChunks,
    weights: Weights,
    factors: tuple[Tensor, Tensor, Tensor],
    reading: Tensor,
    out: tuple[Tensor, Tensor],
) -> None:
    """Write the gradients of the queries and of their weights of the entering state.

    factors: those of the output (P R, L, Dw), the entering states, and the gradients of the
    products of queries and keys.
    """
    d_out, entering, d_products = factors
    dq, d_read = out
    torch.bmm(d_out, entering.mT, out=dq)
    torch.sum(reading.mul_(dq), dim=-1, out=d_read)
    dq.mul_(weights.read.flatten(0, 1).unsqueeze(-1)).baddbmm_(d_products, chunks.k)


def _key_grads(
    chunks: InChunks, weights: Weights, leaving: Tensor, d_products: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the keys (P, R, L, Dk) and of their weights in the leaving state.

    leaving (P R, Dk, Dw): gradients of the leaving states.
    """
    sizes = chunks.sizes
    d_written = chunks.v @ leaving.view(sizes.P, -1, sizes.Dv + 1).mT
    d_written = d_written.view(sizes.P, sizes.L, sizes.R, sizes.Dk).transpose(1, 2)
    if sizes.R == 1:
        dk = d_written.mul_(weights.write.unsqueeze(-1))
    else:
        dk = d_written.new_empty(d_written.shape)
        torch.mul(d_written, weights.write.unsqueeze(-1), out=dk)
    del d_written
    rows = dk.flatten(0, 1)
    d_write = (chunks.k * rows).sum(dim=-1)
    rows.baddbmm_(d_products.mT, chunks.q)
    return dk, d_write


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of each row of a with that of b, both (rows, columns)."""
    if a.device.type != "cpu":
        return (a * b).sum(dim=-1)
    out = a.new_empty(len(a))
    rows = max(1, PRODUCTS_AT_ONCE // a.shape[1])
    for x, y, product in zip(a.split(rows), b.split(rows), out.split(rows), strict=True):
        torch.sum(x * y, dim=-1, out=product)
    return out

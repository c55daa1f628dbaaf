"""Both passes of the chunkwise mLSTM: states over the chunks, then all chunks at once.

Letters here, beyond the legend in `xlstm_kernels`: C chunks of L tokens, R = H / G query heads of a
group, P = B G C chunks of all groups, X = R P chunks of all heads in the order (R, B, G, C), Dw =
Dv + 1 (v and a column of ones, which carries the normaliser). memory: the transpose of [C, n] in
docs/math.md, (Dw, Dk), because matrix products are slow where the length of a result's rows is one
more than a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xlstm_kernels.torch.carry import carry, carry_back
from xlstm_kernels.torch.weights import Chunks, Documents, Weights

CACHED = 1 << 22  # bytes that `_to_cache` is for


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

    def weights(self, weights: Weights) -> Weights:
        """View the part of the weights of a section."""
        L, at = weights.pairs.shape[-1], self.tokens
        return weights.part(self.rows, self.groups, slice(at.start // L, -(-at.stop // L)))


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
    (X + 1, Dw, Dk): the memory before each chunk.

    The weights lie section by section, and all else part by part.
    """

    weights: Tensor
    scores: Tensor
    outputs: Tensor
    states: Tensor

    @classmethod
    def empty(cls, sizes: Chunks, weighed: Chunks, like: Tensor) -> Kept:
        """Allocate it for all chunks of `sizes`, and weights for those of `weighed`."""
        X, L, Dw = sizes.P * sizes.R, sizes.L, sizes.Dv + 1
        return cls(
            like.new_empty(weighed.P * weighed.R, L * L + L),
            like.new_empty(X, L, L),
            like.new_empty(X, L, Dw),
            like.new_empty(X + 1, Dw, sizes.Dk),
        )

    def section(self, first: int, sizes: Chunks) -> Tensor:
        """View the weights of a section of `sizes`; `first` chunks of groups come before."""
        return self.weights[first * sizes.R : (first + sizes.P) * sizes.R]

    def part(self, first: int, sizes: Chunks) -> Passed:
        """View all else of a part of `sizes`; `first` chunks of groups come before."""
        start, end = first * sizes.R, (first + sizes.P) * sizes.R
        return Passed(self.scores[start:end], self.outputs[start:end], self.states[start : end + 1])


class Passed(NamedTuple):
    """What is kept of a part besides its weights, as in `Kept`.

    There is one state more than chunks, which is the next part's first.
    """

    scores: Tensor
    outputs: Tensor
    states: Tensor


class InChunks(NamedTuple):
    """Queries, keys and values of a part, chunk by chunk, in the dtype to compute in.

    q, k (B H C, L, Dk), in the order of the arguments; v (P, L, Dw), with its column of ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: Chunks

    @classmethod
    def of(cls, tokens: Tokens, part: Part, length: int, dtype: torch.dtype) -> InChunks:
        """Cut a part of a section's tokens into chunks of `length` tokens."""
        R = tokens.q.shape[1] // tokens.v.shape[1]
        q, k, v = part.of(tokens.q, R), part.of(tokens.k, R), part.of(tokens.v)
        (B, G, T, Dv), Dk = v.shape, q.shape[3]
        sizes = Chunks(B, G, R, T, Dk, Dv, length)
        wide = v.new_empty(B, G, sizes.C * length, Dv + 1, dtype=dtype)
        wide[:, :, :T, :Dv] = v
        wide[:, :, T:, :Dv] = 0.0
        wide[..., Dv] = 1.0
        return cls(sizes.rows(q, dtype), sizes.rows(k, dtype), wide.view(-1, length, Dv + 1), sizes)

    def weighed(self, x: Tensor, weights: Tensor) -> Tensor:
        """Multiply queries or keys x (B H C, L, Dk) by weights (R, B, G, C, L): (X, L, Dk)."""
        product = torch.empty_like(x)
        factors = self.sizes.in_order(x), weights.unsqueeze(-1)
        torch.mul(*factors, out=self.sizes.apart(product))
        return product

    def by_head(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """View tensors (X, ...) as (P, ...): for the first head of each group, the second, ..."""
        return zip(*(x.chunk(self.sizes.R) for x in tensors), strict=True)


def run_part(chunks: InChunks, weights: Weights, memory: Tensor, kept: Passed, h: Tensor) -> None:
    """Write h (B, H, T, Dv) and what the backward pass reads of a part.

    memory (B, H, Dw, Dk): before the part; changed in place to that after it.
    """
    sizes = chunks.sizes
    # What a chunk writes goes where the next chunk's state is. After a head's last chunk, that is
    # the first state of the next head, so `_carry` takes it out.
    written = chunks.weighed(chunks.k, weights.write)
    _to_cache(kept.states)
    for keys, update in chunks.by_head(written, kept.states[1:]):
        torch.bmm(chunks.v.mT, keys, out=update)
    del written  # so that the next products can have its memory
    _carry(sizes, kept.states, weights, memory)

    reading = chunks.weighed(chunks.q, weights.read)
    products = sizes.in_order(torch.bmm(chunks.q, chunks.k.mT))
    torch.mul(products, weights.pairs, out=sizes.apart(kept.scores))
    _to_cache(kept.outputs)
    torch.bmm(reading, kept.states[:-1].mT, out=kept.outputs)
    for out, scores in chunks.by_head(kept.outputs, kept.scores):
        out.baddbmm_(scores, chunks.v)
    num, den = kept.outputs[..., :-1], kept.outputs[..., -1:]
    den.masked_fill_(den == 0, torch.inf)  # so that h and its gradient are 0
    ratio = sizes.place(h, num.dtype)
    torch.div(sizes.apart(num), sizes.apart(den), out=sizes.in_order(ratio))
    sizes.join(ratio, h)


def _carry(sizes: Chunks, states: Tensor, weights: Weights, memory: Tensor) -> None:
    """Make states (X + 1, Dw, Dk) of the chunks' updates, and the memory the one after them."""
    heads = (-1, sizes.C)
    after = states[1:].unflatten(0, heads)[:, -1].clone()
    entering = states[:-1].unflatten(0, heads)
    memory = sizes.heads_in_order(memory)
    entering[:, 0].view(memory.shape).copy_(memory)
    decay = weights.decay.reshape(*heads, 1, 1)
    carry(entering, decay)
    memory.copy_(after.addcmul_(entering[:, -1], decay[:, -1]).view(memory.shape))


class Gradients(NamedTuple):
    """Where the gradients of queries, keys and values go; v is None if it is not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor | None

    def part(self, part: Part, R: int) -> Gradients:
        """View a part."""
        v = None if self.v is None else part.of(self.v)
        return Gradients(part.of(self.q, R), part.of(self.k, R), v)


def differentiate_part(
    chunks: InChunks,
    weights: tuple[Weights, Weights],
    kept: Passed,
    d: tuple[Tensor, Tensor],
    out: Gradients,
) -> None:
    """Write the gradients of a part; docs/math.md, "Gradients".

    weights: and where the gradients of their logarithms go. d: dh (B, H, T, Dv), and the gradient
    of the memory after the part (B, H, Dw, Dk), changed in place to that of the memory before it.
    """
    (dh, d_memory), (weights_of, d_sums), sizes = d, weights, chunks.sizes
    entering, d_out = kept.states[:-1], _output_grads(kept, dh, sizes)

    weighed = chunks.weighed(chunks.q, weights_of.read)
    d_states = torch.empty_like(kept.states)
    torch.bmm(d_out.mT, weighed, out=d_states[:-1])
    _carry_back(sizes, d_states, weights_of, d_memory)
    leaving = d_states[1:]
    d_products = _product_grads(chunks, weights_of, (d_out, kept.scores), d_sums.pairs)

    rows = torch.bmm(d_out, entering)  # of the queries that read the state
    torch.sum(sizes.apart(weighed.mul_(rows)), dim=-1, out=d_sums.read)
    del weighed  # so that what follows can have its memory
    _write_grads(sizes, (rows, weights_of.read), (d_products, chunks.k), out.q)

    weighed = chunks.weighed(chunks.k, weights_of.write)
    if out.v is not None:
        _write_value_grads(chunks, (weighed, leaving), (kept.scores, d_out), out.v)
    for d_state, d_keys in chunks.by_head(leaving, rows):
        torch.bmm(chunks.v, d_state, out=d_keys)
    # The weights of a chunk's last token are also those of the leaving state.
    d_sums.write.add_(sizes.apart(weighed.mul_(rows).sum(dim=-1)))
    del weighed
    shared = leaving.mul_(entering).sum(dim=(1, 2))
    d_sums.decay.addcmul_(sizes.apart(shared), weights_of.decay)
    _write_grads(sizes, (rows, weights_of.write), (d_products.mT, chunks.q), out.k)


def _output_grads(kept: Passed, dh: Tensor, sizes: Chunks) -> Tensor:
    """Return the gradients of numerators and denominators, (X, L, Dw).

    For h = num / den: d_num = dh / den and d_den = -(d_num . num) / den. There is no square of den,
    which float32 cannot hold for den below 1e-19.
    """
    num, den = kept.outputs[..., :-1], kept.outputs[..., -1:]
    d_out = torch.empty_like(kept.outputs)
    d_num, d_den = d_out[..., :-1], d_out[..., -1:]
    dh = sizes.in_order(sizes.rows(dh, num.dtype))
    torch.div(dh, sizes.apart(den), out=sizes.apart(d_num))
    torch.sum(d_num * num, dim=-1, keepdim=True, out=d_den).div_(-den)
    return d_out


def _carry_back(sizes: Chunks, d_states: Tensor, weights: Weights, d_memory: Tensor) -> None:
    """Carry the gradients of the states (X + 1, Dw, Dk) and of the memory back, as `_carry`.

    Before: what each chunk adds to its entering state's, in the first X. After: those of the
    leaving states, in the last X.
    """
    heads = (-1, sizes.C)
    before = d_states[:-1].unflatten(0, heads)[:, 0].clone()
    leaving = d_states[1:].unflatten(0, heads)
    d_memory = sizes.heads_in_order(d_memory)
    leaving[:, -1].view(d_memory.shape).copy_(d_memory)
    decay = weights.decay.reshape(*heads, 1, 1)
    carry_back(leaving, decay)
    d_memory.copy_(before.addcmul_(leaving[:, 0], decay[:, 0]).view(d_memory.shape))


def _product_grads(
    chunks: InChunks, weights: Weights, outputs: tuple[Tensor, Tensor], d_pairs: Tensor
) -> Tensor:
    """Return the gradients of the products of queries and keys, (B H C, L, L).

    outputs: the gradients of the outputs (X, L, Dw), and the scores (X, L, L). Writes the gradients
    of the pairs' log-weights to d_pairs (R, B, G, C, L, L).
    """
    d_out, scores = outputs
    sizes, d_scores = chunks.sizes, torch.empty_like(scores)
    for d_head, d_scores_of_head in chunks.by_head(d_out, d_scores):
        torch.bmm(d_head, chunks.v.mT, out=d_scores_of_head)
    torch.mul(sizes.apart(d_scores), sizes.apart(scores), out=d_pairs)
    d_products = torch.empty_like(scores)
    torch.mul(sizes.apart(d_scores), weights.pairs, out=sizes.in_order(d_products))
    return d_products


def _write_grads(
    sizes: Chunks, rows: tuple[Tensor, Tensor], products: tuple[Tensor, Tensor], out: Tensor
) -> None:
    """Write the gradients of the queries, or of the keys, to out (B, H, T, Dk).

    rows: what comes by the states, (X, L, Dk), and its weights (R, B, G, C, L). products: what is
    multiplied for that of other tokens, (B H C, L, L) and (B H C, L, Dk).
    """
    placed = sizes.place(out, rows[0].dtype)
    torch.mul(sizes.apart(rows[0]), rows[1].unsqueeze(-1), out=sizes.in_order(placed))
    placed.baddbmm_(*products)
    sizes.join(placed, out)


def _write_value_grads(
    chunks: InChunks, states: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor], out: Tensor
) -> None:
    """Write the gradients of the values to out (B, G, T, Dv): the sum over the heads of a group.

    states: the keys, weighed (X, L, Dk), and the gradients of the leaving states (X, Dw, Dk).
    pairs: the scores (X, L, L), and the gradients of the outputs (X, L, Dw).
    """
    placed = chunks.sizes.place(out, states[0].dtype)
    _to_cache(placed)
    for number, (keys, d_state, scores, d_out) in enumerate(chunks.by_head(*states, *pairs)):
        d_values = d_state[:, :-1].mT
        if number:
            placed.baddbmm_(keys, d_values)
        else:
            torch.bmm(keys, d_values, out=placed)
        placed.baddbmm_(scores.mT, d_out[..., :-1])
    chunks.sizes.join(placed, out)


def _to_cache(x: Tensor) -> None:
    """Bring memory that is about to be written to a CPU's cache.

    A batched product writes small matrices in an order that the CPU does not foresee. Measured: it
    takes up to twice the time where its result is not in the cache; filling it takes a tenth.
    """
    if x.device.type == "cpu" and x.nbytes <= CACHED:
        x.zero_()

"""Both passes of the chunkwise mLSTM: states over the chunks, then all chunks at once.

Letters here, beyond the legend in `xlstm_kernels`: C chunks of L tokens, R = H / G query heads of a
group, Dw = Dv + 1 (v and a column of ones, which carries the normaliser). memory: [C, n] of
docs/math.md, (Dk, Dw).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.torch.weights import Chunks, Documents, Weights, gate_grads, write_weights


class Tokens(NamedTuple):
    """A span of tokens; shapes as in `xlstm_kernels.mlstm`. documents: None for one a row."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor
    documents: Documents | None

    def span(self, at: slice) -> Tokens:
        """View some of the tokens."""
        documents = self.documents
        if documents is not None:
            entering = documents.runs[:, at.start - 1] if at.start else documents.entering
            documents = Documents(documents.runs[:, at], entering)
        q, k, v, i, f = (x[:, :, at] for x in self[:5])
        return Tokens(q, k, v, i, f, documents)


class Kept(NamedTuple):
    """What the backward pass reads of C chunks, in the dtype that they are computed in.

    weights (C, B, H, L L + L), as `Weights.of` reads it. scores (C, B, H, L, L): products of
    queries and keys, weighed. outputs (C, B, H, L, Dw): h, and the denominators, which are inf
    where they are 0. states (C + 1, B, H, Dk, Dw): the memory before each chunk and after the last.
    """

    weights: Tensor
    scores: Tensor
    outputs: Tensor
    states: Tensor

    @classmethod
    def empty(cls, sizes: Chunks, like: Tensor) -> Kept:
        """Allocate it for all chunks of `sizes`."""
        C, L, Dw, heads = sizes.C, sizes.L, sizes.Dv + 1, (sizes.B, sizes.G * sizes.R)
        return cls(
            like.new_empty(C, *heads, L * L + L),
            like.new_empty(C, *heads, L, L),
            like.new_empty(C, *heads, L, Dw),
            like.new_empty(C + 1, *heads, sizes.Dk, Dw),
        )

    def span(self, first: int, last: int) -> Kept:
        """View the chunks from `first` on, before `last`."""
        weights, scores, outputs = (x[first:last] for x in self[:3])
        return Kept(weights, scores, outputs, self.states[first : last + 1])


class InChunks(NamedTuple):
    """Queries, keys and values of a span, chunk by chunk, in the dtype to compute in.

    q, k (C B H, L, Dk); v (C B G, L, Dw), with its column of ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sizes: Chunks

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, length: int, dtype: torch.dtype) -> InChunks:
        """Cut a span (B, heads, T, features) into chunks of `length` tokens."""
        (B, H, T, Dk), (G, Dv) = q.shape, (v.shape[1], v.shape[3])
        sizes = Chunks(B, G, H // G, T, Dk, Dv, length)
        q, k, v = (sizes.split(x, dtype).flatten(0, 2) for x in (q, k, v))
        return cls(q, k, F.pad(v, (0, 1), value=1.0), sizes)

    def reading_queries(self, weights: Weights) -> Tensor:
        """Weigh the queries of the entering state, (C B H, L, Dk)."""
        return self.q * weights.read.flatten(0, 2).unsqueeze(-1)

    def written_keys(self, weights: Weights) -> Tensor:
        """Weigh the keys of the leaving state, (C B G, L, R Dk).

        The heads of a group share v. Their keys are the columns of one matrix, so that v is not
        repeated.
        """
        keys = self.k.view(-1, self.sizes.R, *self.k.shape[1:])
        weight = weights.write.view(*keys.shape[:3], 1)
        written = keys.new_empty(keys.shape[0], self.sizes.L, self.sizes.R, self.sizes.Dk)
        torch.mul(keys, weight, out=written.transpose(1, 2))
        return written.flatten(2)

    def of_group(self, x: Tensor) -> Tensor:
        """View x (C B H, rows, ...) as (C B G, R rows, ...): the rows of a group's heads."""
        return x.view(-1, self.sizes.R * x.shape[1], x.shape[2])


def run_span(tokens: Tokens, memory: Tensor, m: Tensor, kept: Kept, h: Tensor) -> Tensor:
    """Write h (B, H, T, Dv) and what the backward pass reads of a span of tokens.

    memory (B, H, Dk, Dw), m (B, H): before the span. Returns m after it; the memory after it is the
    last of kept.states.
    """
    q, k, v, i, f, documents = tokens
    chunks = InChunks.of(q, k, v, kept.scores.shape[-1], m.dtype)
    m = write_weights(i, f, documents, m, chunks.sizes, kept.weights)
    weights = Weights.of(kept.weights)

    kept.states[0] = memory
    updates = kept.states[1:].view(-1, chunks.sizes.R * chunks.sizes.Dk, memory.shape[-1])
    torch.bmm(chunks.written_keys(weights).mT, chunks.v, out=updates)
    _carry(kept.states.unbind(), weights)

    scores, out = kept.scores.flatten(0, 2), kept.outputs.flatten(0, 2)
    torch.bmm(chunks.q, chunks.k.mT, out=scores).mul_(weights.pairs.flatten(0, 2))
    torch.bmm(chunks.reading_queries(weights), kept.states[:-1].flatten(0, 2), out=out)
    chunks.of_group(out).baddbmm_(chunks.of_group(scores), chunks.v)
    num, den = kept.outputs[..., :-1], kept.outputs[..., -1]
    den.masked_fill_(den == 0, torch.inf)  # so that h and its gradient are 0
    num.div_(den.unsqueeze(-1))
    chunks.sizes.join(num, h)
    return m


def _carry(states: tuple[Tensor, ...], weights: Weights) -> None:
    """Add to each chunk's state the decayed one before it; states (B, H, Dk, Dw)."""
    decay = weights.decay[..., None, None].unbind()
    for c, decay_c in enumerate(decay):
        states[c + 1].addcmul_(states[c], decay_c)


class Gradients(NamedTuple):
    """Where the gradients of a span go: shapes as in `Tokens`; v is None if it is not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    i: Tensor
    f: Tensor

    def span(self, at: slice) -> Gradients:
        """View those of some of the tokens."""
        v = None if self.v is None else self.v[:, :, at]
        q, k, i, f = (x[:, :, at] for x in (self.q, self.k, self.i, self.f))
        return Gradients(q, k, v, i, f)


def differentiate_span(
    tokens: Tokens, kept: Kept, dh: Tensor, d_memory: Tensor, out: Gradients
) -> Tensor:
    """Write the gradients of a span of tokens; docs/math.md, "Gradients".

    dh (B, H, T, Dv). d_memory (B, H, Dk, Dw): gradient of the memory after the span. Returns that
    of the memory before it.
    """
    chunks = InChunks.of(*tokens[:3], kept.scores.shape[-1], kept.scores.dtype)
    weights, sizes, shape = Weights.of(kept.weights), chunks.sizes, kept.scores.shape[:3]
    pairs, scores = weights.pairs.flatten(0, 2), kept.scores.flatten(0, 2)
    entering, d_out = kept.states[:-1].flatten(0, 2), _output_grads(kept, dh, sizes)

    reading = chunks.reading_queries(weights)
    d_states = kept.states.new_empty(kept.states.shape)
    d_states[-1] = d_memory
    torch.bmm(reading.mT, d_out, out=d_states[:-1].flatten(0, 2))
    _carry_back(d_states.unbind(), weights)

    d_scores = (chunks.of_group(d_out) @ chunks.v.mT).view(scores.shape)
    d_pairs = d_scores * scores  # of the log-weights
    d_scores.mul_(pairs)
    dq = d_out @ entering.mT
    d_read = torch.linalg.vecdot(reading, dq)
    dq.mul_(weights.read.flatten(0, 2).unsqueeze(-1)).baddbmm_(d_scores, chunks.k)

    leaving = d_states[1:].view(-1, sizes.R * sizes.Dk, sizes.Dv + 1)
    d_written = (chunks.v @ leaving.mT).view(-1, sizes.L, sizes.R, sizes.Dk).transpose(1, 2)
    dk = torch.empty_like(chunks.k)
    write = weights.write.view(*d_written.shape[:3], 1)
    torch.mul(d_written, write, out=dk.view(d_written.shape))
    d_write = torch.linalg.vecdot(chunks.k, dk)
    dk.baddbmm_(d_scores.mT, chunks.q)

    if out.v is not None:
        dv = chunks.written_keys(weights) @ leaving[..., :-1]
        dv.baddbmm_(chunks.of_group(scores).mT, chunks.of_group(d_out)[..., :-1])
        sizes.join(dv.view(sizes.C, sizes.B, sizes.G, sizes.L, sizes.Dv), out.v)

    # The weights of a chunk's last token are also those of the leaving state.
    d_pairs[:, -1] += d_write
    d_decay = torch.linalg.vecdot(entering.flatten(1), d_states[1:].flatten(3).flatten(0, 2))
    d_read[:, -1] += d_decay * weights.decay.flatten()
    di, df = gate_grads(d_pairs.unflatten(0, shape), d_read.unflatten(0, shape), tokens.f, sizes)
    sizes.join(dq.unflatten(0, shape), out.q)
    sizes.join(dk.unflatten(0, shape), out.k)
    sizes.join(di, out.i)
    sizes.join(df, out.f)
    return d_states[0]


def _output_grads(kept: Kept, dh: Tensor, sizes: Chunks) -> Tensor:
    """Return the gradients of numerators and denominators, (C B H, L, Dw).

    For h = num / den: d_num = dh / den and d_den = -(d_num . h). There is no square of den, which
    float32 cannot hold for den below 1e-19.
    """
    h, den = kept.outputs[..., :-1], kept.outputs[..., -1:]
    d_out = torch.empty_like(kept.outputs)
    d_num = d_out[..., :-1]
    torch.div(sizes.split(dh, h.dtype), den, out=d_num)
    d_out[..., -1] = torch.linalg.vecdot(d_num, h).neg_()
    return d_out.flatten(0, 2)


def _carry_back(d_states: tuple[Tensor, ...], weights: Weights) -> None:
    """Add to the gradient of each chunk's state the decayed one after it."""
    decay = weights.decay[..., None, None].unbind()
    for c in reversed(range(len(decay))):
        d_states[c].addcmul_(d_states[c + 1], decay[c])

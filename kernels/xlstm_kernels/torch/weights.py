"""Weights of the chunkwise mLSTM: what each token takes from earlier ones and from the state.

Letters here, beyond the legend in `xlstm_kernels`: C chunks of L tokens, R = H / G query heads of a
group, P = B G C chunks of all groups. Chunks come in the order (B, G, C, R) everywhere: without
grouped heads, that is the order of the arguments, which are then not copied.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.state import LOG_ZERO


class Chunks(NamedTuple):
    """Sizes of a part of a call: T tokens of B rows and G groups, cut into chunks."""

    B: int
    G: int
    R: int
    T: int
    Dk: int
    Dv: int
    L: int

    @property
    def C(self) -> int:
        """Count the chunks of a head; the last one may be filled up."""
        return -(-self.T // self.L)

    @property
    def P(self) -> int:
        """Count the chunks of all groups."""
        return self.B * self.G * self.C

    @property
    def fill(self) -> int:
        """Count the tokens that fill the last chunk."""
        return -self.T % self.L

    def split(self, x: Tensor, dtype: torch.dtype, value: float = 0.0) -> Tensor:
        """Cut x (B, heads, T, ...) into chunks (P, heads / G, L, ...), filled up with `value`.

        A view where x is in that order, else a copy.
        """
        if self.fill:
            return self._split_filled(x, dtype, value)
        x = x.to(dtype).unflatten(2, (self.C, self.L)).unflatten(1, (self.G, -1)).transpose(2, 3)
        return x.contiguous().flatten(0, 2)

    def _split_filled(self, x: Tensor, dtype: torch.dtype, value: float) -> Tensor:
        """Cut x as `split` does, in one pass: filling it up before would copy it twice."""
        x = x.unflatten(1, (self.G, -1))  # (B, G, R, T, ...)
        shape = (self.B, self.G, self.C, x.shape[2], self.L, *x.shape[4:])
        out = torch.empty(shape, dtype=dtype, device=x.device)
        whole = self.T // self.L * self.L
        if whole:
            chunks = x[:, :, :, :whole].unflatten(3, (-1, self.L)).transpose(2, 3)
            out[:, :, :-1].copy_(chunks)
        out[:, :, -1, :, : self.T - whole].copy_(x[:, :, :, whole:])
        out[:, :, -1, :, self.T - whole :].fill_(value)
        return out.flatten(0, 2)

    def place(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor of chunks to compute in, for `join`: `out` itself where it can be."""
        heads, D = out.shape[1] // self.G, out.shape[3]
        shape = (self.P, heads, self.L, D)
        if heads == 1 and not self.fill and out.is_contiguous() and out.dtype == dtype:
            return out.view(shape)
        return out.new_empty(shape, dtype=dtype)

    def join(self, x: Tensor, out: Tensor) -> None:
        """Copy x (P, heads / G, L, ...) into out (B, heads, T, ...), without what fills x up."""
        if x.data_ptr() == out.data_ptr():
            return  # from `place`
        x = x.unflatten(0, (self.B, self.G, self.C)).transpose(2, 3)
        out = out.unflatten(1, (self.G, -1))
        if self.fill:
            out.copy_(x.flatten(3, 4)[:, :, :, : self.T])
        else:
            out.unflatten(3, (self.C, self.L)).copy_(x)


class Documents(NamedTuple):
    """Documents of a part: runs (B, T) numbers those of its tokens, entering (B,) the one before.

    The state that enters the part belongs to `entering`.
    """

    runs: Tensor
    entering: Tensor


class Weights(NamedTuple):
    """Weights exp(D - m_t) of what token t reads; each is at most 1.

    pairs (P, R, L, L): of token s at token t of its chunk, 0 where t does not see s. read
    (P, R, L): of the state that enters the chunk. The last token's weights are those of the
    state that leaves.
    """

    pairs: Tensor
    read: Tensor

    @classmethod
    def of(cls, held: Tensor) -> Weights:
        """View held (P, R, L L + L), which holds both in a row."""
        L = int(held.shape[-1] ** 0.5)  # L L + L is between L² and (L + 1)²
        return cls(held[..., : L * L].unflatten(-1, (L, L)), held[..., L * L :])

    @property
    def write(self) -> Tensor:
        """Return the weight of each token in the state that leaves its chunk (P, R, L)."""
        return self.pairs[..., -1, :]

    @property
    def decay(self) -> Tensor:
        """Return the weight of the entering state in the leaving one (P, R)."""
        return self.read[..., -1]


def write_weights(
    i: Tensor,
    f: Tensor,
    documents: Documents | None,
    m: Tensor,
    sizes: Chunks,
    held: Tensor,
) -> Tensor:
    """Write the weights of a part's chunks to held (P, R, L L + L), as `Weights.of` reads it.

    i, f (B, H, T); m (B, H): stabiliser of the state before the part. Returns that after it.

    The log-weight D_ts is the sum of log f over (s, t] plus i_s. Each sum is formed from its own
    terms, by a product with a 0/1 matrix. Differences of cumulative sums would cancel: one closed
    forget gate (log f = -60) would cost every later pair of the chunk its accuracy.
    """
    # Off the CPU a float32 product may be rounded to TF32; log-weights cannot be.
    exact = m.dtype if i.device.type == "cpu" else torch.float64
    # Tokens after the end keep the state as it is: f -> 1, i -> 0.
    log_f = F.logsigmoid(sizes.split(f, exact, -LOG_ZERO)).flatten(0, 1)
    causal, spans = (x.to(exact) for x in _pair_sums(sizes.L, i.device))
    if exact == held.dtype:
        torch.addmm(causal, log_f, spans, out=held.flatten(0, 1))
    else:
        held.copy_(torch.addmm(causal, log_f, spans).view_as(held))
    pairs, read = Weights.of(held)
    pairs += sizes.split(i, m.dtype, LOG_ZERO).unsqueeze(-2)
    if documents is not None:
        hidden, cut_off = _other_documents(documents, sizes)
        groups = (sizes.B, sizes.G, sizes.C)
        pairs.unflatten(0, groups).masked_fill_(hidden, LOG_ZERO)
        read.unflatten(0, groups).masked_fill_(cut_off, LOG_ZERO)
    m_in, m_end = _chunk_stabilisers(pairs[..., -1, :], read[..., -1], m, sizes)
    m_in = m_in.unsqueeze(-1)
    m_t = torch.maximum(pairs.amax(dim=-1), read + m_in)
    pairs -= m_t.unsqueeze(-1)
    # Relative to m_in: a sum with it would be rounded to m's size, at every chunk the same way.
    read -= m_t - m_in
    _exponentials_in_place(held)
    return m_end


def gate_grads(d_sums: Tensor, f: Tensor, sizes: Chunks) -> tuple[Tensor, Tensor]:
    """Return di and df, each (P, R, L), from the gradients of the log-weights.

    d_sums (P R, L L + L): as `Weights.of` reads it, what the leaving state adds to the last row
    included. f (B, H, T): preactivations.
    """
    L, dtype = sizes.L, d_sums.dtype
    exact = dtype if f.device.type == "cpu" else torch.float64
    _, spans = _pair_sums(L, f.device)
    # Only the pairs that a gate lies between enter its gradient, as they enter the sums.
    d_log_f = (d_sums.to(exact) @ spans.to(exact).T).to(dtype).unflatten(0, (sizes.P, -1))
    d_f = d_log_f * torch.sigmoid(-sizes.split(f, dtype))  # the derivative of log sigmoid
    return Weights.of(d_sums).pairs.sum(dim=-2).view_as(d_f), d_f


def _pair_sums(L: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what makes log-weights of a chunk's log f (L), as a constant and a matrix.

    causal (L L + L): LOG_ZERO where t does not see s. spans (L, L L + L): 1 where log f_r counts,
    which is s < r <= t. Columns: first the pairs (t, s), then the entering state at each t.
    """
    # Elsewhere a graph that is being captured would keep a constant that was never computed.
    return _cached_pair_sums(L) if device.type == "cpu" else _make_pair_sums(L, device)


def _make_pair_sums(L: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    at = torch.arange(L, device=device)
    r, t, s = at[:, None, None], at[:, None], at[None, :]
    between = ((s < r) & (r <= t)).flatten(1)  # (r, t s)
    since_start = r[:, 0] <= at  # (r, t)
    spans = torch.cat([between, since_start], dim=1).float()
    causal = torch.where(s <= t, 0.0, LOG_ZERO).flatten()
    return F.pad(causal, (0, L)), spans


@functools.lru_cache(maxsize=8)
def _cached_pair_sums(L: int) -> tuple[Tensor, Tensor]:
    return _make_pair_sums(L, None)


def _other_documents(documents: Documents, sizes: Chunks) -> tuple[Tensor, Tensor]:
    """Say which tokens and which entering states belong to another document than token t.

    Returns (B, 1, C, 1, L, L) and (B, 1, C, 1, L).
    """
    fill = documents.runs[:, -1:].expand(-1, sizes.fill)
    runs = torch.cat([documents.runs, fill], dim=1).unflatten(1, (sizes.C, sizes.L))  # (B, C, L)
    # The state that enters a chunk belongs to the document of the token before it.
    entering = torch.cat([documents.entering.unsqueeze(1), runs[:, :-1, -1]], dim=1)
    runs = runs[:, None, :, None]
    return runs.unsqueeze(-1) != runs.unsqueeze(-2), runs != entering[:, None, :, None, None]


def _exponentials_in_place(x: Tensor) -> None:
    """Compute exp(x), for x of at most 0.

    What is below the normal numbers becomes exactly 0. The vectorised exponential of the CPU is ten
    times slower there, and the tails of long chunks fall there. So clamp first, and set what was
    clamped to 0 afterwards.
    """
    floor = math.log(torch.finfo(x.dtype).tiny) + 1
    F.threshold(x.clamp_(min=floor).exp_(), 1.001 * math.exp(floor), 0.0, inplace=True)


def _chunk_stabilisers(
    last: Tensor, log_decay: Tensor, before: Tensor, sizes: Chunks
) -> tuple[Tensor, Tensor]:
    """Return the stabiliser m of the state that enters each chunk, and of the one that leaves.

    last (P, R, L): log-weights of each chunk's tokens at its end. log_decay (P, R): of the state
    that enters it. before (B, H): m of the state before them. Returns (P, R) and (B, H).
    """
    steps = (sizes.B * sizes.G, sizes.C)
    largest = last.amax(dim=-1).unflatten(0, steps).unbind(1)
    decays = log_decay.unflatten(0, steps).unbind(1)
    m = [before.reshape(-1, sizes.R)]
    for largest_c, log_decay_c in zip(largest, decays, strict=True):
        m.append(torch.maximum(log_decay_c + m[-1], largest_c))
    return torch.stack(m[:-1], dim=1).flatten(0, 1), m[-1].view(before.shape)

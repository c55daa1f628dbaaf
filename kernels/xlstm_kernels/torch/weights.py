"""Weights of the chunkwise mLSTM: what each token takes from earlier ones and from the state.

Letters here, beyond the legend in `xlstm_kernels`: C chunks of L tokens, R = H / G query heads of a
group, P = B G C chunks of all groups, X = R P chunks of all heads. Chunks come in the order
(R, B, G, C): first those of the first head of every group. So those that share v are in a row for
each r, and v is not repeated. Without grouped heads, that is the order of the arguments.
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
    """Sizes of a call or a part of it: T tokens of B rows and G groups, cut into chunks."""

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

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut x (B, heads, T, D) into chunks (B heads C, L, D), with zeros after the end.

        A view where x has that dtype and order, else a copy.
        """
        if self.fill:
            filled = x.new_zeros(*x.shape[:2], self.C * self.L, x.shape[3], dtype=dtype)
            filled[:, :, : self.T] = x
            x = filled
        return x.to(dtype).unflatten(2, (self.C, self.L)).flatten(0, 2)

    def place(self, out: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what `rows` would, to be written: `out` itself where it can be, else new."""
        shape = (out.shape[0] * out.shape[1] * self.C, self.L, out.shape[3])
        if not self.fill and out.is_contiguous() and out.dtype == dtype:
            return out.view(shape)
        return out.new_empty(shape, dtype=dtype)

    def join(self, x: Tensor, out: Tensor) -> None:
        """Copy rows (B heads C, L, D) to out (B, heads, T, D), without what fills them up."""
        if x.data_ptr() == out.data_ptr():
            return  # from `place`
        out.copy_(x.view(*out.shape[:2], -1, out.shape[3])[:, :, : self.T])

    # `view` with all lengths: `unflatten` takes several times as long, and a call has hundreds.
    def in_order(self, x: Tensor) -> Tensor:
        """View rows x (B H C, ...) in the order of chunks, (R, B, G, C, ...)."""
        return x.view(self.B, self.G, self.R, self.C, *x.shape[1:]).movedim(2, 0)

    def apart(self, x: Tensor) -> Tensor:
        """View x (X, ...) as (R, B, G, C, ...)."""
        return x.view(self.R, self.B, self.G, self.C, *x.shape[1:])

    def heads_in_order(self, x: Tensor) -> Tensor:
        """View x (B, H, ...) as (R, B, G, ...)."""
        return x.view(self.B, self.G, self.R, *x.shape[2:]).movedim(2, 0)

    def gates(self, x: Tensor, dtype: torch.dtype, value: float) -> Tensor:
        """Cut x (B, H, T) into chunks (X, L), filled up with `value`."""
        x = F.pad(x.to(dtype), (0, self.fill), value=value)
        return self.heads_in_order(x).reshape(-1, self.L)

    def join_gates(self, x: Tensor, out: Tensor) -> None:
        """Copy x (X, L) to out (B, H, T), without what fills x up."""
        x = x.view(self.R, self.B, self.G, -1)[..., : self.T]
        self.heads_in_order(out).copy_(x)


class Documents(NamedTuple):
    """Documents of a section: runs (B, T) numbers those of its tokens; entering (B,): one before.

    The state that enters the section belongs to `entering`.
    """

    runs: Tensor
    entering: Tensor


class Weights(NamedTuple):
    """Weights exp(D - m_t) of what token t reads; each is at most 1, but for rounding.

    pairs (R, B, G, C, L, L): of token s at token t of its chunk, 0 where t does not see s. read
    (R, B, G, C, L): of the state that enters the chunk. The last token's weights are those of the
    state that leaves.
    """

    pairs: Tensor
    read: Tensor

    @classmethod
    def of(cls, held: Tensor, sizes: Chunks) -> Weights:
        """View held (X, L L + L), which holds both in a row."""
        pairs, read = _pairs_and_read(held)
        return cls(sizes.apart(pairs), sizes.apart(read))

    def part(self, rows: slice, groups: slice, chunks: slice) -> Weights:
        """View those of some rows, groups and chunks."""
        at = slice(None), rows, groups, chunks
        return Weights(self.pairs[at], self.read[at])

    @property
    def write(self) -> Tensor:
        """Return the weight of each token in the state that leaves its chunk, (R, B, G, C, L)."""
        return self.pairs[..., -1, :]

    @property
    def decay(self) -> Tensor:
        """Return the weight of the entering state in the leaving one, (R, B, G, C)."""
        return self.read[..., -1]


def _pairs_and_read(held: Tensor) -> tuple[Tensor, Tensor]:
    """View held (X, L L + L) as the weights of pairs (X, L, L) and of the entering state (X, L)."""
    L = int(held.shape[-1] ** 0.5)  # L L + L is between L² and (L + 1)²
    return held[..., : L * L].unflatten(-1, (L, L)), held[..., L * L :]


def write_weights(
    i: Tensor,
    f: Tensor,
    documents: Documents | None,
    m: Tensor,
    sizes: Chunks,
    held: Tensor,
) -> Tensor:
    """Write the weights of a section's chunks to held (X, L L + L), as `Weights.of` reads it.

    i, f (B, H, T); m (B, H): stabiliser of the state before the section. Returns that after it.

    The log-weight D_ts is the sum of log f over (s, t] plus i_s. Each sum is formed from its own
    terms, by a product with a 0/1 matrix. Differences of cumulative sums would cancel: one closed
    forget gate (log f = -60) would cost every later pair of the chunk its accuracy.
    """
    # Off the CPU a float32 product may be rounded to TF32; log-weights cannot be.
    exact = m.dtype if i.device.type == "cpu" else torch.float64
    # Tokens after the end keep the state as it is: f -> 1, i -> 0.
    log_f = F.logsigmoid(sizes.gates(f, exact, -LOG_ZERO))
    causal, spans = (x.to(exact) for x in _pair_sums(sizes.L, i.device))
    if exact == held.dtype:
        torch.addmm(causal, log_f, spans, out=held)
    else:
        held.copy_(torch.addmm(causal, log_f, spans))
    pairs, read = _pairs_and_read(held)
    pairs += sizes.gates(i, m.dtype, LOG_ZERO).unsqueeze(-2)
    if documents is not None:
        hidden, cut_off = _other_documents(documents, sizes)
        sizes.apart(pairs).masked_fill_(hidden, LOG_ZERO)
        sizes.apart(read).masked_fill_(cut_off, LOG_ZERO)
    m_in, m_out, m_end = _chunk_stabilisers(pairs[:, -1], read[:, -1], m, sizes)
    m_in = m_in.unsqueeze(-1)
    m_t = torch.maximum(pairs.amax(dim=-1), read + m_in)
    # The state that leaves has the stabiliser that the next chunk takes it to have, to the last
    # digit. It was summed up in another order.
    m_t[:, -1] = m_out
    pairs -= m_t.unsqueeze(-1)
    # Relative to m_in: a sum with it would be rounded to m's size, at every chunk the same way.
    read -= m_t - m_in
    _exponentials_in_place(held)
    return m_end


def gate_grads(d_sums: Tensor, f: Tensor, sizes: Chunks) -> tuple[Tensor, Tensor]:
    """Return di and df, each (X, L), from the gradients of the log-weights.

    d_sums (X, L L + L): as `Weights.of` reads it, what the leaving state adds to the last row
    included. f (B, H, T): preactivations.
    """
    L, dtype = sizes.L, d_sums.dtype
    exact = dtype if f.device.type == "cpu" else torch.float64
    _, spans = _pair_sums(L, f.device)
    # Only the pairs that a gate lies between enter its gradient, as they enter the sums.
    d_log_f = (d_sums.to(exact) @ spans.to(exact).T).to(dtype)
    d_f = d_log_f * torch.sigmoid(-sizes.gates(f, dtype, 0.0))  # the derivative of log sigmoid
    return _pairs_and_read(d_sums)[0].sum(dim=-2), d_f


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

    Returns (B, 1, C, L, L) and (B, 1, C, L).
    """
    fill = documents.runs[:, -1:].expand(-1, sizes.fill)
    runs = torch.cat([documents.runs, fill], dim=1).unflatten(1, (sizes.C, sizes.L))  # (B, C, L)
    # The state that enters a chunk belongs to the document of the token before it.
    entering = torch.cat([documents.entering.unsqueeze(1), runs[:, :-1, -1]], dim=1)
    runs = runs.unsqueeze(1)
    return runs.unsqueeze(-1) != runs.unsqueeze(-2), runs != entering[:, None, :, None]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stabiliser m of the states that enter and leave each chunk, and of the last one.

    last (X, L): log-weights of each chunk's tokens at its end. log_decay (X,): of the state that
    enters it. before (B, H): m of the state before them. Returns (X,), (X,) and (B, H).

    m_c = max(log_decay_c + m_(c-1), largest_c), for all chunks in log2 C steps: after each, a
    chunk's largest and decay are those of twice as many chunks up to it.
    """
    pairs = torch.stack([last.amax(dim=-1), log_decay]).view(2, -1, sizes.C)
    pairs, done = pairs.permute(2, 0, 1).contiguous(), 1  # (C, 2, heads)
    while done < sizes.C:
        earlier, later = pairs.narrow(0, 0, sizes.C - done), pairs.narrow(0, done, sizes.C - done)
        joined = earlier + later.narrow(1, 1, 1)
        largest = joined.select(1, 0)
        torch.maximum(largest, later.select(1, 0), out=largest)
        pairs = torch.cat([pairs.narrow(0, 0, done), joined])
        done *= 2
    start = sizes.heads_in_order(before).reshape(1, -1)
    m = torch.cat([start, torch.maximum(pairs[:, 0], pairs[:, 1] + start)]).T  # (heads, C + 1)
    end = m[:, -1].view(sizes.R, sizes.B, sizes.G).movedim(0, 2)
    return m[:, :-1].flatten(), m[:, 1:].flatten(), end.reshape(before.shape)

"""What decoding carries from token to token: the mLSTM state, and the ring of keys and values."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Log-weight of nothing. It is finite, so that the difference of two of them is a number and not
# nan, and so low that its exponential is 0.
LOG_ZERO = -1e30


class MLSTMState(NamedTuple):
    """State of the mLSTM recurrence, stored divided by exp(m).

    C (B, H, Dk, Dv): matrix memory. n (B, H, Dk): normaliser. m (B, H): stabiliser in log space,
    always detached. The memory of the recurrence is exp(m) * C and its normaliser exp(m) * n; see
    docs/math.md, "Stabilised recurrence".
    """

    C: Tensor
    n: Tensor
    m: Tensor

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MLSTMState:
        """Make the state before the first token: C = n = 0, and m = LOG_ZERO."""
        return cls(
            C=torch.zeros(batch, heads, key_dim, value_dim, dtype=dtype, device=device),
            n=torch.zeros(batch, heads, key_dim, dtype=dtype, device=device),
            m=torch.full((batch, heads), LOG_ZERO, dtype=dtype, device=device),
        )


class Ring(NamedTuple):
    """Keys and values that decoding still needs: N slots of sinks, then a ring of W slots.

    keys (B, G, N + W, D), values (B, G, N + W, Dv). lengths (B,), int64: tokens of the document so
    far. What a slot holds follows from them (`held_positions`).

    The token at position p is in slot N + p mod W until a later one overwrites it. The first N
    tokens are also in slots 0 to N - 1, for good.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    @classmethod
    def empty(
        cls,
        batch: int,
        groups: int,
        key_dim: int,
        value_dim: int,
        *,
        window: int,
        sinks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Ring:
        """Make a ring that holds nothing."""
        slots = sinks + window
        return cls(
            keys=torch.zeros(batch, groups, slots, key_dim, dtype=dtype, device=device),
            values=torch.zeros(batch, groups, slots, value_dim, dtype=dtype, device=device),
            lengths=torch.zeros(batch, dtype=torch.int64, device=device),
        )


def held_positions(lengths: Tensor, window: int, sinks: int) -> Tensor:
    """Find the position, in its document, of the token that each slot of a ring holds.

    lengths (B,) -> (B, N + W) int64; -1 where the slot is empty.
    """
    sink = torch.arange(sinks, device=lengths.device)
    slot = torch.arange(window, device=lengths.device)
    last = lengths[:, None] - 1
    # Slot r of the ring holds the latest position p <= last with p mod W = r.
    in_ring = last - (last - slot) % window
    held = torch.cat([sink.expand(len(lengths), -1), in_ring], dim=1)
    return torch.where(held < lengths[:, None], held, -1).clamp_min(-1)


class RingSlots(NamedTuple):
    """Where one token goes in a ring, and what it sees; the same for all rings of a window.

    before (B,), int64: tokens of the document before it. places (B, 2): the slots that take it, the
    second of which differs from the first where it is a sink. bias (B, 1, 1, N + W): 0 where it
    sees the slot, itself included, else -inf.
    """

    before: Tensor
    places: Tensor
    bias: Tensor

    @classmethod
    def of(cls, before: Tensor, window: int, sinks: int, dtype: torch.dtype) -> RingSlots:
        """Find the slots of the token that comes after `before` (B,) others; bias in `dtype`."""
        ring_slot = sinks + before % window
        # Once the sinks are full, the second slot is the first again: shapes do not depend on data.
        sink_slot = torch.where(before < sinks, before, ring_slot)
        hidden = _seen_from(window, sinks, before) > before[:, None, None, None]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=before.device)
        places = torch.stack([ring_slot, sink_slot], dim=1)
        return cls(before, places, bias.masked_fill_(hidden, -torch.inf))


def _seen_from(window: int, sinks: int, like: Tensor) -> Tensor:
    """Return after how many tokens of a document each slot of a ring is read, (N + W,).

    A sink that is still in the window is read from the ring only, so that it counts once.
    """
    # Elsewhere a graph that is being captured would keep a constant that was never computed; and a
    # fake tensor, which has no numbers, must not be kept for later calls.
    real = like.device.type == "cpu" and type(like) is Tensor
    if real and not torch.compiler.is_compiling():
        return _cached_seen_from(window, sinks)
    return _make_seen_from(window, sinks, like.device)


def _make_seen_from(window: int, sinks: int, device: torch.device | None) -> Tensor:
    slot = torch.arange(sinks + window, device=device)
    return torch.where(slot < sinks, slot + window, slot - sinks)


@functools.lru_cache(maxsize=16)
def _cached_seen_from(window: int, sinks: int) -> Tensor:
    return _make_seen_from(window, sinks, None)


def state_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that the operators compute in: float64 if any input is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32

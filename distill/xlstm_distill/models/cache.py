"""The student's decoding cache: an mLSTM state, and a ring of recent keys and values, per layer.

Its size does not depend on the number of tokens seen. Decoding updates every tensor in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from xlstm_distill.models.segments import RowEnds
from xlstm_kernels import MLSTMState, Ring
from xlstm_kernels.state import LOG_ZERO


class MixerCacheLayer(CacheLayerMixin):
    """Decoding state of one mixer: what `xlstm_kernels.hybrid_step` updates.

    state: memory of the mLSTM. ring: keys and values of the window and the sinks. Each is None
    before the first token, and stays None where the mixer lacks the branch that needs it.
    seen: tokens per row, padding included; the mixer counts them.
    """

    is_sliding = False

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.seen = 0
        self.state: MLSTMState | None = None
        self.ring: Ring | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring for keys (B, G, *, D) and values (B, G, *, Dv), in their dtype."""
        batch, groups, _, key_dim = key_states.shape
        self.ring = Ring.empty(
            batch,
            groups,
            key_dim,
            value_states.shape[-1],
            window=self.window,
            sinks=self.sinks,
            dtype=key_states.dtype,
            device=key_states.device,
        )
        self.is_initialized = True

    def ring_for(self, keys: Tensor, values: Tensor) -> Ring:
        """Return the ring; allocate it first if needed, for keys and values (B, G, *, D)."""
        if self.ring is None:
            self.lazy_initialization(keys, values)
        assert self.ring is not None
        return self.ring

    def state_for(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> MLSTMState:
        """Return the mLSTM's state; allocate it first if needed.

        keys (B, H, *, Dk) after the feature map, values (B, G, *, Dv).
        """
        if self.state is None:
            batch, heads, _, key_dim = keys.shape
            self.state = MLSTMState.zeros(
                batch, heads, key_dim, values.shape[-1], dtype=dtype, device=keys.device
            )
            self.is_initialized = True
        return self.state

    @torch.no_grad()
    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Fill the ring from a chunk of T tokens, (B, G, T, D), and return all slots of the ring.

        segment_ids (B, T): rows whose first id is 0 continue the document that is held, others
        begin one. Only the last document of a row is kept: no later token sees an earlier one.
        What is held is constant: no gradient flows into it.
        """
        ring = self.ring_for(key_states, value_states)
        tokens = key_states.shape[2]
        start, before = _last_document(ring, tokens, segment_ids)
        lengths = before + tokens - start  # (B,)
        wanted = self._slot_positions(lengths)  # (B, N + W)
        # Index into the chunk. A negative one means that the slot already holds its token.
        source = start[:, None] + wanted - before[:, None]
        is_new = (wanted >= 0) & (source >= 0)
        index = source.clamp(0, tokens - 1)
        for slots, new in ((ring.keys, key_states), (ring.values, value_states)):
            slots.copy_(torch.where(is_new[:, None, :, None], _gather(new, index), slots))
        ring.positions.copy_(wanted)
        ring.lengths.copy_(lengths)
        return ring.keys, ring.values

    def _slot_positions(self, lengths: Tensor) -> Tensor:
        """Find the position that each slot holds after `lengths` (B,) tokens, (B, N + W).

        It is -1 where the slot is empty.
        """
        sinks = torch.arange(self.sinks, device=lengths.device)
        slots = torch.arange(self.window, device=lengths.device)
        last = lengths[:, None] - 1
        # Slot r of the ring holds the latest position p <= last with p mod W = r.
        in_ring = last - (last - slots) % self.window
        wanted = torch.cat([sinks.expand(len(lengths), -1), in_ring], dim=1)
        return torch.where(wanted < lengths[:, None], wanted, -1).clamp_min(-1)

    def restart_ring(self, segment_ids: Tensor) -> None:
        """Empty the ring in rows that begin a document: first id not 0, (B, T)."""
        assert self.ring is not None
        begins = segment_ids[:, 0] != 0
        # Some backends find the filled slots by positions, some by lengths. Keys may stay.
        self.ring.positions.masked_fill_(begins[:, None], -1)
        self.ring.lengths.masked_fill_(begins, 0)

    def restart_state(self, segment_ids: Tensor) -> None:
        """Empty the mLSTM's state in rows that begin a document: first id not 0, (B, T)."""
        assert self.state is not None
        begins = segment_ids[:, 0] != 0
        self.state.C.masked_fill_(begins[:, None, None, None], 0)
        self.state.n.masked_fill_(begins[:, None, None], 0)
        self.state.m.masked_fill_(begins[:, None], LOG_ZERO)

    def prefix(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the held tokens in document order.

        Keys, values (B, G, N + W, D) and their validity (B, N + W) bool. Invalid slots come first,
        so that valid tokens adjoin the chunk that follows.
        """
        ring = self.ring
        assert ring is not None
        # A sink that is still in the window has two slots. Only the one in the ring counts.
        oldest = (ring.lengths - self.window)[:, None]
        in_ring = torch.arange(ring.positions.shape[1], device=oldest.device) >= self.sinks
        held = torch.where(in_ring | (ring.positions < oldest), ring.positions, -1)
        order = held.argsort(dim=1, stable=True)
        valid = held.gather(1, order) >= 0
        return _gather(ring.keys, order), _gather(ring.values, order), valid

    def get_seq_length(self) -> int:
        """Tokens seen per row, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset a mask would have; the mixer itself takes no mask."""
        return self.seen + query_length, 0

    def tensors(self) -> list[Tensor]:
        """All tensors that are held, rows first."""
        return [*(self.ring or ()), *(self.state or ())]

    def nbytes(self) -> int:
        """Bytes held, a constant from the first token on."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def reset(self) -> None:
        """Forget everything."""
        # The tensors go, not only their content: the next use may have another batch size or dtype.
        self.is_initialized, self.seen = False, 0
        self.ring, self.state = None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a state cannot give back what it has taken in."""
        raise ValueError(
            f"crop: {tokens_to_remove} tokens cannot be taken back from a student's cache; decode"
            " without an assistant and without prompt_lookup_num_tokens, or keep a copy"
            " (copy.deepcopy) to go back to."
        )

    def _select(self, index: Tensor) -> None:
        """Keep the given rows, in this order."""
        if self.ring is not None:
            self.ring = Ring(*(t.index_select(0, index.to(t.device)) for t in self.ring))
        if self.state is not None:
            self.state = MLSTMState(*(t.index_select(0, index.to(t.device)) for t in self.state))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if held := self.tensors():
            rows = torch.arange(len(held[0]), device=held[0].device)
            self._select(rows.repeat_interleave(repeats))


def _last_document(ring: Ring, tokens: int, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find where in a chunk each row's last document begins, (B,).

    Also returns how many of its tokens, (B,), came before the chunk.
    """
    if segment_ids is None:
        return torch.zeros_like(ring.lengths), ring.lengths.clone()
    in_last = segment_ids == segment_ids[:, -1:]
    # An id may occur twice in a row; only the run of equal ids at the end is the last document.
    run = in_last.long().flip(1).cumprod(dim=1).sum(dim=1)
    start = tokens - run
    is_new = (start > 0) | (segment_ids[:, 0] != 0)
    return start, torch.where(is_new, 0, ring.lengths)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens of x (B, G, T, D) by index (B, S): (B, G, S, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class StudentCache(Cache):
    """One `MixerCacheLayer` per layer, and how the rows end (None before the first token)."""

    def __init__(self, windows: Sequence[int], sinks: int) -> None:
        super().__init__(layers=[MixerCacheLayer(window, sinks) for window in windows])
        self.ends: RowEnds | None = None

    def end_rows(self, ends: RowEnds) -> None:
        """Copy how the rows end now, in place where the cache holds it already.

        The cache never keeps a view: callers may change their positions and masks in place.
        """
        position, padding, segment = self.ends or (None, None, None)
        self.ends = RowEnds(
            position=_copied(ends.position, position),
            padding=None if ends.padding is None else _copied(ends.padding, padding),
            segment=None if ends.segment is None else _copied(ends.segment, segment),
        )

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, MixerCacheLayer))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.ends = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        super().reorder_cache(beam_idx)
        self._select_ends(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        super().batch_select_indices(indices)
        self._select_ends(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.ends is not None:
            rows = torch.arange(len(self.ends.position), device=self.ends.position.device)
            self._select_ends(rows.repeat_interleave(repeats))

    def _select_ends(self, index: Tensor) -> None:
        if self.ends is not None:
            self.ends = self.ends.select(index)


def _copied(new: Tensor, held: Tensor | None) -> Tensor:
    """Copy `new` into the tensor that is held, or into one of its own."""
    return new.clone() if held is None else held.copy_(new)


def checked_cache(cache: Any) -> StudentCache:
    """Return the cache if it can hold the state of mixers.

    Raises:
        ValueError: it is of another class.
    """
    if not isinstance(cache, StudentCache):
        raise ValueError(
            f"past_key_values: {type(cache).__name__} cannot hold a mixer's state;"
            " pass student.new_cache(), or nothing."
        )
    return cache

"""The student's decoding state: an mLSTM state, the first `sinks` and the last `window` keys and values per layer.

Memory does not depend on the number of tokens seen, and every tensor is updated in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from xlstm_distill.models.segments import RowEnds
from xlstm_kernels import MLSTMState
from xlstm_kernels.state import LOG_ZERO


class MixerCacheLayer(CacheLayerMixin):
    """Decoding state of one mixer.

    Slots of `keys`, `values` (B, G, N + W, D) and `positions` (B, N + W): first the document's N sinks, then a ring in
    which the token at position p of its document lies at p mod W. An empty slot has position -1. `lengths` (B,) counts
    the tokens of each row's current document, `seen` all tokens of the row, padding included.
    """

    is_sliding = False

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.seen = 0
        self.state: MLSTMState | None = None
        self.keys: Tensor
        self.values: Tensor
        self.positions: Tensor
        self.lengths: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the slots for keys (B, G, *, D) and values (B, G, *, Dv) of this dtype and device."""
        batch, groups, _, dim = key_states.shape
        slots, device = self.sinks + self.window, key_states.device
        self.keys = key_states.new_zeros(batch, groups, slots, dim)
        self.values = value_states.new_zeros(batch, groups, slots, value_states.shape[-1])
        self.positions = torch.full((batch, slots), -1, dtype=torch.long, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.is_initialized = True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Take in T new tokens (B, G, T, D); only what the row's last document needs is kept. Returns all slots.

        segment_ids (B, T): rows whose first id is 0 continue the document that is held, others begin one.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] == 1:
            self._append_token(key_states, value_states, segment_ids)
        else:
            self._append_chunk(key_states, value_states, segment_ids)
        self.seen += key_states.shape[2]
        return self.keys, self.values

    def restart_state(self, segment_ids: Tensor) -> None:
        """Empty the mLSTM's state in rows where a document begins with the chunk."""
        assert self.state is not None
        new = segment_ids[:, 0] != 0
        self.state.C.masked_fill_(new[:, None, None, None], 0)
        self.state.n.masked_fill_(new[:, None, None], 0)
        self.state.m.masked_fill_(new[:, None], LOG_ZERO)

    def _append_token(self, key: Tensor, value: Tensor, segment_ids: Tensor | None) -> None:
        """Write one token per row into the ring, and into the sinks while the document is younger than N."""
        if segment_ids is not None:
            self.positions.masked_fill_(segment_ids != 0, -1)
            self.lengths.masked_fill_(segment_ids[:, 0] != 0, 0)
        ring = self.sinks + self.lengths % self.window  # (B,)
        slots = torch.stack(
            [ring, torch.where(self.lengths < self.sinks, self.lengths, ring)], dim=1
        )  # (B, 2)
        index = slots[:, None, :, None]
        self.keys.scatter_(
            2, index.expand(-1, key.shape[1], -1, key.shape[3]), key.expand(-1, -1, 2, -1)
        )
        self.values.scatter_(
            2, index.expand(-1, value.shape[1], -1, value.shape[3]), value.expand(-1, -1, 2, -1)
        )
        self.positions.scatter_(1, slots, self.lengths[:, None].expand(-1, 2))
        self.lengths.add_(1)

    def _append_chunk(self, keys: Tensor, values: Tensor, segment_ids: Tensor | None) -> None:
        """Gather, for every slot, the token that belongs there after the chunk."""
        tokens = keys.shape[2]
        start, before = self._last_document(tokens, segment_ids)
        lengths = before + tokens - start  # (B,)
        wanted = self._slot_positions(lengths)  # (B, N + W)
        source = (
            start[:, None] + wanted - before[:, None]
        )  # index into the chunk; negative: already in the slot
        fresh = (wanted >= 0) & (source >= 0)
        index = source.clamp(0, tokens - 1)[:, None, :, None]
        for slots, new in ((self.keys, keys), (self.values, values)):
            taken = new.gather(2, index.expand(-1, new.shape[1], -1, new.shape[3]))
            slots.copy_(torch.where(fresh[:, None, :, None], taken, slots))
        self.positions.copy_(wanted)
        self.lengths.copy_(lengths)

    def _last_document(self, tokens: int, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """First chunk index of each row's last document, and how many of its tokens came before the chunk."""
        if segment_ids is None:
            return torch.zeros_like(self.lengths), self.lengths.clone()
        start = tokens - (segment_ids == segment_ids[:, -1:]).long().flip(1).cumprod(dim=1).sum(
            dim=1
        )
        return start, torch.where((start > 0) | (segment_ids[:, 0] != 0), 0, self.lengths)

    def _slot_positions(self, lengths: Tensor) -> Tensor:
        """Position held by each slot of a document with `lengths` tokens, -1 where empty: (B,) -> (B, N + W)."""
        sink = torch.arange(self.sinks, device=lengths.device)
        ring = torch.arange(self.window, device=lengths.device)
        last = lengths[:, None] - 1
        in_ring = last - (last - ring) % self.window
        wanted = torch.cat([sink.expand(len(lengths), -1), in_ring], dim=1)
        return torch.where(wanted < lengths[:, None], wanted, -1).clamp_min(-1)

    def visible(self) -> Tensor:
        """Slots that the newest token attends to, (B, N + W) bool: a sink that is still in the ring counts once."""
        oldest = (self.lengths - self.window)[:, None]
        in_ring = torch.arange(self.sinks + self.window, device=self.lengths.device) >= self.sinks
        return (self.positions >= 0) & (in_ring | (self.positions < oldest))

    def prefix(self) -> tuple[Tensor, Tensor, Tensor]:
        """Held tokens in document order: keys, values (B, G, N + W, D) and their validity (B, N + W).

        Invalid slots come first, so that valid tokens adjoin the chunk that follows.
        """
        held = torch.where(self.visible(), self.positions, -1)
        order = held.argsort(dim=1, stable=True)
        index = order[:, None, :, None]
        keys = self.keys.gather(2, index.expand(-1, self.keys.shape[1], -1, self.keys.shape[3]))
        values = self.values.gather(
            2, index.expand(-1, self.values.shape[1], -1, self.values.shape[3])
        )
        return keys, values, held.gather(1, order) >= 0

    def get_seq_length(self) -> int:
        """Tokens seen per row, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset a mask would have; the mixer itself takes no mask."""
        return self.seen + query_length, 0

    def _tensors(self) -> list[Tensor]:
        held = [self.keys, self.values, self.positions, self.lengths] if self.is_initialized else []
        return held + list(self.state or ())

    def nbytes(self) -> int:
        """Bytes held, a constant."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def reset(self) -> None:
        """Forget everything."""
        if self.is_initialized:
            del self.keys, self.values, self.positions, self.lengths
        self.is_initialized, self.seen, self.state = False, 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what a state has taken in cannot be taken out."""
        raise ValueError(
            f"crop: {tokens_to_remove} tokens cannot be taken back from a student's cache; decode without an assistant "
            "and without prompt_lookup_num_tokens, or keep a copy (copy.deepcopy) to go back to."
        )

    def _select(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values", "positions", "lengths"):
            held = getattr(self, name)
            setattr(self, name, held.index_select(0, index.to(held.device)))
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
        if self.is_initialized:
            self._select(
                torch.arange(self.lengths.shape[0], device=self.lengths.device).repeat_interleave(
                    repeats
                )
            )


class StudentCache(Cache):
    """One `MixerCacheLayer` per layer, and how the rows end (`documents.RowEnds`), None before the first token."""

    def __init__(self, windows: Sequence[int], sinks: int) -> None:
        super().__init__(layers=[MixerCacheLayer(window, sinks) for window in windows])
        self.ends: RowEnds | None = None

    def end_rows(self, ends: RowEnds) -> None:
        """Keep how the rows end now, in place where that is held, and never as views of what the caller may change."""

        position, padding, segment = self.ends or (None, None, None)
        self.ends = RowEnds(
            position=_kept(position, ends.position),
            padding=None if ends.padding is None else _kept(padding, ends.padding),
            segment=None if ends.segment is None else _kept(segment, ends.segment),
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


def _kept(held: Tensor | None, new: Tensor) -> Tensor:
    return new.clone() if held is None else held.copy_(new)


def checked_cache(cache: Any) -> StudentCache:
    """Return the cache if it can hold the state of mixers.

    Raises:
        ValueError: it is of another class.
    """
    if not isinstance(cache, StudentCache):
        raise ValueError(
            f"past_key_values: {type(cache).__name__} cannot hold a mixer's state; "
            "pass student.new_cache(), or nothing."
        )
    return cache

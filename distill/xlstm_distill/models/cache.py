"""The student's decoding cache: an mLSTM state, and a ring of recent keys and values, per layer.

Their size does not depend on the number of tokens seen. Heads that keep full attention hold the
keys and values of all tokens besides. Decoding updates every tensor in place.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from xlstm_distill.models.decoding.arrival import Arrival
from xlstm_distill.models.segments import RowEnds
from xlstm_kernels import MLSTMState, Ring
from xlstm_kernels.state import LOG_ZERO, held_positions


def _as_usual() -> AbstractContextManager[Any]:
    """Allocate what may also be changed outside `torch.inference_mode`."""
    inside = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if inside else contextlib.nullcontext()


ROOM, LEAST_ROOM = 4, 256
"""A row of keys that is full gets room for a fourth of its tokens more, and for so many at least.
Else each token would copy all before it."""


class AllKeys(NamedTuple):
    """Keys and values of all tokens, (B, G, S or more, D): behind the last token there is room."""

    keys: Tensor
    values: Tensor


class MixerCacheLayer(CacheLayerMixin):
    """Decoding state of one mixer: what `xlstm_kernels.hybrid_step` updates.

    state: memory of the mLSTM. keys, values: those of the window and the sinks, as
    `xlstm_kernels.Ring` has them. full: those of heads that keep full attention. Each is None
    before the first token, and stays None where the mixer lacks what needs it. How long the rows
    are is a fact of the whole cache. seen: tokens per row, padding included; the mixer counts them.

    rows (B,): which rows of the tensors a step's tokens continue, where others hold more of them;
    None where all, in order. checked: whether a step has checked these tensors. folded: what the
    mixer's steps have computed of its weights.
    """

    is_sliding = False

    def __init__(self, window: int, sinks: int) -> None:
        super().__init__()
        self.window, self.sinks = window, sinks
        self.seen = 0
        self.state: MLSTMState | None = None
        self.full: AllKeys | None = None
        self.rows: Tensor | None = None
        self.checked = False
        self.folded: Any = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the ring for keys (B, G, ..., D) and values (B, G, ..., Dv), in their dtype."""
        batch, groups, key_dim = *key_states.shape[:2], key_states.shape[-1]
        with _as_usual():
            self.keys, self.values, _ = Ring.empty(
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

    def ring_for(self, keys: Tensor, values: Tensor, lengths: Tensor) -> Ring:
        """Return the ring of rows of these lengths (B,); allocate it first if needed.

        keys, values (B, G, ..., D).
        """
        if self.keys is None:
            self.lazy_initialization(keys, values)
        assert self.keys is not None
        assert self.values is not None
        return Ring(self.keys, self.values, lengths)

    def state_for(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> MLSTMState:
        """Return the mLSTM's state; allocate it first if needed.

        keys (B, H, ..., Dk) after the feature map, values (B, G, ..., Dv).
        """
        if self.state is None:
            batch, heads, key_dim = *keys.shape[:2], keys.shape[-1]
            with _as_usual():
                self.state = MLSTMState.zeros(
                    batch, heads, key_dim, values.shape[-1], dtype=dtype, device=keys.device
                )
            self.is_initialized = True
        return self.state

    @torch.no_grad()
    def update(
        self, key_states: Tensor, value_states: Tensor, arrival: Arrival
    ) -> tuple[Tensor, Tensor]:
        """Fill the ring from a chunk of T tokens, (B, G, T, D), and return all slots of the ring.

        What is held is constant: no gradient flows into it.
        """
        ring = self.ring_for(key_states, value_states, arrival.before)
        index, is_new = arrival.fill(ring, self.sinks)
        for slots, new in ((ring.keys, key_states), (ring.values, value_states)):
            slots.copy_(torch.where(is_new[:, None, :, None], _gather(new, index), slots))
        return ring.keys, ring.values

    def extend(
        self, keys: Tensor, values: Tensor, *, recorded: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Append those of T tokens (B, G, T, D), and return all, (B, G, S, D).

        What is held is constant: gradients flow into the tokens that come, and into none before.
        recorded: whether a backward pass may follow.
        """
        before, after = self.seen, self.seen + keys.shape[2]
        with torch.no_grad():
            found = self._with_room(keys, values, after)
            found.keys[:, :, before:after] = keys
            found.values[:, :, before:after] = values
        if before == 0:
            return keys, values
        if not recorded:
            return found.keys[:, :, :after], found.values[:, :, :after]
        # A backward pass must find what is read here, and the next token changes these tensors.
        return (
            torch.cat([found.keys[:, :, :before], keys], dim=2),
            torch.cat([found.values[:, :, :before], values], dim=2),
        )

    def make_room(self) -> None:
        """Have room for a token more: a compiled step cannot allocate what outlives it."""
        if self.full is not None:
            self._with_room(*self.full, self.seen + 1)

    def _with_room(self, keys: Tensor, values: Tensor, tokens: int) -> AllKeys:
        """Return the held keys and values, with room for so many tokens in all."""
        held = self.full
        if held is None or held.keys.shape[2] < tokens:
            room = tokens + max(LEAST_ROOM, tokens // ROOM)
            with _as_usual():
                made = AllKeys(
                    *(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (keys, values))
                )
            for new, old in zip(made, held or (), strict=False):
                new[:, :, : self.seen] = old[:, :, : self.seen]
            self.full, self.is_initialized = made, True
            held = made
        return held

    def restart_state(self, begins: Tensor) -> None:
        """Empty the mLSTM's state in rows that begin a document, (B,) bool."""
        assert self.state is not None
        if self.rows is not None:  # on a CPU, where nobody waits for their number
            emptied = self.rows[begins]
            for held, value in zip(self.state, (0.0, 0.0, LOG_ZERO), strict=True):
                held.index_fill_(0, emptied, value)
            return
        self.state.C.masked_fill_(begins[:, None, None, None], 0)
        self.state.n.masked_fill_(begins[:, None, None], 0)
        self.state.m.masked_fill_(begins[:, None], LOG_ZERO)

    def prefix(self, held: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the held tokens of rows of these lengths (B,), in document order.

        Keys, values (B, G, N + W, D) and their validity (B, N + W) bool. Invalid slots come first,
        so that valid tokens adjoin the chunk that follows.
        """
        assert self.keys is not None
        assert self.values is not None
        lengths = held.to(self.keys.device)
        positions = held_positions(lengths, self.window, self.sinks)
        # A sink that is still in the window has two slots. Only the one in the ring counts.
        oldest = (lengths - self.window)[:, None]
        in_ring = torch.arange(positions.shape[1], device=oldest.device) >= self.sinks
        counted = torch.where(in_ring | (positions < oldest), positions, -1)
        order = counted.argsort(dim=1, stable=True)
        valid = counted.gather(1, order) >= 0
        return _gather(self.keys, order), _gather(self.values, order), valid

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
        ring = () if self.keys is None else (self.keys, self.values)
        full = () if self.full is None else self.all_keys()
        return [*ring, *(self.state or ()), *full]

    def all_keys(self) -> AllKeys:
        """Return keys and values of all tokens that full attention has seen, without room."""
        assert self.full is not None
        return AllKeys(*(x[:, :, : self.seen] for x in self.full))

    def nbytes(self) -> int:
        """Bytes held: a constant from the first token on, and those of full attention.

        Room for further tokens does not count.
        """
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def bytes_per_token(self) -> int:
        """Bytes by which each further token of a row makes the cache larger."""
        full = self.full or ()
        return sum(t.shape[1] * t.shape[3] * t.element_size() for t in full)

    def reset(self) -> None:
        """Forget everything."""
        # The tensors go, not only their content: the next use may have another batch size or dtype.
        self.is_initialized, self.seen, self.checked = False, 0, False
        self.keys = self.values = self.state = self.full = self.folded = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a state cannot give back what it has taken in."""
        raise ValueError(
            f"crop: {tokens_to_remove} tokens cannot be taken back from a student's cache; decode"
            " without an assistant and without prompt_lookup_num_tokens, or keep a copy"
            " (copy.deepcopy) to go back to."
        )

    def _select(self, index: Tensor) -> None:
        """Keep the given rows, in this order."""
        self.checked = False
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, index.to(self.keys.device))
            self.values = self.values.index_select(0, index.to(self.values.device))
        if self.state is not None:
            self.state = MLSTMState(*(t.index_select(0, index.to(t.device)) for t in self.state))
        if self.full is not None:
            self.full = AllKeys(*(t.index_select(0, index.to(t.device)) for t in self.full))

    def join(self, parts: Sequence[MixerCacheLayer], seen: int) -> None:
        """Hold the rows of other layers, as `StudentCache.join_rows` says."""
        first, self.checked = parts[0], False
        with _as_usual():
            if first.keys is not None:
                # Layers of one mixer: all have keys, or none does.
                self.keys = torch.cat([cast("Tensor", part.keys) for part in parts])
                self.values = torch.cat([cast("Tensor", part.values) for part in parts])
            if first.state is not None:
                states = zip(*(cast("MLSTMState", part.state) for part in parts), strict=True)
                self.state = MLSTMState(*(torch.cat(tensors) for tensors in states))
        self.is_initialized, self.seen, self.folded = True, seen, first.folded
        # Two of all layers at a time would be twice the memory.
        for part in parts:
            part.reset()

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


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens of x (B, G, T, D) by index (B, S): (B, G, S, D)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class StudentCache(Cache):
    """One `MixerCacheLayer` per layer, and what is a fact of the rows in all layers.

    ends: how the rows end. lengths (B,) int64: tokens of each row's last document. Both are None
    before the first token. arrival: the tokens that the layers are taking in. outputs_unread:
    nobody reads what the last layer would compute of them.
    """

    def __init__(self, windows: Sequence[int], sinks: int) -> None:
        super().__init__(layers=[MixerCacheLayer(window, sinks) for window in windows])
        self.ends: RowEnds | None = None
        self.lengths: Tensor | None = None
        self.arrival: Arrival | None = None
        self.outputs_unread = False

    def receive(
        self, shape: tuple[int, int], segment_ids: Tensor | None, device: torch.device
    ) -> None:
        """Note that the layers will take in (B, T) tokens, and count them, in place."""
        if self.lengths is None:
            with _as_usual():
                self.lengths = torch.zeros(shape[0], dtype=torch.int64, device=device)
        seen = self.get_seq_length()
        self.arrival = Arrival(shape[1], seen, self.lengths.clone(), segment_ids)
        self.lengths.copy_(self.arrival.lengths_after())

    def wants_no_outputs(self, layer: int) -> bool:
        """Tell whether nobody reads what this layer would compute of the tokens that come."""
        return self.outputs_unread and layer == len(self.layers) - 1

    def copy(self) -> StudentCache:
        """Return a cache that goes on by itself: one prompt's state, many continuations."""
        found: StudentCache = copy.copy(self)
        # What the last call found out is of no use to the next.
        found.arrival = None
        return copy.deepcopy(found)

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
        layers = sum(layer.nbytes() for layer in self.mixer_layers())
        return layers + (0 if self.lengths is None else 8 * len(self.lengths))

    def bytes_per_token(self) -> int:
        """Bytes by which each further token of a row makes it larger; 0 where no head keeps all."""
        return sum(layer.bytes_per_token() for layer in self.mixer_layers())

    def mixer_layers(self) -> list[MixerCacheLayer]:
        """The layers, first one first."""
        return [layer for layer in self.layers if isinstance(layer, MixerCacheLayer)]

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.ends = self.lengths = self.arrival = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder rows for beam search."""
        super().reorder_cache(beam_idx)
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the given rows."""
        super().batch_select_indices(indices)
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.lengths is not None:
            rows = torch.arange(len(self.lengths), device=self.lengths.device)
            self._select_rows(rows.repeat_interleave(repeats))

    def join_rows(self, parts: Sequence[StudentCache], seen: int) -> None:
        """Hold the rows of other caches, one after the other, in place of none; these lose them.

        seen: tokens of each row; of shorter rows, the first are padding. No head keeps all keys.
        """
        lengths, ends = zip(*((part.lengths, part.ends) for part in parts), strict=True)
        with _as_usual():
            self.lengths, self.ends = torch.cat(lengths), RowEnds.joined(ends)
        for layer, *own in zip(*(c.mixer_layers() for c in (self, *parts)), strict=True):
            layer.join(own, seen)

    def _select_rows(self, index: Tensor) -> None:
        if self.ends is not None:
            self.ends = self.ends.select(index)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, index.to(self.lengths.device))


def _copied(new: Tensor, held: Tensor | None) -> Tensor:
    """Copy `new` into the tensor that is held, or into one of its own."""
    if held is not None:
        return held.copy_(new)
    with _as_usual():
        # A view of one row keeps its stride when it is cloned; it says how long the prompt was,
        # and a compiled step would be another one for each length.
        return new.clone(memory_format=torch.contiguous_format)


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

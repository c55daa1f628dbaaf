"""The tokens that come to a student's decoding cache in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_kernels import Ring, RingSlots
from xlstm_kernels.state import held_positions


class Arrival:
    """The tokens that come to a cache in one call: what all layers would find out alike.

    tokens: T. seen: tokens per row before these, padding included. segment_ids (B, T): rows whose
    first id is 0 continue the document that is held, others begin one; None where all continue.
    begins (B,) bool: which rows those are. held (B,): how many tokens of its document a row held.
    before (B,): how many of them are of the document of these tokens' first one.
    """

    def __init__(self, tokens: int, seen: int, held: Tensor, segment_ids: Tensor | None) -> None:
        self.tokens, self.seen, self.held, self.segment_ids = tokens, seen, held, segment_ids
        # By the window and the device: layers may differ in both.
        self._slots: dict[tuple[int, torch.device], RingSlots] = {}
        self._fills: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._documents: dict[torch.device, tuple[Tensor, Tensor] | None] = {}
        # Of the rotary positions: tensors of transformers, and what steps have made of them.
        self.rotation: tuple[Tensor, Tensor, Tensor] | None = None
        self.begins: Tensor | None = None
        self.before = held
        if segment_ids is not None:
            begins = segment_ids[:, 0] != 0
            # Asking makes nobody wait on a CPU, and most tokens continue their document.
            if asks_first(begins) and not bool(begins.any()):
                return
            self.begins, self.before = begins, held.masked_fill(begins, 0)

    def begins_on(self, device: torch.device) -> Tensor:
        """Return which rows begin a document, on the device of a layer."""
        assert self.begins is not None
        return self.begins if self.begins.device == device else self.begins.to(device)

    def lengths_after(self) -> Tensor:
        """Count the tokens of each row's last document, these included, (B,)."""
        before, start = self._last_document()
        return before + (self.tokens - start)

    def _last_document(self) -> tuple[Tensor, Tensor | int]:
        """Find how many tokens of each row's last document came before, and where it begins, (B,).

        Of several documents only the last is kept: no later token sees an earlier one.
        """
        if self.segment_ids is None or self.tokens == 1:
            return self.before, 0
        in_last = self.segment_ids == self.segment_ids[:, -1:]
        # An id may occur twice in a row; only the run of equal ids at the end is the last document.
        run = in_last.long().flip(1).cumprod(dim=1).sum(dim=1)
        start = self.tokens - run
        return torch.where(start > 0, 0, self.before), start

    def slots(self, ring: Ring, sinks: int) -> RingSlots:
        """Find where a single token goes in a ring like this one."""
        window, device = ring.keys.shape[2] - sinks, ring.keys.device
        found = self._slots.get((window, device))
        if found is None:
            found = RingSlots.of(self.before.to(device), window, sinks, ring.keys.dtype)
            self._slots[window, device] = found
        return found

    def fill(self, ring: Ring, sinks: int) -> tuple[Tensor, Tensor]:
        """Find which token of the chunk each slot of a ring takes, and whether, (B, N + W)."""
        window, device = ring.keys.shape[2] - sinks, ring.keys.device
        if (window, device) not in self._fills:
            before, start = self._last_document()
            wanted = held_positions(before + (self.tokens - start), window, sinks)
            source = wanted + (start - before)[:, None]
            # A negative one means that the slot already holds its token.
            is_new = (wanted >= 0) & (source >= 0)
            index = source.clamp(0, self.tokens - 1)
            self._fills[window, device] = index.to(device), is_new.to(device)
        return self._fills[window, device]

    def documents(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Tell of which document these tokens (B, T) and all in the cache with them (B, S) are.

        None where each row is one document.
        """
        if device not in self._documents:
            self._documents[device] = self._find_documents(device)
        return self._documents[device]

    def _find_documents(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        ids = None if self.segment_ids is None else self.segment_ids.to(device)
        if self.seen == 0:
            return None if ids is None else (ids, ids)
        continues = ids is None or (self.tokens == 1 and self.begins is None)
        if continues and asks_first(self.held) and bool((self.held == self.seen).all()):
            return None
        before = self.before.to(device)
        if ids is None:
            ids = before.new_zeros(len(before), self.tokens)
        place = torch.arange(self.seen, device=device)
        # What came before the document that goes on is of none that these tokens see.
        held = (place >= self.seen - before[:, None]).long() - 1
        return ids, torch.cat([held, ids], dim=1)


def asks_first(x: Tensor) -> bool:
    """Tell whether a question about a tensor's content costs nothing and breaks no graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()

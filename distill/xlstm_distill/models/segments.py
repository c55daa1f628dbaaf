"""Which document each token of a packed or padded row belongs to, also where a row comes in cached chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowEnds(NamedTuple):
    """How the rows that a cache has seen end: what decides whether the next token continues a row's document.

    position (B,): of the last token. padding (B,) bool: the last token was padding; None where no row had any.
    segment (B,): the last id of a document; None where none was given.
    """

    position: Tensor
    padding: Tensor | None
    segment: Tensor | None

    def select(self, index: Tensor) -> RowEnds:
        """Keep the given rows, in this order."""
        index = index.to(self.position.device)
        padding, segment = (
            None if held is None else held[index] for held in (self.padding, self.segment)
        )
        return RowEnds(self.position[index], padding, segment)


class Documents(NamedTuple):
    """The documents of a chunk of tokens.

    segments (B, T) int64, None where no document begins in the chunk: 0 is the document that the cache holds, or the
    first. positions (B, T), None where they are those of the row. ends: how the rows end now.
    """

    segments: Tensor | None
    positions: Tensor | None
    ends: RowEnds


def chunk_documents(
    shape: tuple[int, int],
    device: torch.device,
    segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past: RowEnds | None = None,
) -> Documents:
    """Find a chunk's documents and positions from what the caller gave and from how the rows before it ended.

    A document ends where its given segment id changes, where positions do not go up by one (transformers' convention
    for packed rows), or where padding begins or ends, between chunks as inside one. Positions that were not given
    count from the document's first token. All arguments (B, T) or None. One token is handled without waiting for the
    device.

    Raises:
        ValueError: another number of rows than the cache's; segment ids of another shape, or none for the tokens
            before; padding inside a row.
    """
    if segment_ids is not None and segment_ids.shape != shape:
        raise ValueError(
            f"segment_ids: shape {tuple(segment_ids.shape)}, allowed {shape}: give those of this call's tokens only."
        )
    batch, tokens = shape
    if past is not None and len(past.position) != batch:
        raise ValueError(
            f"input_ids: {batch} rows, but the cache holds {len(past.position)}; give as many, or a new one."
        )
    if tokens > 1:
        _check_padding(attention_mask, tokens, past)
    mask = None if attention_mask is None else attention_mask[:, -tokens:]
    starts = None if past is None else _starts(past, segment_ids, position_ids)
    ends = _ends(segment_ids, position_ids, mask)
    segments = None
    if starts is not None or ends is not None:
        first = (
            torch.zeros(batch, dtype=torch.bool, device=device)
            if starts is None
            else starts.expand(batch)
        )
        rest = first.new_zeros(batch, tokens - 1) if ends is None else ends.expand(batch, -1)
        changes = torch.cat([first[:, None], rest], dim=1)
        if tokens == 1 or bool(changes.any()):
            segments = changes.long().cumsum(dim=1)
    positions = _positions(shape, device, segments, past) if position_ids is None else position_ids
    return Documents(
        segments, positions, _row_ends(shape, device, segment_ids, positions, mask, past)
    )


def positions_in_documents(segment_ids: Tensor) -> Tensor:
    """Count positions from each document's first token: (B, T) -> (B, T) int64."""
    batch, tokens = segment_ids.shape
    index = torch.arange(tokens, device=segment_ids.device).expand(batch, tokens)
    starts = torch.nn.functional.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=-1).values


def ends_in_padding(attention_mask: Tensor | None, past: RowEnds | None = None) -> bool:
    """Whether a row of which some tokens are real, here or in the cache, ends in padding; waits for the device."""
    if attention_mask is None:
        return False
    real = attention_mask != 0
    seen = real.any(dim=1)
    if past is not None:
        seen = torch.ones_like(seen) if past.padding is None else seen | ~past.padding
    return bool((seen & ~real[:, -1]).any())


def _ends(
    segment_ids: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Tell after which tokens a document ends, (B, T - 1) bool; None where nothing was given or T = 1."""
    ends = None
    for ids, step in ((segment_ids, 0), (position_ids, 1), (attention_mask, 0)):
        if ids is None or ids.shape[-1] < 2:
            continue
        changed = ids[:, 1:].long() - ids[:, :-1].long() != step
        ends = changed if ends is None else ends | changed
    return ends


def _starts(
    past: RowEnds, segment_ids: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Tell which rows begin a document with the chunk's first token, (B,) bool; None where none can."""
    starts = past.padding
    if segment_ids is not None:
        if past.segment is None:
            raise ValueError(
                "segment_ids: given after cached tokens that had none; give them from the first chunk on, or never."
            )
        changed = segment_ids[:, 0] != past.segment
        starts = changed if starts is None else starts | changed
    if position_ids is not None:
        jumped = position_ids[:, 0] != past.position + 1
        starts = jumped if starts is None else starts | jumped
    return starts


def _positions(
    shape: tuple[int, int], device: torch.device, segments: Tensor | None, past: RowEnds | None
) -> Tensor | None:
    """Count positions in each document, from where the cache's left off; None where they are those of the row."""
    if segments is None and past is None:
        return None
    numbers = torch.zeros(shape, dtype=torch.long, device=device) if segments is None else segments
    positions = positions_in_documents(numbers)
    if past is None:
        return positions
    return positions + torch.where(numbers == 0, past.position[:, None] + 1, 0)


def _row_ends(
    shape: tuple[int, int],
    device: torch.device,
    segment_ids: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    past: RowEnds | None,
) -> RowEnds:
    batch, tokens = shape
    last = positions[:, -1].expand(batch) if positions is not None else None
    if last is None:
        last = torch.full((batch,), tokens - 1, dtype=torch.long, device=device)
    segment = (
        segment_ids[:, -1]
        if segment_ids is not None
        else past.segment
        if past is not None
        else None
    )
    return RowEnds(last, None if mask is None else mask[:, -1] == 0, segment)


def _check_padding(attention_mask: Tensor | None, tokens: int, past: RowEnds | None) -> None:
    """Refuse padding between real tokens: window and state could not leave it out."""
    if attention_mask is None:
        return
    real = attention_mask != 0
    if (
        past is not None and real.shape[1] == tokens
    ):  # a longer mask tells itself what the cache has seen
        before = torch.ones_like(real[:, :1]) if past.padding is None else ~past.padding[:, None]
        real = torch.cat([before, real], dim=1)
    gap = ~real & (real.cumsum(dim=1) > 0)
    if bool((gap[:, :-1] & real[:, 1:]).any()):
        raise ValueError(
            "attention_mask: a row has padding between its tokens (1, 0, 1), which a student cannot leave out; pad one "
            "side only, and tell documents apart by segment_ids."
        )

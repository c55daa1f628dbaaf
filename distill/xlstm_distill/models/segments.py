"""Find the document of each token in packed or padded rows, whole or in cached chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowEnds(NamedTuple):
    """How the rows that a cache has seen end.

    It decides whether the next token continues its row's document.

    position (B,): of the last token. padding (B,) bool: whether the last token was padding; None
    where no mask was given. segment (B,): the last segment id; None where none was given.
    """

    position: Tensor
    padding: Tensor | None
    segment: Tensor | None

    def select(self, index: Tensor) -> RowEnds:
        """Keep the given rows, in this order."""
        index = index.to(self.position.device)
        return RowEnds(
            position=self.position[index],
            padding=None if self.padding is None else self.padding[index],
            segment=None if self.segment is None else self.segment[index],
        )

    @classmethod
    def joined(cls, parts: Sequence[RowEnds]) -> RowEnds:
        """Describe the rows of several caches that were given the same, one after the other."""
        padding = [part.padding for part in parts if part.padding is not None]
        segment = [part.segment for part in parts if part.segment is not None]
        return cls(
            position=torch.cat([part.position for part in parts]),
            padding=torch.cat(padding) if padding else None,
            segment=torch.cat(segment) if segment else None,
        )


class Documents(NamedTuple):
    """The documents of a chunk of tokens.

    segments (B, T) int64: 0 is the document that the cache holds, or the first one; None where no
    document begins in the chunk. positions (B, T); None where they are those of the row. ends: how
    the rows end now.
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
    *,
    wait: bool = True,
) -> Documents:
    """Find a chunk's documents and positions.

    A document ends where its given segment id changes, where positions do not go up by one
    (transformers' convention for packed rows), or where padding begins or ends. `past`, how the
    rows before the chunk ended, decides whether its first tokens continue a document. Positions
    that were not given count from the document's first token.

    shape is (B, T) of the chunk; the tensors are (B, T) or None. With T = 1, or with neither a mask
    nor `wait`, nothing waits for the device; then segments are returned also where they are all 0.

    Raises:
        ValueError: the cache has another number of rows; segment ids have another shape, or were
            not given for the tokens before; padding lies inside a row.
    """
    check_chunk(shape, segment_ids, attention_mask, past)
    batch, tokens = shape
    # generate passes the mask of the whole row, also with a chunk.
    mask = None if attention_mask is None else attention_mask[:, -tokens:]
    starts = None if past is None else _starts(past, segment_ids, position_ids)
    ends = _ends(segment_ids, position_ids, mask)
    segments = None
    if starts is not None or ends is not None:
        if starts is None:
            starts = torch.zeros(batch, dtype=torch.bool, device=device)
        first = starts.expand(batch)
        rest = first.new_zeros(batch, tokens - 1) if ends is None else ends.expand(batch, -1)
        changes = torch.cat([first[:, None], rest], dim=1)
        # `any` waits for the device, which a decoding step and training must not.
        if tokens == 1 or not wait or bool(changes.any()):
            segments = changes.long().cumsum(dim=1)
    positions = position_ids
    if positions is None:
        positions = _positions(shape, device, segments, past)
    row_ends = _row_ends(shape, device, segment_ids, positions, mask, past)
    return Documents(segments, positions, row_ends)


def positions_in_documents(segment_ids: Tensor) -> Tensor:
    """Count positions from each document's first token: (B, T) -> (B, T) int64."""
    batch, tokens = segment_ids.shape
    index = torch.arange(tokens, device=segment_ids.device).expand(batch, tokens)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = torch.nn.functional.pad(changes, (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=-1).values


def ends_in_padding(attention_mask: Tensor | None, past: RowEnds | None = None) -> bool:
    """Tell whether a row that has real tokens ends in padding; waits for the device.

    Real tokens are those of the mask (B, T), or of the cache that `past` describes.
    """
    if attention_mask is None:
        return False
    real = attention_mask != 0
    has_tokens = real.any(dim=1)
    if past is not None:
        # A row that has been padding so far, on the left, has none in the cache.
        held = torch.ones_like(has_tokens) if past.padding is None else ~past.padding
        has_tokens = has_tokens | held
    return bool((has_tokens & ~real[:, -1]).any())


def check_chunk(
    shape: tuple[int, int],
    segment_ids: Tensor | None,
    attention_mask: Tensor | None,
    past: RowEnds | None,
) -> None:
    """Refuse what `chunk_documents` refuses."""
    _check_shapes(shape, segment_ids, past)
    if shape[1] > 1:
        _check_padding(attention_mask, shape[1], past)


def _check_shapes(shape: tuple[int, int], segment_ids: Tensor | None, past: RowEnds | None) -> None:
    if segment_ids is not None and segment_ids.shape != shape:
        raise ValueError(
            f"segment_ids: shape {tuple(segment_ids.shape)}, allowed {shape}:"
            " give those of this call's tokens only."
        )
    if past is not None and len(past.position) != shape[0]:
        raise ValueError(
            f"input_ids: {shape[0]} rows, but the cache holds {len(past.position)};"
            " give as many, or a new cache."
        )


def _check_padding(attention_mask: Tensor | None, tokens: int, past: RowEnds | None) -> None:
    """Refuse padding between real tokens: window and state could not leave it out."""
    if attention_mask is None:
        return
    real = attention_mask != 0
    if past is not None and real.shape[1] == tokens:
        # The mask is of the chunk alone, so the last token of the cache goes before it. A longer
        # mask covers the cached tokens itself.
        before = torch.ones_like(real[:, :1]) if past.padding is None else ~past.padding[:, None]
        real = torch.cat([before, real], dim=1)
    padding_after_tokens = ~real & (real.cumsum(dim=1) > 0)
    if bool((padding_after_tokens[:, :-1] & real[:, 1:]).any()):
        raise ValueError(
            "attention_mask: a row has padding between its tokens (1, 0, 1), which a student cannot"
            " leave out; pad one side only, and tell documents apart by segment_ids."
        )


def _ends(
    segment_ids: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Tell after which tokens a document ends, (B, T - 1) bool.

    None where nothing was given or T = 1.
    """
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
    """Tell which rows begin a document with the chunk's first token, (B,) bool.

    None where none can.
    """
    # After padding a document begins. Padding after padding may begin one too: nobody sees it.
    starts = past.padding
    if segment_ids is not None:
        if past.segment is None:
            raise ValueError(
                "segment_ids: given after cached tokens that had none; give them from the first"
                " chunk on, or never."
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
    """Count positions in each document (B, T); the cache's document goes on from its last one.

    None where they are those of the row.
    """
    if segments is None and past is None:
        return None
    if segments is None:
        segments = torch.zeros(shape, dtype=torch.long, device=device)
    positions = positions_in_documents(segments)
    if past is None:
        return positions
    # Only document 0 continues what the cache holds.
    return positions + torch.where(segments == 0, past.position[:, None] + 1, 0)


def _row_ends(
    shape: tuple[int, int],
    device: torch.device,
    segment_ids: Tensor | None,
    positions: Tensor | None,
    mask: Tensor | None,
    past: RowEnds | None,
) -> RowEnds:
    """Describe how the rows end after the chunk."""
    batch, tokens = shape
    if positions is None:
        position = torch.full((batch,), tokens - 1, dtype=torch.long, device=device)
    else:
        position = positions[:, -1].expand(batch)
    segment = None if past is None else past.segment
    if segment_ids is not None:
        segment = segment_ids[:, -1]
    padding = None if mask is None else mask[:, -1] == 0
    return RowEnds(position, padding, segment)

"""Best-fit packing of tokenised documents into rows of a fixed number of tokens."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from xlstm_distill.data.tokenization import Tokens

OPEN_ROWS = 256
"""Rows kept open for best-fit packing.

With more open rows, rows are fuller and documents are mixed over a longer stretch (docs/data.md).
The number is the same for every domain and budget: the first rows must not depend on how many
come after them. Open rows take 5 bytes a token: 5 MB at a context of 4,096, 168 MB at 131,072.
"""


@dataclass
class PackedRow:
    """A row: ids (T,) int32, supervised (T,) bool, and the lengths of its documents in order.

    `used` counts the tokens of its documents; the rest of the row is padding.
    """

    ids: np.ndarray
    supervised: np.ndarray
    lengths: list[int] = field(default_factory=list)
    used: int = 0

    @classmethod
    def empty(cls, context: int, pad: int) -> PackedRow:
        """Make a row of padding."""
        return cls(np.full(context, pad, dtype=np.int32), np.zeros(context, dtype=bool))

    def add(self, document: Tokens) -> None:
        """Append a document; the caller ensures that it fits."""
        stop = self.used + len(document)
        self.ids[self.used : stop] = document.ids
        self.supervised[self.used : stop] = document.supervised
        self.lengths.append(len(document))
        self.used = stop

    @property
    def segment_ids(self) -> np.ndarray:
        """Return each token's document number (T,) int64; padding has the number after the last."""
        # Padding is a document of its own, so that no real token sees it.
        padding = len(self.ids) - sum(self.lengths)
        return np.repeat(np.arange(len(self.lengths) + 1), [*self.lengths, padding])


class Packer:
    """Put each document into the fullest open row that it fits (online best fit).

    No document is cut. When too many rows are open, the fullest one is finished. Open rows are
    sorted by the room they have left, so a bisection finds the right one; of equally full rows the
    oldest is taken.
    """

    def __init__(self, context: int, pad: int, open_rows: int = OPEN_ROWS) -> None:
        self.context, self.pad, self.open_rows = context, pad, open_rows
        self._order: list[tuple[int, int]] = []  # (room left, row number), ascending
        self._rows: dict[int, PackedRow] = {}
        self._next = 0

    def add(self, document: Tokens) -> PackedRow | None:
        """Add a document of at most `context` tokens; return the row that this finishes, if any."""
        length = len(document)
        finished = None
        # Row numbers start at 0, so (length, -1) sorts before every row with exactly this room.
        place = bisect.bisect_left(self._order, (length, -1))
        if place < len(self._order):
            room, number = self._order.pop(place)
        else:
            # A document as long as a row needs no open row, so it must not close another.
            if len(self._order) == self.open_rows and length < self.context:
                finished = self._finish_fullest()
            room, number = self.context, self._open_row()
        self._rows[number].add(document)
        if room == length:
            return self._rows.pop(number)
        bisect.insort(self._order, (room - length, number))
        return finished

    def _open_row(self) -> int:
        """Open an empty row and return its number."""
        number = self._next
        self._rows[number] = PackedRow.empty(self.context, self.pad)
        self._next += 1
        return number

    def _finish_fullest(self) -> PackedRow:
        _, number = self._order.pop(0)
        return self._rows.pop(number)

    def drain(self) -> Iterator[PackedRow]:
        """Finish all open rows, the fullest first."""
        # The fullest first: where a budget ends in the middle, the emptiest rows are left out.
        while self._order:
            yield self._finish_fullest()

    def state(self) -> dict[str, np.ndarray]:
        """Return the open rows, oldest first, as arrays that `restore` takes."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        return {
            "open_used": np.array([row.used for row in rows], dtype=np.int64),
            "open_documents": np.array([len(row.lengths) for row in rows], dtype=np.int64),
            # One array of all rows: rows hold different numbers of documents.
            "open_lengths": np.array([n for row in rows for n in row.lengths], dtype=np.int64),
            "open_ids": _joined([row.ids[: row.used] for row in rows], np.int32),
            "open_supervised": _joined([row.supervised[: row.used] for row in rows], bool),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the open rows of another packer's `state`."""
        all_used = state["open_used"].tolist()
        all_counts = state["open_documents"].tolist()
        tokens = documents = 0
        for used, count in zip(all_used, all_counts, strict=True):
            number = self._open_row()
            row = self._rows[number]
            row.ids[:used] = state["open_ids"][tokens : tokens + used]
            row.supervised[:used] = state["open_supervised"][tokens : tokens + used]
            row.lengths = state["open_lengths"][documents : documents + count].tolist()
            row.used = used
            bisect.insort(self._order, (self.context - used, number))
            tokens += used
            documents += count


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def pack(documents: Iterable[Tokens], context: int, pad: int) -> Iterator[PackedRow]:
    """Pack documents to the end; a document longer than a row becomes several pieces.

    A recipe's rows are made by `preparation`; this is for rows of other tokens.
    """
    packer = Packer(context, pad)
    for document in documents:
        for piece in document.pieces(context):
            if row := packer.add(piece):
                yield row
    yield from packer.drain()

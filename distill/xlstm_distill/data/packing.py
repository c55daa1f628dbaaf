"""Best-fit packing of tokenised documents into rows of a fixed number of tokens."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from xlstm_distill.data.tokenization import Tokens

OPEN_ROWS = 256
"""Rows kept open for best-fit packing; more fill better and mix documents over a longer stretch (docs/data.md)."""


@dataclass
class PackedRow:
    """A row: tokens (T,) int32, which are supervised (T,) bool, and the lengths of its documents in order."""

    ids: np.ndarray
    supervised: np.ndarray
    lengths: list[int] = field(default_factory=list)
    used: int = 0

    @classmethod
    def empty(cls, context: int, pad: int) -> PackedRow:
        """Make a row of padding."""
        return cls(np.full(context, pad, dtype=np.int32), np.zeros(context, dtype=bool))

    def add(self, document: Tokens) -> None:
        """Append a document that fits."""
        stop = self.used + len(document)
        self.ids[self.used : stop] = document.ids
        self.supervised[self.used : stop] = document.supervised
        self.lengths.append(len(document))
        self.used = stop

    @property
    def segment_ids(self) -> np.ndarray:
        """Number of each token's document (T,) int64, one more for padding."""
        missing = len(self.ids) - sum(self.lengths)
        return np.repeat(np.arange(len(self.lengths) + 1), [*self.lengths, missing])


class Packer:
    """Puts each document into the fullest open row that it fits (online best fit); nothing is cut off.

    When too many rows are open the fullest is finished. Open rows are kept in order of the room they have left, so
    that the right one is found by bisection; of equal ones the oldest is taken.
    """

    def __init__(self, context: int, pad: int, open_rows: int = OPEN_ROWS) -> None:
        self.context, self.pad, self.open_rows = context, pad, open_rows
        self._order: list[tuple[int, int]] = []  # (room left, number), ascending
        self._rows: dict[int, PackedRow] = {}
        self._next = 0

    def add(self, document: Tokens) -> PackedRow | None:
        """Add a document of at most `context` tokens; returns the row that this finished, if any."""
        finished = None
        place = bisect.bisect_left(self._order, (len(document), -1))
        if place < len(self._order):
            room, number = self._order.pop(place)
        else:
            if len(self._order) == self.open_rows and len(document) < self.context:
                finished = self._rows.pop(self._order.pop(0)[1])
            room, number = self.context, self._next
            self._rows[number] = PackedRow.empty(self.context, self.pad)
            self._next += 1
        self._rows[number].add(document)
        if room == len(document):
            return self._rows.pop(number)
        bisect.insort(self._order, (room - len(document), number))
        return finished

    def drain(self) -> Iterator[PackedRow]:
        """Finish all open rows, the fullest first."""
        while self._order:
            yield self._rows.pop(self._order.pop(0)[1])

    def state(self) -> dict[str, np.ndarray]:
        """Return the open rows, oldest first, as arrays from which `restore` goes on."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        return {
            "open_used": np.array([row.used for row in rows], dtype=np.int64),
            "open_documents": np.array([len(row.lengths) for row in rows], dtype=np.int64),
            "open_lengths": np.array([n for row in rows for n in row.lengths], dtype=np.int64),
            "open_ids": _joined([row.ids[: row.used] for row in rows], np.int32),
            "open_supervised": _joined([row.supervised[: row.used] for row in rows], bool),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the open rows of another packer's `state`."""
        tokens = documents = 0
        for used, count in zip(
            state["open_used"].tolist(), state["open_documents"].tolist(), strict=True
        ):
            row = PackedRow.empty(self.context, self.pad)
            row.ids[:used] = state["open_ids"][tokens : tokens + used]
            row.supervised[:used] = state["open_supervised"][tokens : tokens + used]
            row.lengths = state["open_lengths"][documents : documents + count].tolist()
            row.used = used
            bisect.insort(self._order, (self.context - used, self._next))
            self._rows[self._next] = row
            self._next += 1
            tokens, documents = tokens + used, documents + count


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)


def pack(documents: Iterable[Tokens], context: int, pad: int) -> Iterator[PackedRow]:
    """Pack documents to the end, for rows from other tokens than a recipe's; one that is too long becomes several."""
    packer = Packer(context, pad)
    for document in documents:
        for piece in document.pieces(context):
            if row := packer.add(piece):
                yield row
    yield from packer.drain()

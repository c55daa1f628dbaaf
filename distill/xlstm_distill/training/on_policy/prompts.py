"""Prompts for on-policy training, taken from packed rows: a pure function of row and number."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from xlstm_distill.data.packing import PackedRow

PURPOSE = zlib.crc32(b"refine")
"""Keeps these draws apart from others of the same seed."""


@dataclass(frozen=True)
class Opening:
    """A prompt (P,) with the text's own continuation (N,), both int64.

    number: the sample's place in the training, from which all of its draws follow. sampled: whether
    the student continues the prompt, or the text does (off policy).
    """

    prompt: np.ndarray
    continuation: np.ndarray
    number: int
    sampled: bool

    def __len__(self) -> int:
        return len(self.prompt) + len(self.continuation)


@dataclass(frozen=True)
class Cutter:
    """Cuts a row into a prompt and what follows it."""

    prompt_tokens: int
    new_tokens: int
    off_policy: float
    seed: int

    def cut(self, row: PackedRow, number: int) -> Opening:
        """Choose a place of a row where a continuation begins, at random by seed and number.

        In a conversation that is where a response begins; in other text, half of the most tokens
        to all of them after a document begins. Responses whose prompt is too long are chosen only
        where the row has no other place, and then keep the end of their prompt.
        """
        draw = np.random.default_rng([self.seed, PURPOSE, number])
        # Drawn first: whether a sample is off policy must not depend on the row's text.
        sampled = bool(draw.random() >= self.off_policy)
        places = _places(row)
        fitting = [place for place in places if place[1] - place[0] <= self.prompt_tokens]
        chosen = fitting or places
        first, start, stop = chosen[draw.integers(len(chosen))]
        if start - first <= 1:
            start = first + self._prefix(stop - first, draw)
        prompt = row.ids[max(first, start - self.prompt_tokens) : start]
        following = row.ids[start : min(stop, start + self.new_tokens)]
        return Opening(prompt.astype(np.int64), following.astype(np.int64), number, sampled)

    def _prefix(self, length: int, draw: np.random.Generator) -> int:
        """Draw the length of a prompt from a document without one."""
        most = min(self.prompt_tokens, max(1, length // 2))
        return int(draw.integers(max(1, most // 2), most + 1))


def _places(row: PackedRow) -> list[tuple[int, int, int]]:
    """Find a row's responses: where the document begins, the response, and what comes after it.

    A document that is supervised from its first or second token on has no prompt of its own, and
    counts as one response. So does each document of a row without any supervised token.
    """
    ends = np.cumsum(row.lengths)
    begins = ends - row.lengths
    number = np.repeat(np.arange(len(ends)), row.lengths)
    counted = row.supervised[: row.used]
    if not counted.any():
        counted = np.ones(row.used, dtype=bool)
    # A response ends with its document at the latest, and the next one may follow at once.
    new = np.diff(number, prepend=-1) != 0
    starts = np.flatnonzero(counted & (new | ~_shifted(counted, 1)))
    stops = np.flatnonzero(counted & (_shifted(new, -1) | ~_shifted(counted, -1))) + 1
    firsts = begins[number[starts]]
    found = np.stack([firsts, starts, stops], axis=1)
    # A place needs a token before it and one after: a document of one token has neither.
    found = found[stops - firsts > 1]
    return [(int(a), int(b), int(c)) for a, b, c in found] or [(0, 0, len(row.ids))]


def _shifted(flags: np.ndarray, by: int) -> np.ndarray:
    """Return the flag of each token's neighbour before (1) or after (-1); False without one."""
    found = np.roll(flags, by)
    found[0 if by > 0 else -1] = False
    return found

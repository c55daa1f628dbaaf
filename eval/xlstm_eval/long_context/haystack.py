"""Haystacks: sentences in an order that a seed decides, synthetic or from a text file."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from xlstm_eval.long_context import words
from xlstm_eval.records import EvalError

MOST_WORDS = 40
"""Longest sentence of a text file; longer ones are cut, so that lengths can be met."""
REPEATED = 0.5
"""Share of a synthetic document's sentences that repeat an earlier one."""


class Haystack(Protocol):
    """Where sentences and documents come from."""

    @property
    def identity(self) -> str:
        """What the sentences are; it changes when the text does."""

    def sentences(self, random: random.Random) -> Iterator[str]:
        """Yield sentences without end."""

    def document(self, random: random.Random, index: int, count: int) -> Iterator[str]:
        """Yield the pieces of the ``index``-th of ``count`` documents, in order."""


class Synthetic:
    """Sentences put together at random from `words`."""

    identity = "synthetic"

    def sentences(self, random: random.Random) -> Iterator[str]:
        """Yield sentences without end."""
        while True:
            yield _sentence(random)

    def document(self, random: random.Random, index: int, count: int) -> Iterator[str]:
        """Yield sentences of which half repeat an earlier one, at a log-uniform distance.

        A model predicts a repetition from its tokens on if it remembers the first. So the loss
        falls with the position as far as the memory reaches.
        """
        told: list[str] = []
        while True:
            if told and random.random() < REPEATED:
                back = int(len(told) ** random.random())
                told.append(told[-back])
            else:
                told.append(_sentence(random))
            yield told[-1]


class TextFile:
    """Sentences and documents of a file of natural text (UTF-8)."""

    def __init__(self, path: Path) -> None:
        try:
            self.text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise EvalError(
                f"haystack: {path} cannot be read: {reason}. Give a text file."
            ) from None
        self._sentences = list(_cut(self.text))
        if not self._sentences:
            raise EvalError(f"haystack: {path} has no words. Give a file of text.")
        self.identity = hashlib.sha256(self.text.encode()).hexdigest()

    def sentences(self, random: random.Random) -> Iterator[str]:
        """Yield the file's sentences from a random one on, again from its beginning at its end."""
        start = random.randrange(len(self._sentences))
        while True:
            yield from self._sentences[start:]
            start = 0

    def document(self, random: random.Random, index: int, count: int) -> Iterator[str]:
        """Yield one of ``count`` equal parts of the file, which do not overlap."""
        share = len(self._sentences) // count
        yield from self._sentences[index * share : (index + 1) * share]


def open_haystack(text: Path | None) -> Haystack:
    """Return the haystack of a file, or the synthetic one. Raises EvalError: unreadable file."""
    return Synthetic() if text is None else TextFile(text)


def _sentence(random: random.Random) -> str:
    told = f"The {random.choice(words.MANNERS)} {random.choice(words.PEOPLE)}"
    told += f" {random.choice(words.ACTIONS)} the {random.choice(words.THINGS)}"
    # Some sentences are shorter, so that lengths can be met closely.
    if random.random() < 0.5:
        told += f" near the {random.choice(words.PLACES)}"
    if random.random() < 0.5:
        told += f" {random.choice(words.TIMES)}"
    return f"{told}."


def _cut(text: str) -> Iterator[str]:
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        found = sentence.split()
        for start in range(0, len(found), MOST_WORDS):
            yield " ".join(found[start : start + MOST_WORDS])

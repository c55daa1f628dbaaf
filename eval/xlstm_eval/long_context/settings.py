"""What is measured: lengths, kinds of needles, number of items and documents. Plain data.

The fields have the names of the recipe's keys, so its section is passed on as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from xlstm_eval.problems import FieldError, one_line
from xlstm_eval.records import EvalError, Frozen

NeedleKind = Literal["single", "multi-key", "multi-value", "multi-query"]
KINDS: tuple[NeedleKind, ...] = ("single", "multi-key", "multi-value", "multi-query")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)

VERSION = 1
"""Raised when the same settings make other items or documents."""

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]


class LongContextSettings(Frozen):
    """Say what is measured (definitions: docs/long-context.md).

    ``lengths`` (tokens) are of prompt and answer together. ``items`` are for each kind and length,
    ``documents`` for the loss by position. ``haystack`` is a file of natural text for haystacks
    and documents; None means synthetic sentences.
    """

    lengths: Annotated[tuple[Count, ...], Field(min_length=1)] = LENGTHS
    kinds: tuple[NeedleKind, ...] = KINDS
    items: Count = 100
    documents: CountOrZero = 16
    seed: CountOrZero = 0
    haystack: Path | None = None

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if list(self.lengths) != sorted(set(self.lengths)):
            raise FieldError(
                "lengths",
                f"{list(self.lengths)} is not strictly ascending; sort, and drop doubles.",
            )
        if len(set(self.kinds)) < len(self.kinds):
            raise FieldError("kinds", f"{list(self.kinds)} names a kind twice; keep one.")
        if not self.kinds and not self.documents:
            raise FieldError("", "kinds is empty and documents is 0: nothing would be measured.")
        return self


def make_settings(**values: Any) -> LongContextSettings:
    """Return settings; raises EvalError with one line that begins with the field."""
    try:
        return LongContextSettings(**values)
    except ValidationError as error:
        raise EvalError(one_line(error, LongContextSettings, whole="long context")) from None


def read_lengths(text: str) -> tuple[int, ...]:
    """Read "256..65536" (doubling) or "256,1024"; raises EvalError."""
    first, dots, last = text.partition("..")
    words = [first, last] if dots else text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise EvalError(f"lengths: {text!r} is not A..B nor A,B,...; give whole numbers of tokens.")
    numbers = [int(word) for word in words]
    if not dots:
        return tuple(numbers)
    found = []
    length = numbers[0]
    while length <= numbers[1]:
        found.append(length)
        length *= 2
    if not found:
        raise EvalError(f"lengths: {text!r} is empty; begin with the smaller number.")
    return tuple(found)

"""Long documents for the loss by position, and its mean over documents."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from xlstm_eval.long_context.haystack import Haystack
from xlstm_eval.long_context.prompts import Prompter
from xlstm_eval.long_context.settings import VERSION
from xlstm_eval.records import EvalError, PositionLoss

FIRST_RANGE = 64
"""Positions of the first range; each further range ends at twice the position."""
PIECES = 64
"""Sentences that are taken at a time."""


def make_documents(
    prompter: Prompter, haystack: Haystack, seed: int, length: int, count: int
) -> list[str]:
    """Return documents of at least ``length`` tokens; raises EvalError: the text is too short."""
    made = []
    for index in range(count):
        source = random.Random(f"{VERSION} {seed} document {length} {index}")
        pieces = haystack.document(source, index, count)
        text, tokens = "", 0
        while tokens < length:
            taken = " ".join(itertools.islice(pieces, PIECES))
            if not taken:
                raise EvalError(
                    f"haystack: too short: one of {count} equal parts has {tokens} tokens, and "
                    f"a document takes {length}. Give a longer file, or fewer documents."
                )
            text = f"{text} {taken}" if text else taken
            tokens += prompter.count_part(taken)
            if tokens >= length:
                # Parts do not add up exactly.
                tokens = prompter.count_part(text)
        made.append(text)
    return made


def ranges(length: int) -> list[tuple[int, int]]:
    """Return the ranges of positions of a document: (from, to), ``to`` not included."""
    found, start, end = [], 0, FIRST_RANGE
    while start < length:
        found.append((start, min(end, length)))
        start, end = end, end * 2
    return found


def mean_losses(length: int, sums: Sequence[Sequence[float]]) -> tuple[PositionLoss, ...]:
    """Return the mean loss of each range over documents, from the sums of each document."""
    found = []
    for index, (start, end) in enumerate(ranges(length)):
        # Nothing predicts the token at position 0.
        tokens = (end - max(start, 1)) * len(sums)
        if tokens:
            total = math.fsum(document[index] for document in sums)
            found.append(_loss(start, end, total, tokens))
    return tuple(found)


def _loss(start: int, end: int, total: float, tokens: int) -> PositionLoss:
    # By the file's names: the attribute `start` cannot be called `from`.
    values = {"from": start, "to": end, "nll": total / tokens, "tokens": tokens}
    return PositionLoss.model_validate(values)

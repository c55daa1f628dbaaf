"""Questions to batches, and batches to ranks. Pure functions.

A batch is the unit of an evaluation: one rank answers it, one line of the journal keeps it. How
batches are composed follows from the questions and the number of rows alone, never from the number
of ranks or from what is answered already. So an answer is the same bit for bit however many ranks
there are, and whether the evaluation was interrupted.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PROTOCOL = 3
"""Raised when the same requests get other answers: batches, seeds, arithmetic of scores.

2: batches that do not depend on the number of ranks, a seed for each request, contexts read once,
log-probabilities in single precision. 3: rows that are done leave their batch.
"""

Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until", "loss_by_position"]
"""What is asked: three kinds of lm-eval's, and one of `long_context`."""


@dataclass(frozen=True)
class Question:
    """One request of lm-eval, with its arguments as lm-eval gives them.

    loglikelihood: (context, continuation). loglikelihood_rolling: (text,). generate_until: (prompt,
    settings). loss_by_position: (text, tokens). `repeat` counts equal requests whose answers are
    drawn at random. `key` names the question, and seeds those draws.
    """

    kind: Kind
    arguments: tuple[Any, ...]
    repeat: int
    key: str

    @property
    def seed(self) -> int:
        """Seed of the answer's draws: it depends on nothing but the question."""
        return int(self.key[:15], 16)


@dataclass(frozen=True)
class Measured:
    """A question and its lengths (tokens): what the model reads first, and what it then answers.

    The answer is the continuation, or the most tokens to generate.
    """

    question: Question
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        """Longest sequence that the question makes."""
        return self.prompt + self.answer


@dataclass(frozen=True)
class Batch:
    """Questions that are answered together, in this order.

    `rows` and `width` (tokens) are the size of the largest forward pass, as estimated.
    """

    kind: Kind
    questions: tuple[Question, ...]
    rows: int
    width: int

    @functools.cached_property
    def key(self) -> str:
        """Name of the batch: other neighbours make another batch."""
        return _hash([question.key for question in self.questions])

    @property
    def cost(self) -> int:
        """Tokens to compute, padding included."""
        return self.rows * self.width


def make_questions(
    kind: Kind, arguments: Iterable[tuple[Any, ...]], seed: int = 0
) -> list[Question]:
    """Name every request. Equal ones are one question, unless answers are drawn at random."""
    seen: Counter[str] = Counter()
    found = []
    for given in arguments:
        key, repeat = _hash([kind, given]), 0
        if kind == "generate_until" and draws(given[1]):
            repeat = seen[key]
            seen[key] += 1
            key = _hash([key, seed, repeat])
        found.append(Question(kind, given, repeat, key))
    return found


def draws(settings: dict[str, Any]) -> bool:
    """Whether generation settings draw tokens at random: lm-eval's rule."""
    sample, temperature = settings.get("do_sample"), float(settings.get("temperature") or 0)
    return temperature > 0 and sample is not False


def form_batches(measured: Iterable[Measured], rows: int) -> list[Batch]:
    """Compose batches of at most `rows` rows of similar length, the longest first.

    A batch has one kind and one set of generation settings. Continuations of one context stay
    together, so that the context is read once. A context with more continuations than `rows` is a
    batch of its own.
    """
    groups: dict[str, dict[str, list[Measured]]] = {}
    for entry in measured:
        group, unit = _places(entry.question)
        groups.setdefault(group, {}).setdefault(unit, []).append(entry)
    batches: list[Batch] = []
    for units in groups.values():
        for together in units.values():
            together.sort(key=lambda entry: entry.question.key)
        # The key breaks ties: the order of the tasks does not matter.
        ordered = sorted(units.values(), key=lambda unit: (-_width(unit), unit[0].question.key))
        batches += [_batch(cut) for cut in _cut(ordered, rows)]
    return batches


def deal(batches: Sequence[Batch], ranks: int) -> list[list[Batch]]:
    """Share batches between ranks by cost: each goes to the rank that has least, longest first."""
    shares: list[list[Batch]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for batch in sorted(batches, key=lambda batch: -batch.cost):
        cost, rank = heapq.heappop(least)
        shares[rank].append(batch)
        heapq.heappush(least, (cost + batch.cost, rank))
    return shares


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Cut a batch that does not fit the device's memory into two."""
    middle = (len(batch.questions) + 1) // 2
    first, second = batch.questions[:middle], batch.questions[middle:]
    rows = max(1, batch.rows // 2)
    return (
        Batch(batch.kind, first, rows, batch.width),
        Batch(batch.kind, second, rows, batch.width),
    )


def _places(question: Question) -> tuple[str, str]:
    """Name the group whose questions may share a batch, and the unit that no batch divides."""
    if question.kind == "generate_until":
        return _hash(question.arguments[1]), question.key
    if question.kind == "loglikelihood":
        return question.kind, question.arguments[0]
    return question.kind, question.key


def _width(unit: Sequence[Measured]) -> int:
    return max(entry.tokens for entry in unit)


def _rows(unit: Sequence[Measured]) -> int:
    """Rows of the largest forward pass: continuations of one token need none of their own."""
    if unit[0].question.kind != "loglikelihood":
        return len(unit)
    return max(1, sum(entry.answer > 1 for entry in unit))


def _cut(units: Sequence[list[Measured]], rows: int) -> Iterator[list[list[Measured]]]:
    taken: list[list[Measured]] = []
    used = 0
    for unit in units:
        if taken and used + _rows(unit) > rows:
            yield taken
            taken, used = [], 0
        taken.append(unit)
        used += _rows(unit)
    if taken:
        yield taken


def _batch(units: Sequence[list[Measured]]) -> Batch:
    entries = [entry for unit in units for entry in unit]
    questions = tuple(entry.question for entry in entries)
    rows = sum(_rows(unit) for unit in units)
    return Batch(questions[0].kind, questions, rows, _width(entries))


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]

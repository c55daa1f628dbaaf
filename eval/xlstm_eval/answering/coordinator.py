"""Share the questions of an evaluation between ranks, and gather the answers on rank 0.

Rank 0 alone runs lm-eval: it reads the tasks, asks, scores, and runs generated code where a task
does. The others answer what they are given.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xlstm_eval.answering.batches import Batch, Question, deal
from xlstm_eval.answering.journal import Answered, Journal
from xlstm_eval.answering.processes import answer_side_by_side

TICK_SECONDS = 2.0
"""How often rank 0 looks into the journals of the others while it waits for them."""

Compute = Callable[[Batch], Answered]


class Ranks(Protocol):
    """The processes of an evaluation. Every rank calls, and all wait for each other."""

    @property
    def index(self) -> int:
        """Number of this rank."""

    @property
    def count(self) -> int:
        """Number of ranks."""

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Return this rank's value of rank 0's list; the others pass None."""

    def gather(self, value: Any) -> list[Any] | None:
        """Return the values of all ranks on rank 0, None elsewhere."""


class OneRank:
    """A process alone."""

    index, count = 0, 1

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Return the only value."""
        assert values is not None
        return values[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Return the value in a list."""
        return [value]


@dataclass(frozen=True)
class Tally:
    """How far an evaluation is, over all ranks.

    Requests: `done` of `total`, of which `kept` were answered before this process began. tokens:
    read and generated since then.
    """

    done: int
    total: int
    kept: int
    tokens: int


Progress = Callable[[Tally], None]


class Coordinator:
    """Answers batches on all ranks; what is in the journal is not asked again.

    On rank 0 `answer` is called for each group of questions, and `finish` at the end. The other
    ranks call `follow`. `processes`: how many answer beside each other on this rank.
    """

    def __init__(
        self,
        compute: Compute,
        journal: Journal,
        ranks: Ranks,
        progress: Progress | None = None,
        count: Callable[[], int] = lambda: 0,
        processes: int = 1,
    ) -> None:
        self.compute, self.journal, self.ranks = compute, journal, ranks
        self._progress, self._count, self._processes = progress, count, processes
        # Batches by their keys, in the order in which they were asked, and how many requests each
        # answers: several requests can be one question.
        self._asked: dict[str, int] = {}
        self._kept: set[str] = set()

    def answer(self, questions: Sequence[Question], batches: Sequence[Batch]) -> list[Any]:
        """Return the answer to each question, in their order (rank 0)."""
        self.journal.read()
        requests = Counter(question.key for question in questions)
        for batch in batches:
            answered = sum(requests[question.key] for question in batch.questions)
            self._asked[batch.key] = self._asked.get(batch.key, 0) + answered
            if batch.key in self.journal.answered:
                self._kept.add(batch.key)
        missing = [batch for batch in batches if batch.key not in self.journal.answered]
        self._report()
        if missing:
            self._work(deal(missing, self.ranks.count))
        found: dict[str, Any] = {}
        for batch in batches:
            answers = self.journal.answered[batch.key].answers
            keys = [question.key for question in batch.questions]
            found |= dict(zip(keys, answers, strict=True))
        return [found[question.key] for question in questions]

    def follow(self) -> None:
        """Answer what rank 0 deals out, until it has finished (the other ranks)."""
        while (share := self.ranks.scatter(None)) is not None:
            self.ranks.gather(self._compute(share))
        self.journal.close()

    def finish(self) -> None:
        """Let the other ranks go (rank 0)."""
        self.ranks.scatter([None] * self.ranks.count)
        self.journal.close()

    def results(self) -> list[Answered]:
        """Return all answered batches, in the order in which they were asked."""
        return [self.journal.answered[key] for key in self._asked]

    def _work(self, shares: list[list[Batch]]) -> None:
        mine = self._compute(self.ranks.scatter(shares))
        with self._watched():
            gathered = self.ranks.gather(mine)
        # Sent and not read: a shared file system may show the others' files minutes late.
        for entries in gathered or ():
            self.journal.take(entries)
        self._report()

    def _compute(self, batches: Sequence[Batch]) -> list[Answered]:
        found = []
        for entry in answer_side_by_side(self.compute, batches, self._processes):
            self.journal.add(entry)
            found.append(entry)
            if self.ranks.index == 0:
                self._look_around()
        return found

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Report what the other ranks put into their journals while this one waits for them."""
        if self._progress is None or self.ranks.count == 1:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(TICK_SECONDS):
                self._look_around()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _look_around(self) -> None:
        """Report progress, with what the other ranks have written so far."""
        if self.ranks.count > 1 and self._progress is not None:
            self.journal.read()
        self._report()

    def _report(self) -> None:
        if self._progress is None:
            return
        done = kept = tokens = 0
        for key, requests in self._asked.items():
            entry = self.journal.answered.get(key)
            if entry is None:
                continue
            done += requests
            if key in self._kept:
                kept += requests
            else:
                tokens += entry.tokens
        self._progress(Tally(done, max(done, self._count()), kept, tokens))

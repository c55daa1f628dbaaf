"""A domain's documents: its sources, interleaved by tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from xlstm_distill.data.sources import Position, SourceReader
from xlstm_distill.data.tokenization import DocumentOutcome, Tokens
from xlstm_distill.data.workers import Submit
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Domain

AHEAD_BYTES = 2**26
"""Text of a source that may wait for the workers (bytes), whatever their number."""

HOPELESS = 1000
"""Documents of a source without a single token kept from which it is refused."""

LEFT_OUT = {
    DocumentOutcome.DROPPED: "too long",
    DocumentOutcome.EMPTY: "empty",
    DocumentOutcome.UNSUPERVISED: "with nothing to train on",
    DocumentOutcome.REFUSED: "refused by the chat template",
}


@dataclass
class SourceProgress:
    """How far a source has been read, as JSON values: a chunk's place, documents used of it, and what came of them."""

    position: dict[str, Any] = field(default_factory=lambda: asdict(Position()))
    used: int = 0
    tokens: int = 0
    dry: bool = False
    outcomes: dict[str, int] = field(
        default_factory=lambda: {outcome.name.lower(): 0 for outcome in DocumentOutcome}
    )
    reason: str | None = None

    def losses(self) -> str:
        """Say how many documents were left out, and why."""
        said = ", ".join(f"{n} {why}" for why, n in self.lost().items())
        reason = f" (the first: {self.reason})" if self.reason else ""
        return f"of {sum(self.outcomes.values())} documents {said} left out{reason}"

    def lost(self) -> dict[str, int]:
        """Documents that were left out, by reason."""
        return {
            why: n
            for outcome, why in LEFT_OUT.items()
            if (n := self.outcomes[outcome.name.lower()])
        }


class _Stream:
    """A source's documents in order, some chunks read and tokenised ahead."""

    def __init__(
        self, reader: SourceReader, progress: SourceProgress, submit: Submit, ahead: int
    ) -> None:
        self.progress, self._submit, self._ahead = progress, submit, ahead
        self._chunks = reader.chunks(Position(**progress.position))
        self._waiting: deque[tuple[Position, int, Future[list[Tokens]]]] = deque()
        self._bytes = 0
        self._failure: UserError | RunError | OSError | None = None
        self._ended = False
        self._documents: list[Tokens] = []
        self._skip = progress.used

    def next(self) -> Tokens | None:
        """The next document, of whatever outcome; None at the end."""
        while self.progress.used >= len(self._documents):
            if not self._advance():
                self.progress.dry = True
                return None
        document = self._documents[self.progress.used]
        self.progress.used += 1
        return document

    def _advance(self) -> bool:
        self._read_ahead()
        if not self._waiting:
            if self._failure is not None:
                raise self._failure
            return False
        position, size, future = self._waiting.popleft()
        self._bytes -= size
        self._documents = future.result()
        self.progress.position, self.progress.used, self._skip = asdict(position), self._skip, 0
        if self._ahead > 1:
            self._read_ahead()
        return True

    def _read_ahead(self) -> None:
        """Submit chunks; an error waits until all before it is used, so that workers do not change what is seen."""
        while not self._ended and (
            not self._waiting or (len(self._waiting) < self._ahead and self._bytes < AHEAD_BYTES)
        ):
            try:
                position, chunk = next(self._chunks)
                future = self._submit(chunk)
            except StopIteration:
                self._ended = True
            except (UserError, RunError, OSError) as error:
                self._failure, self._ended = error, True
            else:
                size = sum(
                    _size(value) for document in chunk.documents for value in document.values()
                )
                self._waiting.append((position, size, future))
                self._bytes += size


def _size(value: Any) -> int:
    """Characters of a column's text or messages."""
    if isinstance(value, list):
        return sum(
            len(str(message.get("content"))) for message in value if isinstance(message, dict)
        )
    return len(value) if isinstance(value, str) else 0


class Mixture:
    """A domain's kept documents, interleaved so that its sources' tokens keep to their weights at every point.

    A source that runs out stops; the others go on. `progress` has one entry per source; given to a new mixture it
    continues there. The order depends on neither workers nor chunks.
    """

    def __init__(
        self,
        domain: Domain,
        field: str,
        seed: int,
        submit: Submit,
        ahead: int,
        progress: list[SourceProgress] | None = None,
    ) -> None:
        self._field = field
        self.progress = progress or [SourceProgress() for _ in domain.sources]
        self._weights = [source.weight for source in domain.sources]
        self._streams = [
            _Stream(
                SourceReader(source, f"{field}.sources[{n}]", seed), self.progress[n], submit, ahead
            )
            for n, source in enumerate(domain.sources)
        ]

    def __iter__(self) -> Iterator[Tokens]:
        while live := [n for n, progress in enumerate(self.progress) if not progress.dry]:
            turn = min(live, key=lambda n: (self.progress[n].tokens / self._weights[n], n))
            progress = self.progress[turn]
            document = self._streams[turn].next()
            if document is None:
                continue
            progress.outcomes[document.outcome.name.lower()] += 1
            progress.reason = progress.reason or document.reason
            progress.tokens += len(document)
            if progress.tokens == 0 and sum(progress.outcomes.values()) >= HOPELESS:
                raise UserError(
                    f"{self._field}.sources[{turn}]: {progress.losses()}; nothing of it can be used."
                )
            if len(document):
                yield document

"""A domain's documents: its sources, interleaved by tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xlstm_distill.data.files.order import Position, text_size
from xlstm_distill.data.sources import SourceReader
from xlstm_distill.data.tokenization import DocumentOutcome, Tokens
from xlstm_distill.data.workers import Submit
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Domain

AHEAD_BYTES = 2**26
"""Text of a source that may wait for the workers (bytes), whatever their number."""

HOPELESS = 1000
"""A source is refused when nothing is kept of its first documents, this many."""

LEFT_OUT = {
    DocumentOutcome.DROPPED: "too long",
    DocumentOutcome.EMPTY: "empty",
    DocumentOutcome.UNSUPERVISED: "with nothing to train on",
    DocumentOutcome.REFUSED: "refused by the chat template",
}


@dataclass
class SourceProgress:
    """How far a source has been read, as JSON values.

    position: where the chunk that is being used begins.
    used: documents used of that chunk.
    tokens: tokens of all documents used.
    dry: whether the source has run out.
    outcomes: documents by what became of them (`DocumentOutcome`, lower case).
    reason: why the first document was refused.
    """

    position: Position = field(default_factory=Position)
    used: int = 0
    tokens: int = 0
    dry: bool = False
    outcomes: dict[str, int] = field(
        default_factory=lambda: {outcome.label: 0 for outcome in DocumentOutcome}
    )
    reason: str | None = None

    @classmethod
    def restored(cls, content: Mapping[str, Any]) -> SourceProgress:
        """Make it again of what `asdict` made of it.

        Raises:
            ValueError: another version of this package wrote it.
        """
        return cls(**{**content, "position": Position.restored(content["position"])})

    @property
    def documents(self) -> int:
        """Documents used so far, including those left out."""
        return sum(self.outcomes.values())

    def count(self, document: Tokens) -> None:
        """Count a document by its outcome, its tokens, and the first reason for a refusal."""
        self.outcomes[document.outcome.label] += 1
        self.tokens += len(document)
        self.reason = self.reason or document.reason

    def losses(self) -> str:
        """Say how many documents were left out, and why."""
        said = ", ".join(f"{count} {why}" for why, count in self.lost().items())
        reason = f" (the first: {self.reason})" if self.reason else ""
        return f"of {self.documents} documents {said} left out{reason}"

    def lost(self) -> dict[str, int]:
        """Count the documents that were left out, by reason."""
        counts = {why: self.outcomes[outcome.label] for outcome, why in LEFT_OUT.items()}
        return {why: count for why, count in counts.items() if count}


class _Pending(NamedTuple):
    """A chunk that was submitted: where it begins, its text (characters), and its tokens to be."""

    position: Position
    size: int
    tokens: Future[list[Tokens]]


class _Stream:
    """A source's documents in order; some chunks are read and tokenised ahead."""

    def __init__(
        self, reader: SourceReader, progress: SourceProgress, submit: Submit, ahead: int
    ) -> None:
        self.progress, self._submit, self._ahead = progress, submit, ahead
        self._chunks = reader.chunks(progress.position)
        self._pending: deque[_Pending] = deque()
        self._pending_size = 0
        self._failure: UserError | RunError | OSError | None = None
        self._ended = False
        self._documents: list[Tokens] = []
        # Reading resumes at the beginning of a chunk, of which these were used before.
        self._skip = progress.used

    def next(self) -> Tokens | None:
        """Return the next document, whatever its outcome; None at the end."""
        # A loop, because a resumed chunk may be used up already.
        while self.progress.used >= len(self._documents):
            if not self._next_chunk():
                self.progress.dry = True
                return None
        document = self._documents[self.progress.used]
        self.progress.used += 1
        return document

    def _next_chunk(self) -> bool:
        """Go on to the next chunk; False at the end of the source."""
        self._read_ahead()
        if not self._pending:
            if self._failure is not None:
                raise self._failure
            return False
        # Waits for this chunk, even if a later one is done: the order must not depend on workers.
        pending = self._pending.popleft()
        self._pending_size -= pending.size
        self._documents = pending.tokens.result()
        self.progress.position = pending.position
        self.progress.used, self._skip = self._skip, 0
        # The workers go on while this chunk is used. Without workers, reading ahead gains nothing.
        if self._ahead > 1:
            self._read_ahead()
        return True

    def _read_ahead(self) -> None:
        """Submit chunks until enough are pending.

        An error surfaces after the documents before it, whatever the number of workers.
        """
        while not self._ended and self._has_room():
            try:
                position, chunk = next(self._chunks)
                tokens = self._submit(chunk)
            except StopIteration:
                self._ended = True
            except (UserError, RunError, OSError) as error:
                self._failure, self._ended = error, True
            else:
                size = sum(text_size(document) for document in chunk.documents)
                self._pending.append(_Pending(position, size, tokens))
                self._pending_size += size

    def _has_room(self) -> bool:
        # One chunk always: otherwise a document above AHEAD_BYTES would stop its source.
        if not self._pending:
            return True
        return len(self._pending) < self._ahead and self._pending_size < AHEAD_BYTES


class Mixture:
    """A domain's kept documents; its sources' tokens keep to their weights at every point.

    A source that runs out stops; the others go on. `progress` has one entry per source; a new
    mixture that is given it goes on there. The order depends on neither workers nor chunks.
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
        self._streams = []
        for number, (source, own) in enumerate(zip(domain.sources, self.progress, strict=True)):
            reader = SourceReader(source, f"{field}.sources[{number}]", seed)
            self._streams.append(_Stream(reader, own, submit, ahead))

    def __iter__(self) -> Iterator[Tokens]:
        while (turn := self._next_source()) is not None:
            document = self._streams[turn].next()
            if document is None:
                continue
            progress = self.progress[turn]
            progress.count(document)
            # Otherwise a source of the wrong kind would be read to its end, which can take days.
            if progress.tokens == 0 and progress.documents >= HOPELESS:
                raise UserError(
                    f"{self._field}.sources[{turn}]: {progress.losses()}; nothing of it can be "
                    "used."
                )
            if len(document):
                yield document

    def _next_source(self) -> int | None:
        """Choose the source that is furthest behind its weight; None when all are dry."""
        live = [n for n, progress in enumerate(self.progress) if not progress.dry]

        def tokens_by_weight(n: int) -> float:
            # Tokens and not documents: the paper's shares are of tokens, and documents differ by
            # orders of magnitude in length.
            return self.progress[n].tokens / self._weights[n]

        # min returns the first of equal sources, so a tie does not depend on anything else.
        return min(live, key=tokens_by_weight, default=None)

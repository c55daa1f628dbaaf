"""A domain's documents: its sources tokenised, in this process or several, and interleaved by tokens."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any

import transformers

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Domain
from xlstm_distill.sources import Position, SourceReader
from xlstm_distill.tokenization import Chunk, ChunkTokenizer, Outcome, Tokens

AHEAD_BYTES = 2**26
"""Text of a source that may wait for the workers (bytes), whatever their number."""
SIGNAL_SECONDS = 0.5
"""How far apart processes of a job may get the same signal (seconds)."""
HOPELESS = 1000
"""Documents of a source without a single token kept from which it is refused."""
Submit = Callable[[Chunk], "Future[list[Tokens]]"]
LEFT_OUT = {
    Outcome.DROPPED: "too long",
    Outcome.EMPTY: "empty",
    Outcome.UNSUPERVISED: "with nothing to train on",
    Outcome.REFUSED: "refused by the chat template",
}
_tokenizer_of_worker: ChunkTokenizer | None = None


@contextlib.contextmanager
def tokenizing(tokenizer: ChunkTokenizer, workers: int) -> Iterator[tuple[Submit, int]]:
    """Give a function that tokenises chunks, and how many of a source may be under way at once.

    With `workers` processes they are spawned, since the parent may hold threads and a device; without, a chunk is
    tokenised as it is submitted.

    Raises:
        RunError: a worker died.
    """
    if workers == 0:
        yield lambda chunk: _done(tokenizer, chunk), 1
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer,))
    try:
        yield lambda chunk: pool.submit(_work, chunk), 2 * workers
    except BrokenProcessPool as error:
        time.sleep(SIGNAL_SECONDS)  # a SIGTERM to all processes raises Stopped here
        raise RunError(
            "data: a process that tokenises has died, perhaps for lack of memory; run the command again to go on from "
            "the last finished shard, with fewer data.workers if it happens again."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _done(tokenizer: ChunkTokenizer, chunk: Chunk) -> Future[list[Tokens]]:
    future: Future[list[Tokens]] = Future()
    future.set_result(tokenizer(chunk))
    return future


def _start_worker(tokenizer: ChunkTokenizer) -> None:
    global _tokenizer_of_worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the parent gets them too, and ends its workers: by SIGTERM if need be
    transformers.utils.logging.set_verbosity_error()  # long documents are no mistake here
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer_of_worker = tokenizer


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for its queue for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> list[Tokens]:
    assert _tokenizer_of_worker is not None
    return _tokenizer_of_worker(chunk)


@dataclass
class Progress:
    """How far a source has been read, as JSON values: a chunk's place, documents used of it, and what came of them."""

    position: dict[str, Any] = field(default_factory=lambda: asdict(Position()))
    used: int = 0
    tokens: int = 0
    dry: bool = False
    outcomes: dict[str, int] = field(default_factory=lambda: {outcome.name.lower(): 0 for outcome in Outcome})
    reason: str | None = None

    def losses(self) -> str:
        """Say how many documents were left out, and why."""
        said = ", ".join(f"{n} {why}" for why, n in self.lost().items())
        reason = f" (the first: {self.reason})" if self.reason else ""
        return f"of {sum(self.outcomes.values())} documents {said} left out{reason}"

    def lost(self) -> dict[str, int]:
        """Documents that were left out, by reason."""
        return {why: n for outcome, why in LEFT_OUT.items() if (n := self.outcomes[outcome.name.lower()])}


class _Stream:
    """A source's documents in order, some chunks read and tokenised ahead."""

    def __init__(self, reader: SourceReader, progress: Progress, submit: Submit, ahead: int) -> None:
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
                size = sum(_size(value) for document in chunk.documents for value in document.values())
                self._waiting.append((position, size, future))
                self._bytes += size


def _size(value: Any) -> int:
    """Characters of a column's text or messages."""
    if isinstance(value, list):
        return sum(len(str(message.get("content"))) for message in value if isinstance(message, dict))
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
        progress: list[Progress] | None = None,
    ) -> None:
        self._field = field
        self.progress = progress or [Progress() for _ in domain.sources]
        self._weights = [source.weight for source in domain.sources]
        self._streams = [
            _Stream(SourceReader(source, f"{field}.sources[{n}]", seed), self.progress[n], submit, ahead)
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
                raise UserError(f"{self._field}.sources[{turn}]: {progress.losses()}; nothing of it can be used.")
            if len(document):
                yield document

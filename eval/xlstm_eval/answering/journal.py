"""The journal of an evaluation: every answered batch as one line of JSON, kept until published.

Each rank appends to a file of its own, so nobody writes after a line that a killed process tore. A
file's first line says what its answers belong to; files of anything else are never read.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1
SYNC_SECONDS = 5.0
"""Longest time for which a power failure may take answers back; a killed process loses none."""


@dataclass(frozen=True)
class Answered:
    """A batch's answers, in the order of its questions, and what making them took.

    tokens: read and generated. pieces: forward passes' batches; more than 1 means that the device's
    memory was too small for the whole. warnings: lm-eval's on truncated prompts.
    """

    batch: str
    answers: Sequence[Any]
    tokens: int
    seconds: float
    pieces: int = 1
    warnings: Sequence[str] = ()


class Journal:
    """Answered batches of one evaluation, in memory and, with a folder, on disk.

    `identity` says which model is asked what.
    """

    def __init__(self, folder: Path | None = None, identity: str = "", rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.header = {"format": FORMAT, "identity": identity}
        self.answered: dict[str, Answered] = {}
        # Read up to here; None: a file of another evaluation.
        self._offsets: dict[Path, int | None] = {}
        self._file: BinaryIO | None = None
        self._synced = 0.0

    def add(self, entry: Answered) -> None:
        """Keep a batch's answers: they outlive a kill of this process from here on."""
        self.answered[entry.batch] = entry
        if self.folder is None:
            return
        if self._file is None:
            self._file = self._open(self.folder)
        # One write: a reader sees a whole line, or a torn one that has no end.
        self._file.write(_line(asdict(entry)))
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def take(self, entries: Sequence[Answered]) -> None:
        """Know batches that another rank has answered, and kept in its own file."""
        for entry in entries:
            self.answered.setdefault(entry.batch, entry)

    def read(self) -> None:
        """Read what other files hold that was not read before; call it again to follow them."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            # A file may be removed meanwhile: by who publishes.
            with contextlib.suppress(FileNotFoundError):
                self.take(list(self._new_lines(path)))

    def close(self) -> None:
        """Put everything on the disk."""
        if self._file is not None:
            with self._file:
                os.fsync(self._file.fileno())
            self._file = None

    def _open(self, folder: Path) -> BinaryIO:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"answers-{self.rank}-{uuid.uuid4().hex[:12]}.jsonl"
        self._offsets[path] = None
        file = path.open("xb")
        file.write(_line(self.header))
        return file

    def _new_lines(self, path: Path) -> Iterator[Answered]:
        """Yield the whole lines since the last look; a torn one waits until it has an end."""
        offset = self._offsets.get(path, 0)
        if offset is None:
            return
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
        end = content.rfind(b"\n") + 1
        lines = content[:end].splitlines()
        if offset == 0 and lines and _read(lines.pop(0)) != self.header:
            self._offsets[path] = None
            return
        self._offsets[path] = offset + end
        for line in lines:
            found = _read(line)
            # Damage (a lost block after a power failure) costs the batch, not the evaluation.
            with contextlib.suppress(TypeError):
                if isinstance(found, dict):
                    yield Answered(**found)


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _read(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None

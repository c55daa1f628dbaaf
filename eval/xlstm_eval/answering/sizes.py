"""How many rows a forward pass takes: a given number, or one that is found once and then kept."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from xlstm_eval.answering.batches import Kind

CPU_ROWS = 32
"""Rows on a device whose memory says nothing: more make a CPU no faster."""
MOST_ROWS = 256
"""Rows from which the search begins; it halves them until a trial fits the memory."""


class BatchSizes:
    """Rows per forward pass for each kind of request.

    The composition of batches changes the last digits of answers, so the number must not change
    between two models that are compared, or when an evaluation goes on. `given` is that of the
    user. Without one it is found by trial, and kept in `folder` for all models that share it.
    """

    def __init__(self, given: int | None = None, folder: Path | None = None) -> None:
        self.given, self.folder = given, folder
        self.used: dict[str, int] = {}

    def rows(self, kind: Kind, search: Callable[[], int]) -> int:
        """Return the rows for a kind; `search` finds them where nobody has."""
        if kind not in self.used:
            self.used[kind] = self.given or self._kept(kind) or self._keep(kind, search())
        return self.used[kind]

    def _path(self, kind: Kind) -> Path | None:
        return None if self.folder is None else self.folder / f"{kind}.json"

    def _kept(self, kind: Kind) -> int | None:
        path = self._path(kind)
        try:
            return None if path is None else max(1, int(json.loads(path.read_text())["rows"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, kind: Kind, rows: int) -> int:
        """Keep what was found; of several models that search at once, the first counts for all."""
        path = self._path(kind)
        if path is None:
            return rows
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        try:
            with partial.open("w") as file:
                file.write(json.dumps({"rows": rows}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # Unlike a rename, a link fails where the file is there already.
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return self._kept(kind) or rows


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """Return the most rows, from MOST_ROWS down by halves, for which `fits` is true; at least 1."""
    rows = MOST_ROWS
    while rows > 1 and not fits(rows):
        rows //= 2
    return rows

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

MOST_TOKENS = 2**20
"""Tokens from which the search begins where rows are long: a trial of more takes minutes."""


class BatchSizes:
    """Rows per forward pass for each kind of request, in each of lm-eval's two calls.

    Prompts with many examples come in the multi-turn call, the second one: what fits the short
    prompts of the first would not fit them. The composition of batches changes the last digits of
    answers, so the number must not change between two models that are compared, or when an
    evaluation goes on. `given` is that of the user, for all. Without one it is found by trial, and
    kept in `folder` for all models that share it.
    """

    def __init__(self, given: int | None = None, folder: Path | None = None) -> None:
        self.given, self.folder = given, folder
        self.used: dict[str, int] = {}

    def rows(self, kind: Kind, multiturn: bool, search: Callable[[], int]) -> int:
        """Return the rows for a kind in a call; `search` finds them where nobody has."""
        name = f"{kind}-{'multi' if multiturn else 'single'}-turn"
        if name not in self.used:
            # One size for both calls: an evaluation that an earlier version began goes on with it.
            kept = self._kept(name) or self._kept(kind)
            self.used[name] = self.given or kept or self._keep(name, search())
        return self.used[name]

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.json"

    def _kept(self, name: str) -> int | None:
        path = self._path(name)
        try:
            return None if path is None else max(1, int(json.loads(path.read_text())["rows"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, name: str, rows: int) -> int:
        """Keep what was found; of several models that search at once, the first counts for all."""
        path = self._path(name)
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
        return self._kept(name) or rows


def largest_that_fits(fits: Callable[[int], bool], width: int = 1) -> int:
    """Return the most rows, from MOST_ROWS down by halves, for which `fits` is true; at least 1.

    `width` (tokens) is that of the longest row.
    """
    rows = MOST_ROWS
    while rows > 1 and (rows * width > MOST_TOKENS or not fits(rows)):
        rows //= 2
    return rows

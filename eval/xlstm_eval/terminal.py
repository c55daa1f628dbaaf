"""Keep lm-eval's output off the terminal, and count its requests instead."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import TextIO

Progress = Callable[[int, int], None]
"""Takes the requests that are done, and all of them."""


class ProgressHook:
    """Count finished requests: lm-eval calls its cache hook once for each.

    ``count`` returns how many requests have been built so far, ``stderr`` is the terminal.
    """

    def __init__(self, progress: Progress, count: Callable[[], int], stderr: TextIO) -> None:
        self._progress, self._count, self._stderr = progress, count, stderr
        self._done = self._total = 0

    def add_partial(self, *_: object) -> None:
        # lm-eval builds the requests of one call before it runs the first. So all known ones are
        # done at the very first request, and again when a second call has built its own.
        if self._done == self._total:
            self._total = self._count()
        self._done += 1
        # `quiet` has taken the terminal away; the caller's bar needs it back.
        with contextlib.redirect_stderr(self._stderr):
            self._progress(self._done, self._total)


class _Collect(logging.Handler):
    """Keep the messages that a reader of the scores must know."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # A truncated prompt lowers a score, and nothing else would show it.
        if "trunc" in message.lower():
            self.messages.append(message)


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep lm-eval's log and bars off the terminal; yield its warnings on truncation."""
    logger, handler = logging.getLogger("lm_eval"), _Collect()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    # Otherwise the root logger's handlers print the messages all the same.
    logger.propagate = False
    try:
        # The bars of lm-eval and of datasets are written to stderr, whatever the log's level.
        with contextlib.redirect_stderr(io.StringIO()):
            yield handler.messages
    finally:
        # lm-eval sets its logger's level itself; put back what was there.
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

"""Keep lm-eval's output off the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator


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

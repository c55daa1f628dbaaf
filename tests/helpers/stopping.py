"""A console that stops the program in the middle of a search or a training, as Ctrl-C does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from xlstm_distill.runtime.console import QuietConsole


class StoppingConsole(QuietConsole):
    """Raises KeyboardInterrupt at the second step of the progress bar `label`."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label, self.left = label, math.inf

    @contextlib.contextmanager
    def progress(self, label: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Count the steps of this bar."""
        with super().progress(label, *args, **kwargs) as bar:
            self.left = 2 if label == self.label else math.inf
            update, bar.update = bar.update, lambda *a, **k: (self.count(), update(*a, **k))
            yield bar

    def count(self) -> None:
        """Take one step, the last of which stops the program."""
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

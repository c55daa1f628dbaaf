"""What stages print while they run: progress bars on a terminal, plain lines elsewhere.

rich is loaded for the first bar or table only: it would slow down `--help`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    import rich.console
    import rich.progress

PLAIN_SECONDS = 10.0
"""Least time between two plain lines of a progress (seconds)."""
RATE_SECONDS = 86400.0
"""Period from which a bar estimates the time left (seconds).

An estimate needs two steps, and some steps take minutes; rich's own 30 s would never hold two.
"""
PLAIN_WIDTH = 200
"""Width of tables where there is no terminal (columns)."""


class Progress(Protocol):
    """The progress of a stage."""

    def update(self, n: float, *, total: float | None = None, **metrics: float) -> None:
        """Add `n` units done and show the latest metrics; `total` replaces the total."""

    def skip(self, n: float) -> None:
        """Count `n` units as done before this progress began; they do not count for the rate."""


class Console:
    """Writes lines and progress to one stream.

    A stream that is not a terminal gets no control characters. `stage` is "stage 3 of 6" while a
    command runs several stages, else empty; bars show it.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = sys.stdout if stream is None else stream
        self.terminal = _is_terminal(self.stream) if terminal is None else terminal
        self.stage = ""
        self._clock = clock
        self._rich: rich.console.Console | None = None

    def line(self, text: str = "") -> None:
        """Write a line of plain text, above the bar if one is shown."""
        if self._rich is None:
            self.stream.write(text + "\n")
            self.stream.flush()
        else:
            self._rich.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: float | None, unit: str = "tokens") -> Iterator[Progress]:
        """Show progress towards `total` units during the block: rate, time left and metrics.

        `total` is None if it is not known yet. A block that raises leaves the progress as it is.
        """
        # A log file gets whole lines: a bar would fill it with control characters.
        if not self.terminal:
            plain = PlainProgress(self.line, label, total, unit, self._clock)
            yield plain
            plain.finish()
            return
        with _bar(self.rich(), self._clock) as bar:
            shown = f"{self.stage}  {label}" if self.stage else label
            task = bar.add_task(shown, total=total, unit=unit, rate="", metrics="")
            progress = RichProgress(bar, task, unit, total, self._clock)
            yield progress
            progress.finish()

    def rich(self) -> rich.console.Console:
        """Return the rich console on the same stream, for tables."""
        if self._rich is None:
            from rich.console import Console as RichConsole

            # Without a terminal rich would cut tables at 80 columns.
            width = None if self.terminal else PLAIN_WIDTH
            self._rich = RichConsole(file=self.stream, force_terminal=self.terminal, width=width)
        return self._rich


class QuietConsole(Console):
    """Writes nothing and keeps the lines in `lines`: for tests, and for all ranks but rank 0."""

    def __init__(self) -> None:
        super().__init__(terminal=False)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        """Keep a line."""
        self.lines.append(text)


class PlainProgress:
    """Progress as plain lines: at most one every PLAIN_SECONDS, and one at the end."""

    def __init__(
        self,
        write: Callable[[str], None],
        label: str,
        total: float | None,
        unit: str,
        clock: Callable[[], float],
    ) -> None:
        self._write, self._clock = write, clock
        self._label, self._total, self._unit = label, total, unit
        self._done = self._skipped = 0.0
        self._metrics: dict[str, float] = {}
        self._started = self._written = clock()
        self._last = ""

    def update(self, n: float, *, total: float | None = None, **metrics: float) -> None:
        """Add `n` units; write a line if the last one is PLAIN_SECONDS old."""
        self._done += n
        self._total = self._total if total is None else total
        self._metrics.update(metrics)
        # `finish` writes the line of a progress that is complete.
        if self._clock() - self._written >= PLAIN_SECONDS and not self._complete():
            self._written = self._clock()
            self._say()

    def skip(self, n: float) -> None:
        """Count `n` units as done before."""
        self._done += n
        self._skipped += n

    def finish(self) -> None:
        """Write the last line."""
        self._say()

    def _say(self) -> None:
        line = self._line()
        if line != self._last:
            self._last = line
            self._write(line)

    def _complete(self) -> bool:
        return self._total is not None and self._done >= self._total

    def _line(self) -> str:
        # Never 0: a clock may stand still between two calls.
        seconds = max(self._clock() - self._started, 1e-9)
        # Without what a resumed run did before: that took no time of this process.
        rate = (self._done - self._skipped) / seconds
        done, left = f"{short(self._done)} {self._unit}", ""
        if self._total:
            share = self._done / self._total
            done = f"{short(self._done)} of {short(self._total)} {self._unit} ({share:.0%})"
            if rate > 0 and not self._complete():
                left = f"{clock_time((self._total - self._done) / rate)} left"
        metrics = [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        parts = [done, f"{short(rate)} {self._unit}/s", left, *metrics]
        return f"{self._label}: " + ", ".join(part for part in parts if part)


class RichProgress:
    """Progress as a bar on a terminal."""

    def __init__(
        self,
        bar: rich.progress.Progress,
        task: Any,
        unit: str,
        total: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._bar, self._task, self._unit, self._clock = bar, task, unit, clock
        self._total, self._started = total, clock()
        self._done = self._skipped = 0.0
        self._metrics: dict[str, float] = {}

    def update(self, n: float, *, total: float | None = None, **metrics: float) -> None:
        """Add `n` units and redraw rate and metrics."""
        self._done += n
        self._total = self._total if total is None else total
        self._metrics.update(metrics)
        rate = self._done / max(self._clock() - self._started, 1e-9)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self._metrics.items())
        self._bar.update(
            self._task, advance=n, total=total, rate=f"{short(rate)} {self._unit}/s", metrics=shown
        )

    def skip(self, n: float) -> None:
        """Count `n` units as done before."""
        self._skipped += n
        self._bar.update(self._task, completed=self._skipped + self._done)

    def finish(self) -> None:
        """Draw the bar full: totals are estimates, and the work that there was is done."""
        total = self._total or self._done + self._skipped or 1.0
        self._bar.update(self._task, total=total, completed=total)


def _bar(console: rich.console.Console, clock: Callable[[], float]) -> rich.progress.Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[metrics]}"),
        console=console,
        get_time=clock,
        speed_estimate_period=RATE_SECONDS,
    )


def _is_terminal(stream: TextIO) -> bool:
    """Tell whether bars can be drawn. NO_COLOR removes the colour only; rich reads it itself."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def short(number: float) -> str:
    """Write a number with at most three significant digits and a suffix: 1.25M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999.5 rounds to 1e+03 with three digits; from there on the next suffix is due.
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def byte_size(number: float) -> str:
    """Write a number of bytes: 16.1 GB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size * 0.9995:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} bytes"


def clock_time(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""What stages print while they run: plain lines without a terminal, bars on one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import pytest

from xlstm_distill.runtime.console import Console, QuietConsole, clock_time, short


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def control_characters(text: str) -> list[str]:
    return [c for c in text if ord(c) < 32 and c != "\n"]


def test_plain_progress_speaks_at_most_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(stream, clock=clock).progress("align", 100_000) as progress:
        for _ in range(100):
            clock.now += 0.25
            progress.update(1000, loss=0.5)
    assert stream.getvalue().splitlines() == [
        "align: 40k of 100k tokens (40%), 4k tokens/s, 0:15 left, loss 0.5",
        "align: 80k of 100k tokens (80%), 4k tokens/s, 0:05 left, loss 0.5",
        "align: 100k of 100k tokens (100%), 4k tokens/s, loss 0.5",
    ]


def test_plain_progress_learns_its_total() -> None:
    stream, clock = io.StringIO(), Clock()
    with Console(stream, clock=clock).progress(
        "evaluate/teacher", None, unit="requests"
    ) as progress:
        clock.now = 10.0
        progress.update(20)
        clock.now = 20.0
        progress.update(20, total=80)
    assert stream.getvalue().splitlines() == [
        "evaluate/teacher: 20 requests, 2 requests/s",
        "evaluate/teacher: 40 of 80 requests (50%), 2 requests/s, 0:20 left",
    ]


def test_failed_block_claims_no_end() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Console(stream).progress("align", 10) as progress:
            progress.update(5)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert stream.getvalue() == ""


def test_piped_output_has_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    console = Console(stream)
    console.rich().print("[bold]table[/bold]")
    with console.progress("align", 10) as progress:
        progress.update(10)
    console.line("[brackets] stay, and a long line stays one: " + "x" * 300)
    assert not control_characters(stream.getvalue())
    assert (
        stream.getvalue().splitlines()[-1]
        == "[brackets] stay, and a long line stays one: " + "x" * 300
    )


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Run a progress on a terminal and return what it drew."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")

    def draw() -> str:
        stream, clock = Terminal(), Clock()
        with (
            contextlib.suppress(InterruptedError),
            Console(stream, clock=clock).progress("align", 100_000) as progress,
        ):
            clock.now = 10.0
            progress.update(50_000, loss=0.25)
            raise InterruptedError  # the bar stays as it is, and is drawn once more
        return stream.getvalue()

    return draw


def test_terminal_gets_a_bar(on_terminal: Callable[[], str]) -> None:
    text = on_terminal()
    assert "\x1b[" in text
    for part in ("align", "50%", "5k tokens/s", "loss 0.25"):
        assert part in text


def test_a_bar_says_the_time_left_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream, clock = Terminal(), Clock()
    with (
        contextlib.suppress(InterruptedError),
        Console(stream, clock=clock).progress("align", 100) as progress,
    ):
        for _ in range(3):
            clock.now += 400.0
            progress.update(10)
        raise InterruptedError
    assert "46:40" in stream.getvalue()


@pytest.mark.parametrize("total", [100, None])
def test_a_bar_ends_at_100_percent(monkeypatch: pytest.MonkeyPatch, total: int | None) -> None:
    """Also where the total was an estimate, or never known, and after units of an earlier run."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with Console(stream, clock=Clock()).progress("data/math", total) as progress:
        progress.skip(10)
        progress.update(87)
    last = stream.getvalue().split("data/math")[-1]
    assert "100%" in last


def test_a_bar_whose_block_fails_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()

    def fail() -> None:
        with Console(stream, clock=Clock()).progress("align", 100) as progress:
            progress.update(40)
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert "40%" in stream.getvalue().split("align")[-1]


def test_a_bar_names_the_stage_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    console = Console(stream, clock=Clock())
    console.stage = "stage 3 of 6"
    with console.progress("distill/math", 100) as progress:
        progress.update(100)
    assert "stage 3 of 6  distill/math" in stream.getvalue()


def test_no_color_takes_the_colour_from_the_bar(
    on_terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\x1b[38;5;" in on_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38;5;" not in on_terminal()


def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(stream).progress("align", 10) as progress:
        progress.update(10)
    assert not control_characters(stream.getvalue())


def test_quiet_console_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    console = QuietConsole()
    console.line("one")
    with console.progress("align", 10) as progress:
        progress.update(10)
    assert console.lines[0] == "one"
    assert console.lines[1].startswith("align: 10 of 10 tokens (100%)")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.9, "1k"),
        (1250, "1.25k"),
        (655e6, "655M"),
        (20e9, "20B"),
        (1.5e12, "1.5T"),
    ],
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")]
)
def test_clock_times(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text

"""What is known of an artifact of a run, and what reading it can raise."""

from __future__ import annotations

from dataclasses import dataclass

DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
    ArithmeticError,
    RecursionError,
)
"""What reading half-written or foreign files can raise."""
ROW_FIGURES = ("rows", "tokens", "fill", "bytes_per_token")
"""Figures of prepared rows, by their names in the manifest."""


@dataclass(frozen=True)
class StageStatus:
    """Where an artifact of the run stands. Times are in seconds.

    `state` is `done`, `outdated` (made from other settings than the saved recipe's; `why` names
    them), `running`, `silent` (running, but its log does not grow), `stopped`, `waiting` (not
    begun), `unreadable` (`path` names the file, from the run directory on) or `damaged` (`why`
    names a file that is missing or has another size). Steps of `data/NAME` are its rows,
    and those of a merge whose weights are searched are trials.
    """

    label: str
    state: str
    seconds: float | None = None
    step: int | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    seconds_since: float | None = None
    checkpoint: int | None = None
    figures: dict[str, float] | None = None
    host: str | None = None
    why: str | None = None
    path: str | None = None

"""The status of a run as a table, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xlstm_distill.runtime.console import clock_time, short
from xlstm_distill.stages.status.records import ROW_FIGURES, StageStatus

if TYPE_CHECKING:
    from rich.table import Table

AGAIN = "outdated: 'xlstm-distill run' makes these again, and keeps the earlier ones"
"""What follows from an outdated artifact; `why` says what changed."""


def to_json(
    stages: list[StageStatus], kept: Sequence[Any] = (), jobs: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Write the status as JSON, facts that do not apply left out.

    `kept` are `upkeep.Kept`, and `jobs` the indices of Slurm jobs, if the run has some.
    """
    found = []
    for stage in stages:
        facts = asdict(stage)
        found.append({key: value for key, value in facts.items() if value is not None})
    values: dict[str, Any] = {"stages": found, "kept": [asdict(one) for one in kept]}
    if jobs:
        values["jobs"] = list(jobs)
    return json.dumps(values, indent=1)


def status_table(stages: list[StageStatus]) -> Table:
    """Lay the status out for reading."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("stage", "state", "time", "step", "tokens/s", "left", "figures"):
        words = name in ("stage", "state", "figures")
        table.add_column(name, justify="left" if words else "right", no_wrap=name != "state")
    for stage in stages:
        # As text: a host or label with brackets is no markup.
        table.add_row(*map(Text, _cells(stage)))
    return table


SHOWN_FIGURES = (
    *ROW_FIGURES,
    "loss",
    "ce",
    "kl",
    "relative_error",
    "grad_norm",
    "held_out_ce",
    "held_out_kl",
    "held_out_gate",
)


def _cells(stage: StageStatus) -> tuple[str, ...]:
    known = stage.figures or {}
    figures = [f"{name} {_written(known[name])}" for name in SHOWN_FIGURES if name in known]
    return (
        stage.label,
        _state_in_words(stage),
        clock_time(stage.seconds) if stage.seconds is not None else "",
        f"{stage.step} of {stage.steps}" if stage.steps else "",
        short(stage.tokens_per_second) if stage.tokens_per_second else "",
        clock_time(stage.seconds_left) if stage.seconds_left is not None else "",
        ", ".join(figures),
    )


def _written(figure: float) -> str:
    # Counts of rows and tokens are large; losses never are.
    return short(figure) if abs(figure) >= 1e5 else f"{figure:.4g}"


def _state_in_words(stage: StageStatus) -> str:
    since = clock_time(stage.seconds_since or 0)
    if stage.state == "unreadable":
        return f"unreadable: {stage.path}" if stage.why is None else f"unreadable: {stage.why}"
    if stage.state == "silent":
        return f"running, silent for {since}"
    if stage.state == "stopped":
        at = "without a checkpoint"
        if stage.checkpoint is not None:
            at = f"at checkpoint {stage.checkpoint}"
        return f"stopped {since} ago {at}"
    words = stage.state if stage.host is None else f"{stage.state} on {stage.host}"
    return words if stage.why is None else f"{words}: {stage.why}"

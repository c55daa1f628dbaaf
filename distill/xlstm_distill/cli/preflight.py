"""Whether the processes of a run can share the recipe's batches: asked before any work is done."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from xlstm_distill.errors import UserError
from xlstm_distill.recipe.problems import nearest_batches
from xlstm_distill.runtime.ranks import is_main_process

if TYPE_CHECKING:
    from xlstm_distill.recipe import Recipe

BAD_INPUT = 2
PATIENCE_SECONDS = 5.0
"""How long the other processes let the first one speak; then a launcher has ended them, or they end by themselves."""


def check_batches(
    recipe: Recipe, stages: Sequence[str], processes: int, run: Path, *, expert: str | None = None
) -> None:
    """Refuse a batch that so many processes cannot share, unless the run has what the stage is to make.

    Raises:
        UserError: names the batch; on the first process alone.
    """
    experts = [expert] if expert else list(recipe.distill.experts)
    new = "mlstm" in recipe.student.mixer.branches  # else there is nothing to align
    trained = {
        "align": (recipe.align, ["align"] if new else []),
        "distill": (recipe.distill, [f"distill/{name}" for name in experts]),
    }
    for stage, (section, labels) in trained.items():
        if stage not in stages or section.batch % processes == 0:
            continue
        if not all((run / "artifacts" / label / "manifest.json").is_file() for label in labels):
            _refuse_once(
                f"{stage}.batch: {section.batch} rows cannot be shared by {processes} processes; take "
                f"{nearest_batches(section.batch, processes)}, or a number of processes that divides it."
            )


def _refuse_once(message: str) -> NoReturn:
    """All processes come to the same answer: the first says it, the others end as it does."""
    if is_main_process():
        raise UserError(message)
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # from a launcher that has seen the first end: no reason to speak
    time.sleep(PATIENCE_SECONDS)
    raise typer.Exit(BAD_INPUT)

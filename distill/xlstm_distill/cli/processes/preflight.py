"""Check before any work that the processes of a run can share the recipe's batches."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.ranks import is_main_process

if TYPE_CHECKING:
    from xlstm_distill.recipe import Optimization, Recipe

BAD_INPUT = 2
PATIENCE_SECONDS = 5.0
"""Time for rank 0 to print its error before the other ranks end (seconds)."""


def check_batches(
    recipe: Recipe, stages: Sequence[str], processes: int, run: Path, *, expert: str | None = None
) -> None:
    """Refuse a batch that the processes cannot share, unless the run has what the stage makes.

    Raises:
        UserError: names every such batch; on rank 0 only.
    """
    # Not at the top: building the recipe's models takes half of the time that `--help` may take.
    from xlstm_distill.recipe.problems import nearest_batches

    # Also an index: a job array names experts so.
    experts = _chosen_experts(recipe, stages, expert)
    # Without the mLSTM branch there is nothing to align.
    aligned = ["align"] if "mlstm" in recipe.student.mixer.branches else []
    trained: dict[str, tuple[Optimization, list[str]]] = {
        "align": (recipe.align, aligned),
        "distill": (recipe.distill, [f"distill/{name}" for name in experts]),
    }
    if recipe.refine is not None:
        refined = recipe.refine.refined(recipe.distill)
        labels = [f"refine/{name}" for name in experts if name in refined]
        trained["refine"] = (recipe.refine, labels)
    problems = []
    for stage, (section, labels) in trained.items():
        # Each rank gets the same number of rows of a step.
        if stage not in stages or section.batch % processes == 0:
            continue
        if all(_is_made(recipe, run, label) for label in labels):
            continue
        problems.append(
            f"{stage}.batch: {section.batch} rows cannot be shared by {processes} processes; take "
            f"{nearest_batches(section.batch, processes)}, or a number of processes that divides "
            "it."
        )
    if problems:
        _refuse_once(problems)


def check_words(
    recipe: Recipe,
    stage: str,
    *,
    expert: str | None = None,
    model: str | None = None,
    shard: str | None = None,
) -> None:
    """Refuse an expert, a model or a share that the recipe does not have, before any work.

    Raises:
        UserError: there is none of this name.
    """
    from xlstm_distill.stages.choices import (
        choose_models,
        share_of_capture,
        share_of_domains,
    )
    from xlstm_distill.stages.lineage import Lineage

    if expert is not None or stage == "refine":
        _chosen_experts(recipe, (stage,), expert)
    if model is not None:
        choose_models(Lineage(recipe), model)
    if shard is not None and stage == "capture":
        share_of_capture(recipe, shard)
    elif shard is not None:
        share_of_domains(recipe, shard)


def _chosen_experts(recipe: Recipe, stages: Sequence[str], expert: str | None) -> Sequence[str]:
    """Names of the experts that stages train: those that are refined where that is all they do."""
    from xlstm_distill.stages.choices import choose_experts, choose_refined

    if tuple(stages) == ("refine",):
        return choose_refined(recipe, expert)
    return choose_experts(list(recipe.distill.experts), expert)


def _is_made(recipe: Recipe, run: Path, label: str) -> bool:
    """Whether a run has an artifact with the recipe's settings, so that nothing will train."""
    from xlstm_distill.stages.lineage import Lineage

    try:
        manifest = json.loads((run / "artifacts" / label / "manifest.json").read_text())
        # Settings alone are compared, as in `status`: hashing a teacher takes too long for a check.
        # If files did change, the stage itself refuses the batch.
        return not Lineage(recipe).changes(label, manifest)
    except (OSError, ValueError, AttributeError):
        return False


def _refuse_once(problems: list[str]) -> NoReturn:
    """End every rank with the same exit code; only rank 0 prints the problems."""
    if is_main_process():
        raise UserError(*problems)
    # The launcher sends SIGTERM as soon as rank 0 has ended. That is no reason to print anything.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE_SECONDS)
    raise typer.Exit(BAD_INPUT)

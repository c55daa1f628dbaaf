"""Merge: combine the experts' weights into one student (stage III; paper, Eq. 14)."""

from __future__ import annotations

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.merging.groups import GroupedWeights
from xlstm_distill.recipe.merging import WITH_SCALE
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import from_rank_zero
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.weights.found import merge_with_found_weights
from xlstm_distill.stages.weights.validation import check_tuning
from xlstm_distill.stages.weights.writing import SEED_STUDENT, check_seed_student, write_merge


def merge(lineage: Lineage, run: Run, console: Console) -> list[Artifact]:
    """Merge the experts, and once more for each of the recipe's variants.

    With one expert the result is that expert.
    """
    return [_merge(lineage, run, label, console) for label in labels(lineage)]


def labels(lineage: Lineage) -> list[str]:
    """Labels of the recipe's merges."""
    return ["merge", *(f"variant/{name}" for name in lineage.recipe.merge.variants)]


def check(lineage: Lineage, run: Run) -> None:
    """Refuse before any training weights that could not be tuned after it.

    Raises:
        UserError: optuna is not installed, or a task of the search is held out.
        EvalError: a task of the search cannot be loaded.
    """

    def missing() -> None:
        for label in labels(lineage):
            if lineage.merge(label).found == "tuned" and not run.find(lineage.request(label)):
                check_tuning(lineage.recipe, label, lineage.merge(label).tuning)

    from_rank_zero(missing)


def _merge(lineage: Lineage, run: Run, label: str, console: Console) -> Artifact:
    settings = lineage.settings(label)
    # All of them, also those of weight 0: they are inputs of the merge's fingerprint.
    names = list(lineage.recipe.distill.experts)
    experts = {name: run.need(lineage.request(lineage.expert_label(name))) for name in names}
    base = None
    if settings["method"] in WITH_SCALE:
        base = run.need(lineage.request(SEED_STUDENT))
        check_seed_student(base, experts)
    if lineage.merge(label).found is not None:
        return merge_with_found_weights(lineage, run, label, experts, base, console)

    def build(draft: Draft) -> None:
        grouped = GroupedWeights((settings["weights"],), layers=1)
        write_merge(grouped, settings, experts, base, draft, label, console)

    return run.make(lineage.request(label), build, console=console)

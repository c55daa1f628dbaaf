"""Merge with weights that are found: tuned on validation items, or learned without labels."""

from __future__ import annotations

from collections.abc import Mapping

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.merging.files import SavedWeights
from xlstm_distill.merging.groups import GroupedWeights
from xlstm_distill.merging.merge import Sources
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import is_main_process
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.weights.learning import learn
from xlstm_distill.stages.weights.material import Material
from xlstm_distill.stages.weights.tuning import tune
from xlstm_distill.stages.weights.writing import plan_settings, write_merge


def merge_with_found_weights(
    lineage: Lineage,
    run: Run,
    label: str,
    experts: Mapping[str, Artifact],
    base: Artifact | None,
    console: Console,
) -> Artifact:
    """Find weights on all ranks, then merge on rank 0.

    What was found so far lies in the work directory until the merge is published.
    """
    request = lineage.request(label)
    settings = lineage.settings(label)
    merge = lineage.merge(label)
    data: dict[str, Artifact] = {}
    if merge.found == "learned" and not run.has(request):
        data = prepare_rows(lineage, run, lineage.learned_rows(), console)

    def weights(draft: Draft) -> GroupedWeights:
        material = Material(
            lineage,
            label,
            merge,
            dict(experts),
            open_sources(experts, base),
            run.work_directory(request),
        )
        fixed = plan_settings(settings)
        if merge.found == "tuned":
            return tune(material, fixed, draft, console)
        return learn(material, fixed, base, data, draft, console)

    def build(draft: Draft) -> None:
        with run.working(label):
            grouped = weights(draft)
            if is_main_process():
                write_merge(grouped, settings, experts, base, draft, label, console)

    return run.make(request, build, together=True, console=console)


def open_sources(experts: Mapping[str, Artifact], base: Artifact | None) -> Sources:
    """Open the experts' files, and the seed student's where differences are merged."""
    opened = {name: SavedWeights(artifact.model_path) for name, artifact in experts.items()}
    return Sources(opened, SavedWeights(base.model_path) if base else None)

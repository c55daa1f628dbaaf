"""Write a merge: from the experts' artifacts and their weights to the files of one student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts import Artifact, Draft
from xlstm_distill.errors import RunError
from xlstm_distill.merging.files import NewWeights, SavedWeights, copy_other_files
from xlstm_distill.merging.groups import GroupedWeights
from xlstm_distill.merging.merge import MergePlan, Sources, merge_files, plan_for
from xlstm_distill.runtime.console import Console

SEED_STUDENT = "align"
PLAN_KEYS = ("method", "scale", "density", "seed")
"""Settings of a merge that its plan has besides the weights."""


def check_seed_student(base: Artifact, experts: Mapping[str, Artifact]) -> None:
    """Refuse experts that were not trained from this seed student.

    Raises:
        RunError: names the first such expert.
    """
    for name, expert in experts.items():
        seed = expert.manifest["inputs"].get(SEED_STUDENT)
        if seed != base.identity:
            raise RunError(
                f"{expert.path}: expert {name!r} was trained from another seed student than "
                f"{base.path}; run the stage 'distill' again."
            )


def write_merge(
    grouped: GroupedWeights,
    settings: Mapping[str, Any],
    experts: Mapping[str, Artifact],
    base: Artifact | None,
    draft: Draft,
    label: str,
    console: Console,
) -> None:
    """Write the merge with these weights into a draft, and note the weights (rank 0)."""
    plan = plan_for(grouped, **plan_settings(settings))
    # Experts of weight 0 are not read.
    used = {name: experts[name] for name in plan.weights}
    for artifact in (*used.values(), *([base] if base else [])):
        artifact.check_content("model")
    places = {name: artifact.model_path for name, artifact in used.items()}
    seed_student = base.model_path if base else None
    write_merged(plan, places, seed_student, draft.path / "model", label, console)
    sets = [dict(weights) for weights in grouped.sets]
    draft.results["weights"] = sets[0] if len(sets) == 1 else sets
    for number, weights in enumerate(sets):
        shown = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
        group = f" (group {number} of layers)" if len(sets) > 1 else ""
        console.line(f"{label}: {settings['method']}{group}, {shown}")


def plan_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A merge plan's settings besides the weights, from those of the merge."""
    return {key: settings[key] for key in PLAN_KEYS if key in settings}


def write_merged(
    plan: MergePlan,
    places: Mapping[str, Path],
    base: Path | None,
    target: Path,
    label: str,
    console: Console,
) -> None:
    """Merge the students saved in these folders, by expert, into a folder like the first one.

    Memory does not grow with the students: a few blocks of a tensor for each thread.

    Raises:
        UserError: the experts differ in a tensor, or a weight is not allowed.
        RunError: a file is damaged.
    """
    first = next(iter(places.values()))
    sources = Sources(
        {name: SavedWeights(place) for name, place in places.items()},
        SavedWeights(base) if base else None,
    )
    copy_other_files(first, target)
    written = NewWeights(next(iter(sources.experts.values())), target)
    # In millions: the console writes a thousand million as B, which reads like bytes.
    with console.progress(label, written.bytes / 1e6, unit="MB") as progress:
        merge_files(plan, sources, written, lambda count: progress.update(count / 1e6))

"""Merge: combine the experts' weights into one student (stage III; paper, Eq. 14)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.errors import RunError
from xlstm_distill.merging.files import NewWeights, SavedWeights, copy_other_files
from xlstm_distill.merging.merge import MergePlan, Sources, merge_files
from xlstm_distill.recipe.merging import WITH_SCALE
from xlstm_distill.runtime.console import Console
from xlstm_distill.stages.lineage import Lineage

SEED_STUDENT = "align"


def merge(lineage: Lineage, run: Run, console: Console) -> list[Artifact]:
    """Merge the experts, and once more for each of the recipe's variants.

    With one expert the result is that expert.
    """
    labels = ["merge", *(f"variant/{name}" for name in lineage.recipe.merge.variants)]
    return [_merge(lineage, run, label, console) for label in labels]


def _merge(lineage: Lineage, run: Run, label: str, console: Console) -> Artifact:
    settings = lineage.settings(label)
    weights: dict[str, float] = settings["weights"]
    # All of them, also those of weight 0: they are inputs of the merge's fingerprint.
    experts = {name: run.need(lineage.request(f"distill/{name}")) for name in weights}
    base = None
    if settings["method"] in WITH_SCALE:
        base = run.need(lineage.request(SEED_STUDENT))
        check_seed_student(base, experts)

    def build(draft: Draft) -> None:
        # Experts of weight 0 are not read.
        used = {name: weight for name, weight in weights.items() if weight > 0}
        for artifact in (*(experts[name] for name in used), *([base] if base else [])):
            artifact.check_content("model")
        plan = MergePlan(**(settings | {"weights": used}))
        places = {name: experts[name].model_path for name in used}
        seed_student = base.model_path if base else None
        write_merged(plan, places, seed_student, draft.path / "model", label, console)
        draft.results |= {"weights": weights}
        shown = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
        console.line(f"{label}: {settings['method']}, {shown}")

    return run.make(lineage.request(label), build, console=console)


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

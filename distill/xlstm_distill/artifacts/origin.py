"""Where a saved model comes from, as far as manifests tell: for models that a user names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xlstm_distill.artifacts.artifact import Artifact
from xlstm_distill.artifacts.manifest import read_manifest
from xlstm_distill.errors import UserError

SEED_STUDENT, EXPERT = "align", "distill"
"""Stages of what experts are trained from: the aligned student, and experts that are refined."""
MODEL = "model"
"""Folder of the model in an artifact."""


@dataclass(frozen=True)
class Origin:
    """What an expert was trained from: its seed student's identity, or why that is not known."""

    seed: str | None
    doubt: str | None = None


def artifact_at(place: Path) -> Artifact | None:
    """The artifact that a folder is, or whose model it is; None for a model without a manifest.

    Raises:
        UserError: the manifest is damaged.
    """
    whole = place.absolute()
    for folder in (place, *([place.parent] if whole.name == MODEL else [])):
        manifest = read_manifest(folder)
        if manifest is not None:
            return Artifact(folder, manifest)
    return None


def origin_of(base: Path, expert: Path) -> Origin:
    """Check that an expert was trained from a base; a model without a manifest leaves it open.

    Models of one architecture have the same tensors, so nothing but lineage tells their seeds
    apart: a difference from another seed student is noise. Reads the files of both, if they have
    manifests, to compare checksums.

    Raises:
        UserError: the expert was trained from another student.
        RunError: a file of one of them is missing or changed.
    """
    student, trained = artifact_at(base), artifact_at(expert)
    for artifact in (student, trained):
        if artifact is not None:
            artifact.check_content(MODEL)
    if trained is None:
        return Origin(None, "the expert has no manifest")
    seeds = _seeds(trained)
    if student is not None and trained.identity in _seeds(student).values():
        raise UserError(
            f"{base}: was trained from {expert}, not the other way round; give the seed student "
            "first and then the expert."
        )
    if SEED_STUDENT not in seeds:
        return Origin(None, "the expert's manifest names no seed student")
    if student is None:
        return Origin(None, "the base has no manifest")
    if student.identity not in seeds.values():
        found = f"{student.manifest['stage']} {student.identity}"
        raise UserError(
            f"{expert}: was trained from the aligned student {seeds[SEED_STUDENT]}, and {base} is "
            f"{found}; give artifacts/{SEED_STUDENT} of the run that the expert was trained in."
        )
    return Origin(student.identity)


def _seeds(artifact: Artifact) -> dict[str, str]:
    """What a model was trained from: identities by label."""
    inputs = artifact.manifest["inputs"]
    return {label: key for label, key in inputs.items() if _trains_experts(label)}


def _trains_experts(label: str) -> bool:
    # A refined expert names both the aligned student and the expert that it was refined from.
    return label == SEED_STUDENT or label.startswith(f"{EXPERT}/")

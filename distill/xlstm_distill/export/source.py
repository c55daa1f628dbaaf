"""Find a student: a model's directory, or a model of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts import Artifact
from xlstm_distill.artifacts.manifest import read_manifest
from xlstm_distill.artifacts.shelf import KEPT, folders_of
from xlstm_distill.errors import UserError
from xlstm_distill.models.teacher_files import CONFIG, weight_files
from xlstm_distill.recipe import Recipe
from xlstm_distill.stages.choices import choose
from xlstm_distill.stages.outline import MERGED, Outline
from xlstm_distill.stages.status.comparison import saved_recipe

PREFIX = "xlstm_"
"""What the `model_type` of a student begins with; its teacher's follows."""


@dataclass(frozen=True)
class FoundStudent:
    """A student on the disk. `run`, `recipe` and `name` are there where it is a run's."""

    directory: Path
    config: dict[str, Any]
    run: Path | None = None
    recipe: Recipe | None = None
    name: str | None = None

    @property
    def teacher_type(self) -> str:
        """The teacher's `model_type`."""
        return str(self.config["model_type"]).removeprefix(PREFIX)


def find_student(place: Path, model: str | None = None) -> FoundStudent:
    """Find the student at a place: of a run the merged one, or the expert that `model` names.

    A run's model is compared with its checksums.

    Raises:
        UserError: there is no student, or no model of this name.
        RunError: a file of it is missing or changed.
    """
    if (place / CONFIG).is_file():
        if model is not None:
            raise UserError(f"--model: {place} is a model already; leave the option out.")
        return FoundStudent(place, _read_config(place))
    if not (place / "artifacts").is_dir():
        raise UserError(
            f"RUN_OR_MODEL: {place} is neither a run directory (no folder 'artifacts') nor a "
            f"model's (no {CONFIG}); give one of them."
        )
    models = _models(place)
    if not models:
        raise UserError(
            f"RUN_OR_MODEL: {place} has no student yet; 'xlstm-distill status {place}' shows how "
            "far the run is."
        )
    if model is None and MERGED not in models:
        raise UserError(
            f"RUN_OR_MODEL: {place} has no merged student yet; name an expert with --model: "
            f"{', '.join(models)}."
        )
    (name,) = choose(list(models), model or MERGED, "--model", f"{place}")
    models[name].check_content("model")
    directory = models[name].model_path
    recipe = saved_recipe(place)
    return FoundStudent(directory, _read_config(directory), place, recipe, name)


def _models(run: Path) -> dict[str, Artifact]:
    """The published students of a run by name, the merged one first."""
    recipe = saved_recipe(run)
    found: dict[str, Artifact] = {}
    # By name, so that a refined expert comes after what it was made from, and counts.
    for label, folder in folders_of(run):
        stage, _, name = label.partition("/")
        if stage == "refine" and recipe is not None and name not in Outline(recipe).refined():
            continue  # of an earlier recipe
        if stage not in ("merge", "distill", "refine") or KEPT.fullmatch(folder.name):
            continue
        manifest = read_manifest(folder)
        if manifest is not None:
            found[MERGED if label == "merge" else name] = Artifact(folder, manifest)
    return dict(sorted(found.items(), key=lambda item: item[0] != MERGED))


def _read_config(directory: Path) -> dict[str, Any]:
    """Read a student's configuration; its weights must be there too."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        model_type = str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory / CONFIG}: no model's configuration; give a student."
        ) from None
    if not model_type.startswith(PREFIX):
        raise UserError(
            f"{directory}: model_type is {model_type!r}, which is no student's (xlstm_...); give a "
            "student that 'run' or save_pretrained wrote."
        )
    weight_files(directory)
    return dict(config)

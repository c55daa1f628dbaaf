"""Compare what a run holds with the recipe that it was started with last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from xlstm_distill.artifacts.changes import in_a_line
from xlstm_distill.artifacts.manifest import FORMAT
from xlstm_distill.artifacts.run import RECIPE_FILE
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.outline import stage_of
from xlstm_distill.stages.status.records import DAMAGE, StageStatus

LARGEST_RECIPE = 2**22
"""Bytes from which a saved recipe is none that this program wrote."""


def saved_recipe(run: Path) -> Recipe | None:
    """The recipe that the run was started with last; None where none was saved.

    Raises:
        UserError: it cannot be read.
    """
    path = run / RECIPE_FILE
    if not path.exists():
        return None
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_RECIPE:
            raise ValueError("no recipe")
        # Without the context of a folder, validation leaves paths alone: a teacher may have moved.
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (*DAMAGE, yaml.YAMLError):
        raise UserError(
            f"{path}: damaged, or written by another version, so nothing can be compared with it."
        ) from None


def saved_lineage(run: Path) -> Lineage | None:
    """The lineage of the saved recipe; raises as `saved_recipe`."""
    recipe = saved_recipe(run)
    return None if recipe is None else Lineage(recipe)


def compare(
    lineage: Lineage, found: Mapping[str, StageStatus], manifests: Mapping[str, Path]
) -> list[StageStatus]:
    """Put the statuses in the recipe's order, with what is waiting and what is outdated."""
    contents = {label: _json(path) for label, path in manifests.items()}
    comparison = _Comparison(lineage, contents)
    ordered: list[StageStatus] = []
    for label in lineage.labels():
        status = found.get(label, StageStatus(label, "waiting"))
        if label in contents and status.state != "unreadable":
            try:
                why = comparison.why_outdated(label)
            except DAMAGE:
                path = f"artifacts/{label}/manifest.json"
                status, why = StageStatus(label, "unreadable", path=path), None
            if why is not None and status.state == "done":
                status = replace(status, state="outdated", why=why)
        ordered.append(status)
    # What another recipe made in this run directory, and what no recipe names.
    planned = {status.label for status in ordered}
    rest = [replace(s, why="not in the recipe") for s in found.values() if s.label not in planned]
    return ordered + rest


class _Comparison:
    """Compares manifests with a recipe, in the order of the lineage's labels."""

    def __init__(self, lineage: Lineage, manifests: Mapping[str, Mapping[str, Any]]) -> None:
        self.lineage, self.manifests = lineage, manifests
        # Why others that are built on an artifact are outdated, by its label. Rows and targets can
        # be too few, and so be made again, while what is built on them stays as it is.
        self.spread: dict[str, str] = {}

    def why_outdated(self, label: str) -> str | None:
        """Say which settings of an artifact are not the recipe's; None if all are."""
        manifest = self.manifests[label]
        changes = self.lineage.changes(label, manifest)
        if manifest.get("format", FORMAT) != FORMAT:
            changes.append("another version of the program made it")
        inherited = self._inherited(label, manifest)
        spreading = [*inherited, *changes]
        if stage_of(label) in ("data", "capture"):
            spreading = [*inherited, *self.lineage.identity_changes(label, manifest)]
        if spreading:
            self.spread[label] = spreading[0]
        changes += inherited
        return in_a_line(changes) if changes else None

    def _inherited(self, label: str, manifest: Mapping[str, Any]) -> list[str]:
        """What changed in the artifacts that one is built on."""
        needs = self.lineage.needs(label)
        used = _built_on(label, manifest)
        found = [f"{need} is new" for need in needs if need not in used]
        found += [f"{name} is no longer used" for name in used if name not in needs]
        for need in needs:
            if stage_of(need) == "data" and need in self.spread:
                found.append(f"{need} changed: {self.spread[need]}")
            elif need in self.spread:
                found.append(f"{need} is outdated")
            elif need in self.manifests and need in used:
                published = self.manifests[need].get("identity")
                if published != used[need]:
                    found.append(f"{need} was made again")
        return found


def _built_on(label: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Identities of the artifacts that one was built on, by their labels."""
    inputs = dict(manifest.get("inputs", {}))
    for name in ("teacher", "tokenizer", "tasks"):
        inputs.pop(name, None)
    if label == "evaluate/merged" and "merge/merged" in inputs:
        inputs["merge"] = inputs.pop("merge/merged")  # an evaluation names its model
    return inputs


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except DAMAGE:  # the row of this artifact says so
        return {}

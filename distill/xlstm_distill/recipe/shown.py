"""Show a recipe to readers of a report: without the paths of the machine that ran it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import yaml

from xlstm_distill.recipe.model import Teacher
from xlstm_distill.recipe.recipe import Recipe

PATH_KEYS = ("path", "include", "questions", "haystack")
"""The keys that may hold a local path, in any section."""


def teacher_name(teacher: Teacher) -> str:
    """Return a hub id as it is, and a local teacher's folder by its name.

    A folder named `teacher` or `model` says nothing; the folder above it goes in front.
    """
    path = PurePath(teacher.path)
    # Validation has made local paths absolute. What is still relative is a hub id.
    if not path.is_absolute():
        return teacher.path
    generic = path.name.lower() in ("teacher", "model")
    return "/".join(path.parts[-2:]) if generic and len(path.parts) > 2 else path.name


def shown_recipe(recipe: Recipe) -> str:
    """Return a recipe with all its values as YAML, with local paths shortened to names."""
    return yaml.safe_dump(shown_values(recipe), sort_keys=False, allow_unicode=True, width=100)


def shown_values(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values as JSON, with local paths shortened to names."""
    values = recipe.model_dump(mode="json")
    if recipe.refine is None:
        # As in recipes of before there was such a section: their reports stay what they are.
        del values["refine"]
    if recipe.student.mixer.attention is None:
        del values["student"]["mixer"]["attention"]
    places = list(_local_paths(values))
    names = short_names(section[key] for section, key in places)
    for section, key in places:
        section[key] = names[section[key]]
    return values


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Map each absolute path to its last parts: as few as tell all the paths apart."""
    parts = {path: PurePath(path).parts[1:] for path in paths}
    depth = 1
    while True:
        names = {path: "/".join(own[-depth:]) for path, own in parts.items()}
        # It ends: the paths differ, so they differ at the full depth at the latest.
        if len(set(names.values())) == len(parts):
            return names
        depth += 1


def _local_paths(values: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where local paths are in a dumped recipe: the section that holds one, and its key."""
    if isinstance(values, list):
        for item in values:
            yield from _local_paths(item)
    if isinstance(values, dict):
        for key, value in values.items():
            # A loaded recipe's local paths are absolute; hub ids are not.
            is_text = isinstance(value, str)
            if is_text and key in PATH_KEYS and PurePath(value).is_absolute():
                yield values, key
            yield from _local_paths(value)

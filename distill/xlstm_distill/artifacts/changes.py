"""What differs between the settings an artifact was made from and those of today."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MOST_NAMED = 3
"""Changes that one line names."""
ENTRY = re.compile(r"\[[0-9]+\]")
"""An entry of a list in a recipe key."""
# Not None: null is a value that a recipe can hold.
NOTHING = object()
CHANGED_INPUTS = {
    "teacher": "the teacher's files or settings changed",
    "tokenizer": "the teacher's tokenizer changed",
    "tasks": "the files of the tasks changed",
}


def changed_settings(
    before: Mapping[str, Any], after: Mapping[str, Any], keys: Mapping[str, str]
) -> list[str]:
    """Name each changed setting by its recipe key: `align.lr 0.02 -> 0.01`.

    `before` and `after` are parts of a recipe, as JSON values. `keys` gives the recipe key of a
    part that has another name in the recipe: `{"mixer": "student.mixer"}`. The same change of
    several entries of a list is named once: `evaluate.tasks[*].shots 5 -> 0 (22 times)`.
    """
    old, new = dict(_leaves(before)), dict(_leaves(after))
    found: dict[tuple[str, str], list[str]] = {}
    # In the recipe's order: a manifest's keys are sorted.
    for path in dict.fromkeys((*new, *old)):
        earlier, later = old.get(path, NOTHING), new.get(path, NOTHING)
        if earlier != later:
            key, change = _recipe_key(path, keys), f"{_written(earlier)} -> {_written(later)}"
            same = found.setdefault((ENTRY.sub("[*]", key), change), [])
            # A part can hold a setting twice: the report's holds the whole recipe beside its own
            # section.
            if key not in same:
                same.append(key)
    return [_named(anywhere, change, same) for (anywhere, change), same in found.items()]


def _named(anywhere: str, change: str, places: list[str]) -> str:
    """Write a change of one setting, or of the same setting of several entries."""
    if len(places) == 1:
        return f"{places[0]} {change}"
    return f"{anywhere} {change} ({len(places)} times)"


def changed_inputs(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Name each input that is another one now: `align changed`."""
    names = [
        name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)
    ]
    return [CHANGED_INPUTS.get(name, f"{name} changed") for name in names]


def in_a_line(changes: list[str]) -> str:
    """Join changes for one line; many are cut short."""
    named = "; ".join(changes[:MOST_NAMED])
    more = len(changes) - MOST_NAMED
    return f"{named}; and {more} more" if more > 0 else named


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Walk a JSON value; a list of mappings is walked too, any other list is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _leaves(below, (*path, key))
    # A list of numbers is one setting (`betas`, `alphas`); a list of sources is many.
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, f"[{index}]"))
    elif path:
        # JSON has no tuples: what a manifest holds must equal what is not written yet.
        yield path, list(value) if isinstance(value, tuple) else value


def _recipe_key(path: tuple[str, ...], keys: Mapping[str, str]) -> str:
    first = keys.get(path[0], path[0])
    return ".".join(part for part in (first, *path[1:]) if part).replace(".[", "[")


def _written(value: Any) -> str:
    if value is NOTHING:
        return "(not set)"
    return "null" if value is None else str(value)

"""A recipe as a report shows it: all its values, and no path of the machine that ran it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from xlstm_distill.recipe import Recipe, Teacher, load_recipe
from xlstm_distill.recipe.fields import File, Folder, HubOrPath
from xlstm_distill.recipe.shown import PATH_KEYS, short_names, shown_recipe, teacher_name


def test_only_local_paths_change_and_none_is_left(root: Path) -> None:
    recipe = load_recipe(root / "recipes" / "quickstart.yaml")
    text = shown_recipe(recipe)
    assert str(root) not in text
    expected = recipe.model_dump(mode="json")
    expected["teacher"]["path"] = "teacher"
    expected["evaluate"]["include"] = "tasks"
    # Not shown where there is none.
    assert expected.pop("refine") is None
    assert expected["student"]["mixer"].pop("attention") is None
    assert yaml.safe_load(text) == expected


def test_paths_of_sources_are_told_apart_and_hub_ids_stay(root: Path, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").touch()
    files = [tmp_path / folder / "train.jsonl" for folder in ("one", "two")]
    sources = ", ".join(f"{{path: {path}}}" for path in [*files, "owner/name"])
    recipe = load_recipe(
        root / "recipes" / "quickstart.yaml", [f"data.domains.math.sources=[{sources}]"]
    )
    shown = yaml.safe_load(shown_recipe(recipe))["data"]["domains"]["math"]["sources"]
    assert [source["path"] for source in shown] == [
        "one/train.jsonl",
        "two/train.jsonl",
        "owner/name",
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [("/models/my-teacher", "my-teacher"), ("owner/name", "owner/name")],
)
def test_the_name_of_a_teacher(path: str, name: str) -> None:
    assert teacher_name(Teacher(path=path)) == name


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names([]) == {}
    assert short_names(["/a/b/c", "/a/b/c"]) == {"/a/b/c": "c"}
    assert short_names(["/a/x/c", "/b/x/c"]) == {"/a/x/c": "a/x/c", "/b/x/c": "b/x/c"}


def fields_of(model: type[BaseModel]) -> Iterator[tuple[str, str, Any]]:
    """Yield the model's name, the key and the metadata of every text in it and below it."""
    for key, field in model.model_fields.items():
        yield model.__name__, key, [*field.metadata, *get_args(field.annotation)]
        waiting = [field.annotation]
        while waiting:
            annotation = waiting.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from fields_of(annotation)
            waiting.extend(get_args(annotation))


def test_every_key_that_takes_a_path_is_known() -> None:
    """A new key of the type HubOrPath, Folder or File must be added to PATH_KEYS."""
    validators = [str(kind.__metadata__[-1]) for kind in (HubOrPath, Folder, File)]
    found = set()
    for _, key, metadata in fields_of(Recipe):
        text = str(metadata)
        if any(validator in text for validator in validators):
            found.add(key)
    assert found == set(PATH_KEYS)

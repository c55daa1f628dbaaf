"""What is generated from the recipe's models: the JSON schema editors read, and the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe import reference as recipe_docs
from xlstm_distill.recipe.reference import json_schema


def test_generated_files_are_up_to_date(root: Path) -> None:
    for name, text in recipe_docs.render().items():
        assert (root / name).read_text() == text, (
            f"{name}: run python -m xlstm_distill.recipe.reference"
        )


@pytest.fixture(scope="module")
def validator() -> Any:
    """A validator of the published schema, as an editor has."""
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


@pytest.mark.parametrize(
    "name",
    [
        "llama3.1-8b",
        "llama3.1-8b-instruct",
        "llama3.2-1b-instruct",
        "olmo3-7b",
        "quickstart",
        "quickstart-merges",
        "quickstart-paper",
        "qwen2.5-7b-instruct",
    ],
)
def test_schema_accepts_shipped_recipe(root: Path, validator: Any, name: str) -> None:
    recipe = yaml.safe_load((root / "recipes" / f"{name}.yaml").read_text())
    assert not [error.message for error in validator.iter_errors(recipe)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("student", "mixer", "windw"), 3),
        (("align", "lr"), "1e-4"),
        (("capture", "top_k"), 257),
        (("merge", "weights"), "unifrm"),
        (("distill", "experts", "math", "phases"), [{"tokens": 100_000}]),
        (("distill", "experts", "math", "phases"), []),
    ],
)
def test_schema_refuses_what_the_models_refuse(
    root: Path, validator: Any, path: tuple[str, ...], value: Any
) -> None:
    recipe = yaml.safe_load((root / "recipes" / "quickstart.yaml").read_text())
    section = recipe
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    assert list(validator.iter_errors(recipe))
    with pytest.raises(ValidationError):
        Recipe.model_validate(recipe)


def test_reference_names_every_key() -> None:
    text = recipe_docs.reference(json_schema())
    for section in json_schema()["$defs"].values():
        for key in section["properties"]:
            assert f"| `{key}` |" in text


def test_generator_writes_where_told(tmp_path: Path) -> None:
    for name in recipe_docs.render():
        (tmp_path / name).parent.mkdir(exist_ok=True)
    recipe_docs.main(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        "recipe.schema.json",
        "recipes.md",
    ]

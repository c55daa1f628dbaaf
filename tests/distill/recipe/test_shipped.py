"""Shipped recipes: each copy loads where it was copied to, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.recipe import load_recipe
from xlstm_distill.recipe.shipped import copy_recipe, shipped_names, shipped_recipes


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_names_are_those_of_the_folder(root: Path) -> None:
    names = sorted(path.stem for path in (root / "recipes").glob("*.yaml"))
    assert shipped_names() == [recipe.name for recipe in shipped_recipes()] == names


def test_every_recipe_has_a_one_line_summary() -> None:
    for recipe in shipped_recipes():
        assert "yaml-language-server" not in recipe.summary
        assert len(recipe.summary) > 20, recipe


@pytest.mark.parametrize("name", shipped_names())
def test_a_copy_loads_and_needs_nothing_else(name: str, tmp_path: Path) -> None:
    copied = copy_recipe(name, tmp_path / "new" / "folder")
    recipe = load_recipe(copied)
    assert recipe.name == name
    teacher = Path(recipe.teacher.path)
    assert not teacher.is_absolute() or teacher.is_relative_to(tmp_path)
    beside = {path.name for path in copied.parent.iterdir()}
    assert {"recipe.schema.json", "accelerate", "architectures"} <= beside


def test_a_copy_is_identical(root: Path, tmp_path: Path) -> None:
    copy_recipe("quickstart", tmp_path)
    assert "quickstart/tasks/qs_math_add.yaml" in files(tmp_path)
    assert "llama3.1-8b.yaml" not in files(tmp_path)
    for name in files(tmp_path):
        assert (tmp_path / name).read_bytes() == (root / "recipes" / name).read_bytes()


def test_recipes_can_share_a_folder(tmp_path: Path) -> None:
    copy_recipe("quickstart", tmp_path)
    copy_recipe("llama3.1-8b", tmp_path)
    assert {"quickstart.yaml", "llama3.1-8b.yaml"} <= files(tmp_path)


def test_changed_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    for name in ("accelerate/ddp.yaml", "olmo3-7b.yaml"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError) as caught:
        copy_recipe("olmo3-7b", tmp_path)
    assert [line.split(":")[0] for line in caught.value.problems] == [
        str(tmp_path / "accelerate" / "ddp.yaml"),
        str(tmp_path / "olmo3-7b.yaml"),
    ]
    assert files(tmp_path) == {"accelerate/ddp.yaml", "olmo3-7b.yaml"}


def test_a_file_cannot_be_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; give a folder"):
        copy_recipe("olmo3-7b", tmp_path / "file")

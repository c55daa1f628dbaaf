"""The recipes that come with the package: find them, list them, copy one with all it needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xlstm_distill.errors import UserError
from xlstm_distill.recipe.load import load_recipe
from xlstm_distill.recipe.problems import did_you_mean

INSTALLED = "shipped_recipes"
"""Name of the folder `recipes/` inside the installed package (setup.py puts it there)."""
SHARED = ("recipe.schema.json", "accelerate", "architectures")
"""What every recipe may use: schema, launch configurations, and model sizes for `plan`."""


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with the package."""

    name: str
    path: Path
    teacher: str
    summary: str


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes.

    A wheel holds it inside the package; in a checkout it is the top-level folder `recipes/`.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = (package / INSTALLED, package.parents[1] / "recipes")
    for folder in candidates:
        # Looked for by a file that only this folder has: any folder may be called `recipes`.
        if (folder / SHARED[0]).is_file():
            return folder
    looked = " and ".join(str(folder) for folder in candidates)
    raise UserError(f"the shipped recipes are missing (looked in {looked}); install again.")


def shipped_recipes() -> list[ShippedRecipe]:
    """List the shipped recipes by name."""
    return [_describe(find_recipe(name)) for name in shipped_names()]


def find_recipe(name: str) -> Path:
    """Return the path of a shipped recipe.

    Raises:
        UserError: there is none of this name; the line suggests the closest one.
    """
    names = shipped_names()
    if name not in names:
        raise UserError(f"{name!r} is not a shipped recipe. {did_you_mean(name, names)}")
    return recipes_folder() / f"{name}.yaml"


def shipped_names() -> list[str]:
    """Names of the shipped recipes, without reading them."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def copy_recipe(name: str, directory: Path) -> Path:
    """Copy a shipped recipe, its teacher, tasks and data, and what all recipes share.

    Returns the path of the copied recipe. Files that are there already with the same content stay:
    a second recipe may be copied into the same folder.

    Raises:
        UserError: no such recipe, or the copy would overwrite files; nothing is written then.
    """
    source = find_recipe(name)
    target = directory / source.name
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; give a folder, which may be new.")
    folder = source.parent.resolve()
    # The layout is kept, because a recipe names its files by relative paths.
    files = {path: directory / path.relative_to(folder) for path in _needed(source)}
    taken = []
    for path, copy in files.items():
        if copy.exists() and (copy == target or not _same(path, copy)):
            taken.append(f"{copy}: exists and is not overwritten; move it or give another folder.")
    if taken:
        raise UserError(*taken)
    new = [copy for copy in files.values() if not copy.exists()]
    try:
        for path, copy in files.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copyfile(path, copy)
    except OSError as error:
        # Half a copy would be in the way of the next try.
        for copy in new:
            copy.unlink(missing_ok=True)
        raise UserError(
            f"{directory}: the recipe cannot be written there ({error.strerror}); nothing was kept."
        ) from None
    return target


def _describe(path: Path) -> ShippedRecipe:
    text = path.read_text(encoding="utf-8")
    # Not `load_recipe`: a listing need not check paths and rules of every recipe.
    teacher = yaml.safe_load(text)["teacher"]["path"]
    comments = [line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")]
    # The first comment is for editors: it names the schema.
    return ShippedRecipe(path.stem, path, teacher, comments[1])


def _needed(recipe: Path) -> list[Path]:
    """Return the files of a recipe's copy: its own, those it names, and the shared ones."""
    folder = recipe.parent.resolve()
    roots = {folder / recipe.name, *(folder / name for name in SHARED)}
    for text in _texts(load_recipe(recipe).model_dump(mode="json")):
        path = Path(text)
        if path.is_absolute() and path.is_relative_to(folder):
            # A recipe names parts of its folder, as quickstart/teacher. The folder is one thing.
            roots.add(folder / path.relative_to(folder).parts[0])
    files = []
    for root in sorted(roots):
        files += [root] if root.is_file() else sorted(root.rglob("*"))
    return [path for path in files if path.is_file() and "__pycache__" not in path.parts]


def _texts(value: Any) -> Iterator[str]:
    """Yield every text inside nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for below in value.values():
            yield from _texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()

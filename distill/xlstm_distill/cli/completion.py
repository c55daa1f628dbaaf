"""What the shell completes: recipe files, recipe keys, experts, shipped recipes, GPUs.

A shell calls these at every TAB, so they import as little as they can. They never fail: without an
answer the shell completes file names by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

RECIPE_SUFFIXES = (".yaml", ".yml")


def recipe_paths(incomplete: str) -> list[str]:
    """Recipes that begin with `incomplete`: files, and files one folder further down.

    A folder alone is not offered. Shells would put a space behind it, and the next TAB would then
    complete another word.
    """
    head, slash, start = incomplete.rpartition("/")
    prefix = head + slash
    found = []
    # A folder that does not exist, or may not be read, has nothing to offer.
    with contextlib.suppress(OSError):
        for entry in sorted(Path(prefix or ".").expanduser().iterdir()):
            if not entry.name.startswith(start) or entry.name.startswith("."):
                continue
            if entry.is_file() and entry.suffix in RECIPE_SUFFIXES:
                found.append(prefix + entry.name)
            elif entry.is_dir():
                inside = sorted(p for p in entry.iterdir() if p.suffix in RECIPE_SUFFIXES)
                found += [f"{prefix}{entry.name}/{path.name}" for path in inside]
    return found


def recipe_keys(incomplete: str) -> list[str]:
    """Keys for --set, section by section: `al` gives `align.batch=`, `align.lr=` and so on."""
    from xlstm_distill.recipe.fields import Section
    from xlstm_distill.recipe.recipe import Recipe

    def keys(section: type[Section], above: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            kind = field.annotation
            # Only sections have keys below them. What is below names that the user chooses cannot
            # be known here.
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from keys(kind, f"{above}{name}.")
            else:
                yield f"{above}{name}="

    return [key for key in keys(Recipe, "") if key.startswith(incomplete)]


def experts(context: typer.Context, incomplete: str) -> list[str]:
    """Experts of the recipe that the command line names."""
    recipe = _recipe(context)
    if recipe is None:
        return []
    return [name for name in recipe.distill.experts if name.startswith(incomplete)]


def models(context: typer.Context, incomplete: str) -> list[str]:
    """Models that the recipe on the command line evaluates."""
    from xlstm_distill.stages.lineage import Lineage

    recipe = _recipe(context)
    if recipe is None:
        return []
    return [name for name in Lineage(recipe).evaluated_models() if name.startswith(incomplete)]


def gpus(incomplete: str) -> list[str]:
    """GPUs that `plan` knows."""
    from xlstm_distill.planning.machine import GPUS

    return [name for name in GPUS if name.startswith(incomplete)]


def shardings(incomplete: str) -> list[str]:
    """Ways to share the student between GPUs."""
    from xlstm_distill.planning.inputs import SHARDINGS

    return [name for name in SHARDINGS if name.startswith(incomplete)]


def shipped_recipes(incomplete: str) -> list[str]:
    """Names of the shipped recipes."""
    from xlstm_distill.errors import UserError
    from xlstm_distill.recipe.shipped import shipped_names

    with contextlib.suppress(UserError):
        return [name for name in shipped_names() if name.startswith(incomplete)]
    return []


def _recipe(context: typer.Context) -> Any:
    from xlstm_distill.errors import UserError
    from xlstm_distill.recipe import load_recipe

    # An option that still waits for its value ends click's parsing: the arguments before it are
    # then in `args`, not yet in `params`.
    # A recipe that is being written is often invalid: then there are no experts to offer.
    for word in (context.params.get("recipe"), *context.args):
        if str(word).endswith(RECIPE_SUFFIXES):
            with contextlib.suppress(UserError):
                return load_recipe(str(word))
    return None

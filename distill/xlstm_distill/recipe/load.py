"""Read a recipe from YAML, with overrides, and write it back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from xlstm_distill.errors import UserError
from xlstm_distill.recipe.problems import kind_of, one_line
from xlstm_distill.recipe.recipe import Recipe


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is no word, and one given twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                is_list = isinstance(key, yaml.SequenceNode)
                what = (
                    "a list"
                    if is_list
                    else "a mapping (or a template's {{ }} that is not filled in)"
                )
                message = f"{what} cannot be a key; give a word"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            if key.value in seen:
                message = f"the key '{key.value}' is already on line {seen[key.value]}; keep one"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            if key.tag != "tag:yaml.org,2002:merge":
                seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; `overrides` are `dotted.path=value` with YAML values, applied in order.

    Relative paths in it are taken from the recipe's folder and come back absolute.

    Raises:
        UserError: in one line, what is wrong where and what is allowed (file, YAML, override or value).
    """
    path = Path(path)
    data = _parse(_read(path), str(path))
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: holds {kind_of(data)}; a recipe is a mapping of sections such as 'teacher' and 'data'."
        )
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise UserError(one_line(error)) from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe with all its values, defaults included, as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a recipe (YAML).") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"{path}: cannot be read ({reason}); give the path of a recipe (YAML)."
        ) from None


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"{name}{where}: not valid YAML: {error.problem or error.context}."
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from None


def _override(data: dict[str, Any], override: str) -> None:
    """Set one value in place. The path may hold list indices: `evaluate.tasks[0].shots` or `evaluate.tasks.0.shots`."""
    dotted, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")
    if not equals or not all(parts):
        raise UserError(
            f"--set {override}: give it as dotted.path=value, for example align.lr=0.003."
        )
    value = _parse(text, f"--set {dotted}") if text.strip() else None
    here: Any = data
    for depth, part in enumerate(parts[:-1]):
        here = _enter(here, part, dotted, parts[: depth + 1])
    if isinstance(here, list):
        here[_index(here, parts[-1], dotted)] = value
    else:
        here[parts[-1]] = value


def _enter(here: Any, part: str, dotted: str, path: list[str]) -> Any:
    if isinstance(here, list):
        below = here[_index(here, part, dotted)]
    else:
        below = here.setdefault(part, {})
        if below is None:
            below = here[part] = {}
    if not isinstance(below, dict | list):
        raise UserError(
            f"--set {dotted}: {'.'.join(path)} is {below!r}, which has nothing below it."
        )
    return below


def _index(items: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(
            f"--set {dotted}: {part!r} is not an index of the list there (0 to {len(items) - 1})."
        )
    return int(part)

"""Read a recipe from YAML, with overrides, and write it back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from xlstm_distill.errors import UserError
from xlstm_distill.recipe.fields import Section
from xlstm_distill.recipe.problems import kind_of, problem_lines
from xlstm_distill.recipe.recipe import Recipe, broken_between

MOST_VALUES = 100_000
"""Values that aliases (`*name`) may make of a recipe; the largest recipe here has 300."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is not a word, and a key that is given twice.

    YAML itself would keep the last of two equal keys and say nothing. It also refuses aliases that
    make millions of values of a few lines: everything that walks the recipe would hang.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        counts: dict[int, int] = {}
        if node is not None and _count_values(node, counts) > max(MOST_VALUES, len(counts)):
            raise _key_error(
                node, f"its aliases (*name) make more than {MOST_VALUES} values of it; write fewer"
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _key_error(key, f"{_kind_of_node(key)} cannot be a key; give a word")
            if key.value in seen:
                first = seen[key.value]
                raise _key_error(key, f"the key '{key.value}' is already on line {first}; keep one")
            # `<<` merges mappings and may come several times.
            if key.tag != "tag:yaml.org,2002:merge":
                seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count a node and all below it, each as often as aliases name it; inside itself, endless."""
    known = counts.get(id(node))
    if known is not None:
        return known
    # Met again below before it is counted, it holds itself.
    counts[id(node)] = MOST_VALUES + 1
    total = 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            total += _count_values(key, counts) + _count_values(value, counts)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            total += _count_values(item, counts)
    counts[id(node)] = total
    return total


def _kind_of_node(key: yaml.Node) -> str:
    if isinstance(key, yaml.SequenceNode):
        return "a list"
    # `{{ name }}` of a template reads as a mapping inside a mapping.
    return "a mapping (or a template's {{ }} that is not filled in)"


def _key_error(key: yaml.Node, message: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, message, key.start_mark)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    `overrides` are `dotted.path=value` with YAML values, applied in order. Relative paths in the
    recipe are taken from its folder and come back absolute.

    Raises:
        UserError: all problems of the file, the overrides and the values, one line each.
    """
    path = Path(path)
    data = parse_yaml(read_file(path), str(path))
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: contains {kind_of(data)}; a recipe is a mapping of sections such as "
            "'teacher' and 'data'."
        )
    # Problems are collected and not raised one by one: a user mends all of them in one go.
    problems: list[str] = []
    # Before validation, so that an override is checked like any other value, and can mend a wrong
    # one.
    for override in overrides:
        try:
            _override(data, override)
        except UserError as error:
            problems.extend(error.problems)
    recipe: Recipe | None = None
    # Paths are relative to the recipe and not to the working directory: a job array starts
    # elsewhere.
    context = {"folder": path.resolve().parent}
    try:
        recipe = Recipe.model_validate(data, context=context)
    except ValidationError as error:
        problems.extend(problem_lines(error))
        problems.extend(_problems_between_sections(data, context))
    if problems or recipe is None:
        # Once each: a rule between sections can be found twice, by the recipe and by the sections.
        raise UserError(*dict.fromkeys(problems))
    return recipe


def _problems_between_sections(data: Mapping[str, Any], context: dict[str, Any]) -> list[str]:
    """Check the rules between the sections that are valid alone.

    pydantic skips the recipe's own rules as soon as one section has a problem. The user would then
    mend the section, and only the next run would show the rest.
    """
    sections: dict[str, Section] = {}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            continue
        try:
            # A section that is left out is checked as an empty one: its defaults take part in the
            # rules.
            sections[name] = kind.model_validate(data.get(name, {}), context=context)
        except ValidationError:
            continue
    return [f"{broken.field}: {broken.message}" for broken in broken_between(sections)]


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe with all its values, defaults included; `load_recipe` reads it back equal."""
    # In the order of the sections, as a reader expects it, and not by the alphabet.
    return yaml.safe_dump(
        recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
    )


def read_file(path: Path, what: str = "recipe") -> str:
    """Read a text file that the user named; `what` it should be.

    Raises:
        UserError: it is not there, or is no text.
    """
    hint = ""
    if what == "recipe":
        hint = " 'xlstm-distill recipes' lists the recipes that come with this package."
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a {what} (YAML).{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"{path}: cannot be read ({reason}); give the path of a {what} (YAML)."
        ) from None


def parse_yaml(text: str, name: str) -> Any:
    """Read YAML; `name` is the file's, for messages.

    Raises:
        UserError: it is not YAML, or a key is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    # MarkedYAMLError comes first: it is a YAMLError that also knows the line.
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(
            f"{name}{where}: not valid YAML: {error.problem or error.context}."
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from None
    except (ValueError, OverflowError) as error:  # such as the date 2024-99-99, or 0x_
        raise UserError(f"{name}: holds a number or date that is none: {error}.") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply.") from None


def _override(data: dict[str, Any], override: str) -> None:
    """Set one value in place.

    The path may name list items, as `evaluate.tasks[0].shots` or as `evaluate.tasks.0.shots`.
    """
    dotted, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")
    if not equals or not all(parts):
        raise UserError(
            f"--set {override}: not of the form dotted.path=value; write it like align.lr=0.003."
        )
    # Read as YAML, like the file: `--set align.lr=1e-4` meets the same rule (YAML reads 1e-4 as
    # text) and gets the same hint.
    value = parse_yaml(text, f"--set {dotted}") if text.strip() else None
    here: Any = data
    for depth, part in enumerate(parts[:-1]):
        here = _enter(here, part, dotted, parts[: depth + 1])
    if isinstance(here, list):
        here[_index(here, parts[-1], dotted)] = value
    else:
        here[parts[-1]] = value


def _enter(here: Any, part: str, dotted: str, path: list[str]) -> Any:
    """Return what `part` names; a section that the recipe leaves out becomes an empty mapping."""
    if isinstance(here, list):
        below = here[_index(here, part, dotted)]
    else:
        # An unknown section is made here too. Validation refuses it afterwards, with the closest
        # name.
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
            f"--set {dotted}: {part!r} is not an index of this list (0 to {len(items) - 1})."
        )
    return int(part)

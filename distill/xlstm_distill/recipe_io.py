"""Read a recipe from YAML, with overrides; every problem becomes one line that begins with the dotted path."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe_fields import FieldError

Location = tuple[int | str, ...]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is no word, and one given twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                is_list = isinstance(key, yaml.SequenceNode)
                what = "a list" if is_list else "a mapping (or a template's {{ }} that is not filled in)"
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
        raise UserError(f"{path}: holds {_kind(data)}; a recipe is a mapping of sections such as 'teacher' and 'data'.")
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise UserError(one_line(error)) from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write a recipe with all its values, defaults included, as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes, for editors."""
    schema = Recipe.model_json_schema()
    phase = schema["$defs"]["Phase"]
    phase["properties"]["domain"] = {"type": "string", "description": "One domain alone, in place of `domains`."}
    phase["required"] = ["tokens"]
    phase["oneOf"] = [{"required": ["domains"]}, {"required": ["domain"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def one_line(error: ValidationError) -> str:
    """Say the first problem of a validation in one line, and how many more there are."""
    locations = [problem["loc"] for problem in error.errors()]
    # A list with a bad item also reports itself as too short.
    problems = [p for p in error.errors() if p["type"] != "too_short" or not _below(p["loc"], locations)]
    # Unknown keys come first: a misspelt key also reports the right one as missing.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    lines = list(dict.fromkeys(_sentence(problem) for problem in problems))
    return lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a recipe (YAML).") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); give the path of a recipe (YAML).") from None


def _parse(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{name}{where}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from None


def _override(data: dict[str, Any], override: str) -> None:
    """Set one value in place. The path may hold list indices: `evaluate.tasks[0].shots` or `evaluate.tasks.0.shots`."""
    dotted, equals, text = override.partition("=")
    parts = re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: give it as dotted.path=value, for example align.lr=0.003.")
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
        raise UserError(f"--set {dotted}: {'.'.join(path)} is {below!r}, which has nothing below it.")
    return below


def _index(items: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UserError(f"--set {dotted}: {part!r} is not an index of the list there (0 to {len(items) - 1}).")
    return int(part)


def _sentence(problem: Any) -> str:
    """Say one problem of a validation: dotted path, value, what is allowed, the fix."""
    location = _clean(problem["loc"])
    value, context = problem["input"], problem.get("ctx", {})
    if isinstance(reason := context.get("error"), FieldError):
        return f"{_dotted(location, reason.field) or 'recipe'}: {reason.message}"
    where = _dotted(location) or "recipe"
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key. {did_you_mean(str(location[-1]), _keys(location))}"
        case "missing":
            return f"{where}: missing. Add it."
        case "literal_error":
            return f"{where}: {_quote(value)} is not allowed. Allowed: {context['expected']}."
        case "string_too_short" | "too_short":
            return f"{where}: empty. Give at least one{' character' if isinstance(value, str) else ''}."
        case "too_long":
            return f"{where}: has {context['actual_length']} items. Give {context['max_length']}."
        case "finite_number":
            return f"{where}: {value} is not a finite number. Give one."
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"{where}: {value!r} must be {_bound(context)}."
        case "tuple_type" | "dict_type" | "model_type" | "model_attributes_type":
            wanted = "a list" if problem["type"] == "tuple_type" else "a mapping"
            return f"{where}: {_quote(value)} is {_kind(value)}; give {wanted}."
        case "float_type" | "int_type" | "bool_type" | "string_type" | "int_from_float":
            return _wrong_type(where, value, problem["type"])
    return f"{where}: {_quote(value)}: {problem['msg']}."


def _wrong_type(where: str, value: Any, kind: str) -> str:
    words = {"float": "a number", "int": "a whole number", "bool": "true or false", "string": "text"}
    if isinstance(value, str) and kind in ("float_type", "int_type") and (number := _number(value)) is not None:
        whole = kind == "int_type" and float(value).is_integer()
        return f"{where}: {value!r} is text; YAML needs {int(float(value)) if whole else number}"
    return f"{where}: {_quote(value)} is {_kind(value)}; give {words[kind.split('_')[0]]}."


def _number(text: str) -> str | None:
    """Spell a finite number the way YAML reads it as one: `1e-4` as `1.0e-4`."""
    try:
        if not math.isfinite(float(text)):
            return None
    except ValueError:
        return None
    mantissa, e, exponent = text.lower().replace("_", "").partition("e")
    if not e:
        return f"{mantissa} without quotes"
    sign = exponent if exponent[:1] in "+-" else f"+{exponent}"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}"


def _bound(context: Mapping[str, Any]) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    return " and ".join(f"{words[key]} {bound}" for key, bound in context.items() if key in words)


def _below(location: Location, others: Sequence[Location]) -> bool:
    return any(len(other) > len(location) and other[: len(location)] == location for other in others)


def _clean(location: Location) -> Location:
    """Drop pydantic's own marks: tags of union members such as `<mapping>`, and `[key]` after a mapping's key."""
    marks = ("<word>", "<mapping>", "[key]")
    return tuple(part for part in location if part not in marks)


def _dotted(location: Location, rest: str = "") -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else str(part))
    return f"{path}.{rest}" if path and rest else path or rest


def _keys(location: Location) -> list[str]:
    """Return the keys allowed where `location` ends, following the models by annotation."""
    models: list[type[BaseModel]] = [Recipe]
    for part in location[:-1]:
        fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [below for annotation in fields for below in _models(annotation)] or models
    return sorted({key for model in models for key in model.model_fields})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def did_you_mean(name: str, allowed: Sequence[str]) -> str:
    """Suggest the closest allowed name, or list what is allowed."""
    if close := difflib.get_close_matches(name, allowed, n=1):
        return f"Did you mean '{close[0]}'?"
    return f"Allowed: {', '.join(allowed)}."


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    """Name a value's type in the words of YAML."""
    names: tuple[tuple[type, str], ...] = (
        (bool, "true/false"), (str, "text"), (int, "a whole number"), (float, "a number"),
        (list, "a list"), (dict, "a mapping"),
    )  # fmt: skip
    return "nothing" if value is None else next((n for t, n in names if isinstance(value, t)), type(value).__name__)

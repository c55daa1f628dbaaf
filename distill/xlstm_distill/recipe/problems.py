"""Say what is wrong with a recipe: every problem is one line that begins with the dotted path."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from xlstm_distill.recipe.fields import FieldError
from xlstm_distill.recipe.recipe import Recipe

Location = tuple[int | str, ...]


def problem_lines(error: ValidationError) -> list[str]:
    """Say every problem of a recipe, one line each, unknown keys first."""
    locations = [problem["loc"] for problem in error.errors()]
    # A list with a bad item also reports itself as too short.
    problems = [
        p for p in error.errors() if p["type"] != "too_short" or not _below(p["loc"], locations)
    ]
    # Unknown keys come first: a misspelt key also reports the right one as missing.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    return list(dict.fromkeys(_sentence(problem) for problem in problems))


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
            return f"{where}: {_quote(value)} is {kind_of(value)}; give {wanted}."
        case "float_type" | "int_type" | "bool_type" | "string_type" | "int_from_float":
            return _wrong_type(where, value, problem["type"])
    return f"{where}: {_quote(value)}: {problem['msg']}."


def _wrong_type(where: str, value: Any, kind: str) -> str:
    words = {
        "float": "a number",
        "int": "a whole number",
        "bool": "true or false",
        "string": "text",
    }
    if (
        isinstance(value, str)
        and kind in ("float_type", "int_type")
        and (number := _number(value)) is not None
    ):
        whole = kind == "int_type" and float(value).is_integer()
        return f"{where}: {value!r} is text; YAML needs {int(float(value)) if whole else number}"
    return f"{where}: {_quote(value)} is {kind_of(value)}; give {words[kind.split('_')[0]]}."


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
    return any(
        len(other) > len(location) and other[: len(location)] == location for other in others
    )


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
        fields = [
            model.model_fields[part].annotation for model in models if part in model.model_fields
        ]
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


def kind_of(value: Any) -> str:
    """Name a value's type in the words of YAML."""
    names: tuple[tuple[type, str], ...] = (
        (bool, "true/false"), (str, "text"), (int, "a whole number"), (float, "a number"),
        (list, "a list"), (dict, "a mapping"),
    )  # fmt: skip
    return (
        "nothing"
        if value is None
        else next((n for t, n in names if isinstance(value, t)), type(value).__name__)
    )


def nearest_batches(batch: int, processes: int) -> str:
    """The batches next to one that so many processes can share, in words."""
    lower = batch // processes * processes
    return f"{lower} or {lower + processes}" if lower else str(processes)

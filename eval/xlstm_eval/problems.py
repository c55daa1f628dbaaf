"""Say what is wrong with data that pydantic refused: one line for each problem.

A line begins with the dotted path. Recipes, score files and suites all use this module. It imports
pydantic only, so that a bad file is reported at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]
Problem = Mapping[str, Any]
"""One entry of ``ValidationError.errors()``."""
Special = Callable[[Problem], str | None]
"""Words for a problem, without its path; None where the general words will do."""

MOST_NAMES = 24
"""How many allowed names an error lists: lm-eval knows more than ten thousand tasks."""
MOST_CHARACTERS = 60

BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
WANTED = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


class FieldError(ValueError):
    """Report a broken rule that spans fields.

    ``field`` is the dotted path of the field to change, from the model that raises the error.
    Validators of a single field leave it empty: pydantic adds their path.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.message = field, message


def problem_lines(
    error: ValidationError, model: type[BaseModel], *, whole: str, special: Special | None = None
) -> list[str]:
    """Return every problem of a validation of ``model``, one line each, unknown keys first.

    A line names the dotted path, the value, what is allowed and the fix. ``whole`` names the data
    itself ("recipe", "the file"). ``special`` may word a problem, such as one of a file format.
    """
    problems = error.errors(include_url=False)
    locations = [problem["loc"] for problem in problems]
    # A list with a bad item also reports itself as too short.
    problems = [
        problem
        for problem in problems
        if problem["type"] != "too_short" or not _has_problem_below(problem["loc"], locations)
    ]
    # A misspelt key also reports the right one as missing; the misspelling is what to mend.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    lines = []
    for problem in problems:
        location = _without_tags(problem["loc"])
        reason = problem.get("ctx", {}).get("error")
        path = dotted(location, reason.field if isinstance(reason, FieldError) else "")
        words = special(problem) if special else None
        words = words or _words(problem, location, model)
        lines.append(f"{path or whole}: {words}")
    # The members of a union may report the same problem.
    return list(dict.fromkeys(lines))


def one_line(
    error: ValidationError, model: type[BaseModel], *, whole: str, special: Special | None = None
) -> str:
    """Return the first problem of a validation, and how many more there are."""
    lines = problem_lines(error, model, whole=whole, special=special)
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return lines[0] + more


def did_you_mean(name: str, allowed: Sequence[str]) -> str:
    """Suggest the allowed name that is closest, or list what is allowed."""
    close = difflib.get_close_matches(name, allowed, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    more = f" and {len(allowed) - MOST_NAMES} more" if len(allowed) > MOST_NAMES else ""
    return f"Allowed: {', '.join(allowed[:MOST_NAMES])}{more}."


def kind_of(value: object) -> str:
    """Name a value's type in words that suit YAML and JSON."""
    if value is None:
        return "nothing"
    # The order matters: in Python, true and false are whole numbers too.
    kinds: tuple[tuple[type, str], ...] = (
        (bool, "true/false"),
        (str, "text"),
        (int, "a whole number"),
        (float, "a number"),
        (list, "a list"),
        (tuple, "a list"),
        (dict, "a mapping"),
    )
    for kind, name in kinds:
        if isinstance(value, kind):
            return name
    return type(value).__name__


def dotted(location: Location, below: str = "") -> str:
    """Write ``("tasks", 0, "name")`` as ``tasks[0].name``, followed by the path ``below`` it."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return f"{path}.{below}" if path and below else path or below


def _words(problem: Problem, location: Location, model: type[BaseModel]) -> str:
    """Say one problem without its path: the value, what is allowed, the fix."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    match kind:
        case "value_error":
            reason = context["error"]
            return reason.message if isinstance(reason, FieldError) else str(reason)
        case "extra_forbidden":
            return f"unknown key. {did_you_mean(str(location[-1]), _allowed_keys(model, location))}"
        case "missing":
            return "missing. Add it."
        case "literal_error":
            return f"{_quote(value)} is not allowed. Allowed: {context['expected']}."
        case "string_too_short":
            return "empty. Give at least one character."
        case "too_short":
            return "empty. Give at least one."
        case "too_long":
            return f"has {context['actual_length']} items. Give {context['max_length']}."
        case "finite_number":
            return f"{value} is not a finite number. Give one."
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            bounds = [f"{BOUNDS[key]} {bound}" for key, bound in context.items() if key in BOUNDS]
            return f"{value!r} must be {' and '.join(bounds)}."
    # "float_type", "int_from_float", "model_attributes_type"
    wanted = WANTED.get(kind.split("_")[0])
    if wanted and kind.endswith(("_type", "_from_float")):
        return f"{_quote(value)} is {kind_of(value)}; give {wanted}."
    return f"{_quote(value)}: {problem['msg']}."


def _has_problem_below(location: Location, others: Sequence[Location]) -> bool:
    depth = len(location)
    return any(len(other) > depth and other[:depth] == location for other in others)


def _without_tags(location: Location) -> Location:
    """Drop the parts that are no keys of the user's."""
    # pydantic adds "[key]" after a mapping's bad key, and the tag of a union's member, which the
    # recipe's sections write as "<tag>".
    return tuple(part for part in location if not _is_tag(part))


def _is_tag(part: int | str) -> bool:
    if isinstance(part, int):
        return False
    return part == "[key]" or (part.startswith("<") and part.endswith(">"))


def _allowed_keys(model: type[BaseModel], location: Location) -> list[str]:
    """Return the keys allowed where ``location`` ends, following nested models by annotation."""
    models = [model]
    for part in location[:-1]:
        below: list[type[BaseModel]] = []
        for above in models:
            if part in above.model_fields:
                below.extend(_models(above.model_fields[str(part)].annotation))
        # An index, or a key that the user chose, leads to no other model.
        models = below or models
    return sorted({key for model in models for key in model.model_fields})


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation names, through lists, mappings and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 3] + "..."

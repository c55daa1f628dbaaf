"""Say what is wrong with a recipe: every problem is one line that begins with the dotted path."""

from __future__ import annotations

import math

from pydantic import BaseModel, ValidationError

from xlstm_distill.recipe.recipe import Recipe
from xlstm_eval import problems
from xlstm_eval.problems import Problem, did_you_mean, kind_of

__all__ = ["did_you_mean", "kind_of", "nearest_batches", "problem_lines"]


def problem_lines(
    error: ValidationError, model: type[BaseModel] = Recipe, whole: str = "recipe"
) -> list[str]:
    """Say every problem of a recipe, or of another file, one line each, unknown keys first."""
    return problems.problem_lines(error, model, whole=whole, special=_number_as_text)


def _number_as_text(problem: Problem) -> str | None:
    """Say how to spell a number that YAML reads as text (`1e-4`); None for other problems."""
    value, kind = problem["input"], problem["type"]
    # YAML 1.1 needs a dot and a signed exponent: `1e-4` is text there, and `1.0e-4` is a number.
    if not isinstance(value, str) or kind not in ("float_type", "int_type"):
        return None
    number = _number(value)
    if number is None:
        return None
    if kind == "int_type" and float(value).is_integer():
        number = str(int(float(value)))
    return f"{value!r} is text; YAML needs {number}"


def _number(text: str) -> str | None:
    """Spell a finite number the way YAML reads it as one: `1e-4` as `1.0e-4`."""
    try:
        if not math.isfinite(float(text)):
            return None
    except ValueError:
        return None
    # Python's float() takes underscores as YAML does.
    mantissa, e, exponent = text.lower().replace("_", "").partition("e")
    if not e:
        # YAML reads 0.1 as a number; in quotes it is text.
        return f"{mantissa} without quotes"
    sign = exponent if exponent[:1] in "+-" else f"+{exponent}"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}"


def nearest_batches(batch: int, processes: int) -> str:
    """Name the batches closest to `batch` that so many processes can share."""
    # 0 where there are more processes than rows; a batch of 0 is no suggestion.
    lower = batch // processes * processes
    return f"{lower} or {lower + processes}" if lower else str(processes)

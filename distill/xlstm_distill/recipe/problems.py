"""Say what is wrong with a recipe: every problem is one line that begins with the dotted path."""

from __future__ import annotations

import math

from pydantic import ValidationError

from xlstm_distill.recipe.recipe import Recipe
from xlstm_eval import problems
from xlstm_eval.problems import Problem, did_you_mean, kind_of

__all__ = ["did_you_mean", "kind_of", "nearest_batches", "one_line", "problem_lines"]


def one_line(error: ValidationError) -> str:
    """Say the first problem of a recipe in one line, and how many more there are."""
    return problems.one_line(error, Recipe, whole="recipe", special=_number_as_text)


def problem_lines(error: ValidationError) -> list[str]:
    """Say every problem of a recipe, one line each, unknown keys first."""
    return problems.problem_lines(error, Recipe, whole="recipe", special=_number_as_text)


def _number_as_text(problem: Problem) -> str | None:
    """Say how to spell a number that YAML reads as text (`1e-4`); None for other problems."""
    value, kind = problem["input"], problem["type"]
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
    mantissa, e, exponent = text.lower().replace("_", "").partition("e")
    if not e:
        return f"{mantissa} without quotes"
    sign = exponent if exponent[:1] in "+-" else f"+{exponent}"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}"


def nearest_batches(batch: int, processes: int) -> str:
    """The batches next to one that so many processes can share, in words."""
    lower = batch // processes * processes
    return f"{lower} or {lower + processes}" if lower else str(processes)

"""What the evaluation reads and writes: scores of one model, of a teacher-student pair, and their comparison.

Light on purpose: pydantic only, so that scoring a file never loads torch.
"""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class EvalError(ValueError):
    """Report bad input to the evaluation in one line: the field, its value, what is allowed, the fix."""


Score = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Name = Annotated[str, Field(strict=True, min_length=1)]


class Frozen(BaseModel):
    """Base of all records: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskResult(Frozen):
    """Hold one model's score on one task.

    ``correct`` is the number of right answers where the metric is a mean of zeros and ones, else None. Comparisons
    use it in place of the rounded ``score``, so that a teacher always ties with itself.
    """

    task: Name
    metric: Name
    score: Score
    stderr: Score | None = None
    domain: Name | None = None
    higher_is_better: bool = True
    samples: Annotated[int, Field(strict=True, ge=1)]
    correct: Count | None = None

    @model_validator(mode="after")
    def _correct_fits_samples(self) -> Self:
        if self.correct is not None and self.correct > self.samples:
            raise ValueError(
                f"correct: {self.correct} is more than samples ({self.samples}). Give a count of samples."
            )
        return self


class TaskPair(Frozen):
    """Hold teacher's and student's score on one task.

    The three counts are given together, or not at all; with them the comparison is exact (see metrics.py).
    """

    task: Name
    teacher: Score
    student: Score
    teacher_stderr: Score | None = None
    student_stderr: Score | None = None
    domain: Name | None = None
    higher_is_better: Annotated[bool, Field(strict=True)] = True
    samples: Annotated[int, Field(strict=True, ge=1)] | None = None
    teacher_correct: Count | None = None
    student_correct: Count | None = None

    @model_validator(mode="after")
    def _counts_agree_with_scores(self) -> Self:
        counts = (self.samples, self.teacher_correct, self.student_correct)
        if all(count is None for count in counts):
            return self
        if self.samples is None or self.teacher_correct is None or self.student_correct is None:
            raise ValueError(
                "samples, teacher_correct and student_correct: give all three or none."
            )
        for side, score, correct in (
            ("teacher", self.teacher, self.teacher_correct),
            ("student", self.student, self.student_correct),
        ):
            if not math.isclose(score, correct / self.samples, abs_tol=1e-9):
                raise ValueError(
                    f"{side}: {score} is not {side}_correct / samples = {correct}/{self.samples}. Make them agree."
                )
        return self


class ScoreFile(Frozen):
    """Hold the pairs of one comparison, each task once."""

    tasks: Annotated[tuple[TaskPair, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        first: dict[str, int] = {}
        for index, pair in enumerate(self.tasks):
            if pair.task in first:
                raise ValueError(
                    f"tasks[{index}].task: {pair.task!r} is already tasks[{first[pair.task]}]. Give each task once."
                )
            first[pair.task] = index
        return self


class Comparison(Frozen):
    """Hold one student measured against its teacher (definitions: metrics.py).

    ``win_and_tie`` maps the tolerance as a string ("0.05") to C_alpha. ``critical_tolerance_75`` is the tolerance at
    which three quarters of the tasks win or tie. ``worst_drop`` is the largest relative loss, on ``worst_task``.
    """

    name: str
    tasks: tuple[TaskPair, ...]
    recovery: dict[str, float | None]
    recovery_by_domain: dict[str, float | None]
    mean_recovery: float | None
    win_and_tie: dict[str, float]
    critical_tolerance: float
    critical_tolerance_75: float
    worst_drop: float
    worst_task: str
    lossless: bool


def load_pairs(data: object, error: type[EvalError] = EvalError) -> tuple[TaskPair, ...]:
    """Validate ``{"tasks": [...]}`` and return its pairs.

    Raises ``error`` with one line that starts with the dotted path of the first bad value.
    """
    if not isinstance(data, dict):
        raise error(f'the file holds {_kind(data)}; it must hold an object {{"tasks": [...]}}.')
    try:
        return ScoreFile.model_validate(data).tasks
    except ValidationError as problem:
        raise error(one_line(problem, ScoreFile)) from None


def one_line(problem: ValidationError, model: type[BaseModel]) -> str:
    """Say the first of a validation's errors in one line, and how many more there are."""
    locations = [error["loc"] for error in problem.errors()]
    # A list with a bad item also reports itself as too short.
    errors = [
        e for e in problem.errors() if e["type"] != "too_short" or not _below(e["loc"], locations)
    ]
    # An unknown key comes first: a misspelt key also reports the right one as missing.
    errors.sort(key=lambda error: error["type"] != "extra_forbidden")
    others = len({error["loc"] for error in errors}) - 1
    return _sentence(errors[0], model) + (f" (and {others} more)" if others > 0 else "")


def _sentence(error: Any, model: type[BaseModel]) -> str:
    path, value, kind = _dotted(error["loc"]), error["input"], error["type"]
    where = path or "the file"
    match kind:
        case "finite_number":
            return f"{where}: {value} is not a finite number. Give a number >= 0, or leave the task out."
        case "greater_than_equal":
            return f"{where}: {value!r} is less than {error['ctx']['ge']}. Scores and counts start there."
        case "extra_forbidden":
            return f"{where}: unknown key. {did_you_mean(str(error['loc'][-1]), _keys(model, error['loc']))}"
        case "missing":
            return f"{where}: missing. Add it."
        case "too_short" | "string_too_short":
            return f"{where}: empty. Give at least one."
        case "value_error":
            return (f"{path}: " if path else "") + str(error["ctx"]["error"])
        case "tuple_type" | "model_type" | "dict_type" | "model_attributes_type":
            wanted = "a list" if kind == "tuple_type" else "an object"
            return f"{where}: {_kind(value)}; give {wanted}."
        case "float_type" | "int_type" | "bool_type" | "string_type":
            words = {
                "float": "a number",
                "int": "a whole number",
                "bool": "true or false",
                "string": "a string",
            }
            return (
                f"{where}: {value!r} is {_kind(value)}; give {words[kind.removesuffix('_type')]}."
            )
    return f"{where}: {value!r}: {error['msg']}."


def _below(location: tuple[int | str, ...], others: list[tuple[int | str, ...]]) -> bool:
    return any(
        len(other) > len(location) and other[: len(location)] == location for other in others
    )


def _dotted(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else str(part))
    return path


def _keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys allowed where ``location`` ends, following nested models by annotation."""
    fields = model.model_fields
    for part in location[:-1]:
        if isinstance(part, str) and part in fields:
            fields = _nested(fields[part].annotation) or fields
    return sorted(fields)


def _nested(annotation: Any) -> dict[str, Any] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    for argument in getattr(annotation, "__args__", ()):
        if (fields := _nested(argument)) is not None:
            return fields
    return None


def did_you_mean(name: str, allowed: list[str]) -> str:
    """Suggest the closest allowed name, or list what is allowed."""
    if close := difflib.get_close_matches(name, allowed, n=1):
        return f"Did you mean {close[0]!r}?"
    shown = ", ".join(allowed[:12]) + (", ..." if len(allowed) > 12 else "")
    return f"Allowed: {shown}."


def _kind(value: object) -> str:
    """Name a value's type in the words of JSON."""
    if value is None:
        return "null"
    names: tuple[tuple[type, str], ...] = (
        (bool, "a boolean"), (str, "a string"), (int, "a number"), (float, "a number"),
        (list, "a list"), (tuple, "a list"), (dict, "an object"),
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)

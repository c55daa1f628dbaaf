"""What the evaluation reads and writes: one model's scores, teacher-student pairs, comparisons.

This module imports pydantic only, so that scoring a file never loads torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xlstm_eval.problems import FieldError, kind_of, one_line


class EvalError(ValueError):
    """Report bad input in one line: the field, its value, what is allowed, the fix."""


# Strict, since pydantic would read the text "0.4" as a number, and true as 1.
Score = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
# A score that is not reported may be of any sign.
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Name = Annotated[str, Field(strict=True, min_length=1)]


class Frozen(BaseModel):
    """Base of all records: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskResult(Frozen):
    """Hold one model's score on one task.

    ``correct`` is the number of right answers if the metric is a mean of zeros and ones, else None.
    Comparisons prefer it to the rounded ``score``, so that a teacher always ties with itself.
    ``metrics`` has every score that lm-eval reports for the task, by its key ("acc_norm,none"), so
    that choosing another metric later needs no new evaluation. Older results have none.
    """

    task: Name
    metric: Name
    score: Score
    metrics: dict[Name, Finite] = Field(default_factory=dict)
    stderr: Score | None = None
    domain: Name | None = None
    higher_is_better: bool = True
    samples: Annotated[int, Field(strict=True, ge=1)]
    correct: Count | None = None

    @model_validator(mode="after")
    def _correct_fits_samples(self) -> Self:
        if self.correct is not None and self.correct > self.samples:
            raise FieldError(
                "correct",
                f"{self.correct} is more than samples ({self.samples}). Give a count of samples.",
            )
        return self


class TaskPair(Frozen):
    """Hold teacher's and student's score on one task.

    The three counts are given together or not at all. With them the comparison is exact.
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
            raise FieldError(
                "", "samples, teacher_correct and student_correct: give all three or none."
            )
        for side, score, correct in (
            ("teacher", self.teacher, self.teacher_correct),
            ("student", self.student, self.student_correct),
        ):
            # A score file may round its scores, but not by more than printing a float loses.
            if not math.isclose(score, correct / self.samples, abs_tol=1e-9):
                raise FieldError(
                    side,
                    f"{score} is not {side}_correct / samples = {correct}/{self.samples}. "
                    "Make them agree.",
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
                raise FieldError(
                    f"tasks[{index}].task",
                    f"{pair.task!r} is already tasks[{first[pair.task]}]. Give each task once.",
                )
            first[pair.task] = index
        return self


class Comparison(Frozen):
    """Hold one student measured against its teacher (definitions: docs/metric.md).

    ``win_and_tie`` maps the tolerance as a string ("0.05") to C_alpha. At ``critical_tolerance_75``
    three quarters of the tasks win or tie. ``worst_drop`` is the largest loss, on ``worst_task``.
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
        raise error(f'the file holds {kind_of(data)}; it must hold {{"tasks": [...]}}.')
    try:
        return ScoreFile.model_validate(data).tasks
    except ValidationError as problem:
        raise error(one_line(problem, ScoreFile, whole="the file")) from None

"""What the evaluation reads and writes: one model's scores, teacher-student pairs, comparisons.

This module imports pydantic only, so that scoring a file never loads torch.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from xlstm_eval.problems import FieldError, kind_of, one_line


class EvalError(ValueError):
    """Report bad input in one line: the field, its value, what is allowed, the fix."""


def _without_control(value: str) -> str:
    # A terminal obeys such characters, and a table breaks at a new line.
    if any(unicodedata.category(letter) == "Cc" for letter in value):
        raise FieldError("", f"{value!r} holds a control character; give plain text.")
    return value


# Strict, since pydantic would read the text "0.4" as a number, and true as 1.
Score = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
# A score that is not reported may be of any sign.
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Name = Annotated[str, Field(strict=True, min_length=1), AfterValidator(_without_control)]
Chance = Annotated[float, Field(strict=True, ge=0, lt=1)]
LARGEST_ITEM = 1e100
"""Squares and products of larger scores are beyond floats."""
Item = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-LARGEST_ITEM, le=LARGEST_ITEM)]
Items = Annotated[tuple[Item, ...], Field(min_length=1)]
Kind = Literal["generation", "loglikelihood"]
"""What a score is made of: answers that the model wrote, or its log-likelihoods of given texts."""
Interval = tuple[float, float]
"""Lower and upper end of a 95 % interval."""

COARSEST_ROUNDING = 0.005
"""How far a score may be from the mean of its items: a score rounded to two digits."""


class Frozen(BaseModel):
    """Base of all records: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskResult(Frozen):
    """Hold one model's score on one task.

    ``correct`` is the number of right answers if the metric is a mean of zeros and ones, else None.
    Comparisons prefer it to the rounded ``score``, so that a teacher always ties with itself.
    ``metrics`` has every score that lm-eval reports for the task, by its key ("acc_norm,none"), so
    that choosing another metric later needs no new evaluation. Older results have none.
    ``items`` are the scores of the single items, in the order in which they were asked; None where
    the score is not their mean. ``chance`` is the score of guessing, where it is known. ``kind`` is
    None in results of before it was recorded.
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
    chance: Chance | None = None
    kind: Kind | None = None
    items: Items | None = Field(default=None, repr=False)

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

    The three counts are given together or not at all. With them the comparison is exact. The items
    are the scores of the same items in the same order, 0 and 1 or real numbers; with them, scores
    may be left out, and counts follow from zeros and ones. ``chance`` is the score of guessing.
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
    teacher_items: Items | None = Field(default=None, repr=False)
    student_items: Items | None = Field(default=None, repr=False)
    chance: Chance | None = None
    kind: Kind | None = None

    @model_validator(mode="before")
    @classmethod
    def _take_scores_from_items(cls, data: Any) -> Any:
        # What is wrong with the items themselves is said by their field.
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        sides: dict[str, Any] = {side: data.get(f"{side}_items") for side in ("teacher", "student")}
        for side, items in sides.items():
            if _are_numbers(items):
                mean = math.fsum(items) / len(items)
                if side not in data or _is_rounded(data[side], mean):
                    filled[side] = mean
            elif items is not None:
                # The items are what is to be mended, not the score that they would give.
                filled.setdefault(side, 0.0)
        if all(_are_zeros_and_ones(items) for items in sides.values()):
            filled.setdefault("samples", len(sides["teacher"]))
            for side, items in sides.items():
                filled.setdefault(f"{side}_correct", int(sum(items)))
        return filled

    @model_validator(mode="after")
    def _items_are_paired(self) -> Self:
        teacher, student = self.teacher_items, self.student_items
        if teacher is None and student is None:
            return self
        if teacher is None or student is None:
            raise FieldError("", "teacher_items and student_items: give both or none.")
        if len(teacher) != len(student):
            raise FieldError(
                "student_items",
                f"{len(student)} items, but teacher_items has {len(teacher)}. "
                "Give the same items in the same order.",
            )
        if self.samples is not None and self.samples != len(teacher):
            raise FieldError(
                "samples", f"{self.samples}, but there are {len(teacher)} items. Make them agree."
            )
        for side, score, items in (
            ("teacher", self.teacher, teacher),
            ("student", self.student, student),
        ):
            mean = math.fsum(items) / len(items)
            if not math.isclose(score, mean, rel_tol=1e-9, abs_tol=1e-9):
                raise FieldError(
                    side,
                    f"{score} is not the mean of {side}_items, {mean:.6g}. "
                    "Make them agree, or leave the score out.",
                )
        return self

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


def _are_numbers(items: object) -> bool:
    """Tell whether these are items whose mean is a score."""
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        return False
    return all(map(_is_number, items))


def _is_number(value: Any) -> bool:
    # By type, since Python counts true as a number. Whole numbers may be too large for a float.
    return type(value) in (int, float) and abs(value) <= LARGEST_ITEM


def _are_zeros_and_ones(items: Any) -> bool:
    return _are_numbers(items) and set(items) <= {0, 1}


def _is_rounded(score: Any, mean: float) -> bool:
    """Tell whether ``score`` is ``mean``, rounded to the digits with which it is written."""
    if not _is_number(score):
        return False
    exponent = Decimal(repr(score)).as_tuple().exponent
    half_digit = 0.5 * 10.0 ** int(exponent)
    return abs(score - mean) <= min(half_digit, COARSEST_ROUNDING) + 1e-9


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


class Recall(Frozen):
    """Hold how many needles of a kind a model found (definitions: docs/long-context.md).

    ``distance_tokens`` is the upper end of a range of distances between the needle and the answer:
    above half of it, up to it. ``length_tokens`` is the length of the whole item, prompt and
    answer. Each has one of the two. ``interval`` is Wilson's of ``right / n``.
    """

    kind: Name
    distance_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    length_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    n: Annotated[int, Field(strict=True, ge=1)]
    right: Count
    interval: Interval

    @model_validator(mode="after")
    def _is_one_measure(self) -> Self:
        if (self.distance_tokens is None) == (self.length_tokens is None):
            raise FieldError("", "distance_tokens and length_tokens: give one of them.")
        if self.right > self.n:
            raise FieldError("right", f"{self.right} is more than n ({self.n}). Give a count of n.")
        return self


class PositionLoss(Frozen):
    """Hold the mean loss (nats) of ``tokens`` tokens at positions ``from`` to ``to`` - 1.

    Positions count from 0 in each document. Python has the word ``from``, so the attribute is
    ``start``; files have ``from``.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True
    )

    start: Count = Field(alias="from")
    to: Annotated[int, Field(strict=True, ge=1)]
    nll: Score
    tokens: Annotated[int, Field(strict=True, ge=1)]


class LongContext(Frozen):
    """Hold one model's long-context results: the file ``long_context.json`` of its evaluation.

    ``recall`` is over distance, ``recall_by_length`` over the length of the items: both count the
    same items. ``items`` is the identity of the items and documents; models are compared where it
    is equal. ``skipped_lengths`` do not fit the model's context.
    """

    items: Name
    recall: tuple[Recall, ...]
    recall_by_length: tuple[Recall, ...]
    loss_by_position: tuple[PositionLoss, ...]
    skipped_lengths: tuple[int, ...] = ()


class TaskEvidence(Frozen):
    """Hold what the items of one task say. Intervals are of 95 %.

    ``difference`` is the student's score minus the teacher's, with the sign turned where lower is
    better: above 0 the student is better. ``teacher_only`` and ``student_only`` count the items
    that one of them alone has right; None for items that are not zeros and ones. A single real
    item has no interval.
    """

    items: int
    teacher_only: int | None
    student_only: int | None
    teacher_interval: Interval | None
    student_interval: Interval | None
    difference: float
    difference_interval: Interval | None
    recovery_interval: Interval | None
    p_value: float
    p_value_holm: float


class Pooled(Frozen):
    """Hold the decision over all tasks that count, each with the same weight.

    ``kept`` is the sum of the student's scores over the sum of the teacher's. The student is
    ``non-inferior`` if the whole interval of ``kept`` is at or above ``1 - margin``, else
    ``inferior`` if all of it is below 1, else ``undecided``. ``smallest_margin`` is the smallest
    margin at which it would be non-inferior. ``reason`` says why a decision could not be made.
    """

    decision: Literal["non-inferior", "inferior", "undecided"]
    margin: float
    tasks: int
    items: int
    kept: float | None = None
    kept_interval: Interval | None = None
    smallest_margin: float | None = None
    p_value: float | None = None
    reason: str = ""


class Statistics(Frozen):
    """Hold tests and 95 % intervals of a comparison (definitions: docs/metric.md).

    ``tasks`` has an entry for each task with items. The intervals over tasks are None where a task
    that counts has no items; ``reason`` then names it. ``sorted_losses`` are those of the k-th
    smallest loss ``1 - S/T``, for every k.
    """

    tasks: dict[str, TaskEvidence]
    pooled: Pooled
    critical_tolerance: Interval | None = None
    critical_tolerance_75: Interval | None = None
    worst_drop: Interval | None = None
    mean_recovery: Interval | None = None
    win_and_tie: dict[str, Interval] | None = None
    sorted_losses: tuple[Interval, ...] | None = None
    reason: str = ""


class Comparison(Frozen):
    """Hold one student measured against its teacher (definitions: docs/metric.md).

    ``win_and_tie`` maps the tolerance as a string ("0.05") to C_alpha. At ``critical_tolerance_75``
    three quarters of the tasks win or tie. ``worst_drop`` is the largest loss, on ``worst_task``.
    ``apart`` maps tasks that say nothing about the student to the reason: they count neither in
    the rates nor in the means. ``statistics`` is filled by `xlstm_eval.statistics.measure`.
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
    worst_task: str | None
    lossless: bool
    apart: dict[str, str] = Field(default_factory=dict)
    statistics: Statistics | None = None

    def counted(self) -> tuple[TaskPair, ...]:
        """Return the tasks that count."""
        return tuple(pair for pair in self.tasks if pair.task not in self.apart)


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

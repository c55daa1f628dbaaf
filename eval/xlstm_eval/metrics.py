"""Win-and-Tie rate, critical tolerance and recovery of a student against its teacher.

Pure functions of scores, in exact rational arithmetic, so that no rounding decides a tie. Counts of
right answers are compared where a pair carries them, else the decimal numbers as written (0.95 is
19/20). Definitions and edge cases: docs/metric.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

from xlstm_eval.records import Comparison, EvalError, TaskPair, TaskResult

ALPHAS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)

LARGEST_GAIN = 1e12
"""Stands for a gain without bound among the losses that are sorted."""

CHANCE_LEVEL, CHANCE_QUANTILE = 0.05, 1.645
"""Level of the test that a teacher is above chance, and the normal quantile that belongs to it."""

MARGIN = 0.02
"""Share of the teacher's score that may be lost over all tasks, unless the user says otherwise."""

LARGEST_RATE = 1e100
"""Recovery rates beyond it are refused. No real scores have one, and no float is above 1e308."""


def win_or_tie(pair: TaskPair, alpha: float) -> bool:
    """Tell whether the student wins or ties at tolerance ``alpha`` in [0, 1].

    Higher is better: ``S >= (1 - alpha) T`` (paper, section on the metric).
    Lower is better: ``(1 - alpha) S <= T``.
    """
    # One definition for both: the rate at the critical tolerance then agrees with it exactly.
    return required_tolerance(pair) <= _exact(alpha, "alpha")


def required_tolerance(pair: TaskPair) -> Fraction:
    """Return the smallest tolerance in [0, 1] at which the pair wins or ties.

    ``max(0, 1 - S/T)``, or ``max(0, 1 - T/S)`` where lower is better.
    """
    ratio = _ratio(pair)
    # With a denominator of 0 the inequality holds at every tolerance.
    return Fraction(0) if ratio is None else max(Fraction(0), 1 - ratio)


def signed_loss(pair: TaskPair) -> float:
    """Return ``1 - S/T`` (``1 - T/S`` where lower is better): below 0 where the student gains.

    Raises EvalError as `recovery_rate`. Where the denominator is 0: the largest gain there is.
    """
    ratio = _rate(pair)
    return -LARGEST_GAIN if ratio is None else float(1 - ratio)


def win_and_tie_rate(pairs: Sequence[TaskPair], alpha: float) -> float:
    """Return C_alpha, the fraction of tasks on which the student wins or ties at ``alpha``."""
    _require_tasks(pairs)
    return sum(win_or_tie(pair, alpha) for pair in pairs) / len(pairs)


def critical_tolerance(pairs: Sequence[TaskPair], rate: float = 0.5) -> float:
    """Return the smallest tolerance at which at least ``rate`` of the tasks win or tie.

    The result lies in [0, 1], since at 1 every inequality holds. C_alpha at the result reaches
    ``rate``. Raises EvalError: no tasks, a rate outside (0, 1].
    """
    _require_tasks(pairs)
    share = _exact(rate, "rate")
    if share == 0:
        raise EvalError(f"rate: {rate} is not allowed. Give a number in (0, 1].")
    # C_alpha is a step function that rises at each task's required tolerance. So the answer is the
    # k-th smallest of them, k = ceil(rate * n), and not a point of some grid.
    needed = sorted(required_tolerance(pair) for pair in pairs)
    # `share` is exact: 0.07 * 100 as floats is above 7, and its ceiling would be 8.
    k = math.ceil(share * len(needed))
    return _float_at_or_above(needed[k - 1])


def recovery_rate(pair: TaskPair) -> float | None:
    """Return S/T (T/S where lower is better), or None where the denominator is 0.

    Raises EvalError: it is beyond LARGEST_RATE.
    """
    ratio = _rate(pair)
    return None if ratio is None else float(ratio)


def mean_recovery(pairs: Iterable[TaskPair]) -> float | None:
    """Return the mean recovery rate over the tasks that have one, or None if none has."""
    rates = [_rate(pair) for pair in pairs]
    defined = [rate for rate in rates if rate is not None]
    if not defined:
        return None
    # Summed exactly, so that the order of the tasks cannot change the last digit.
    return float(sum(defined, Fraction(0)) / len(defined))


def compare(name: str, pairs: Sequence[TaskPair], alphas: Sequence[float] = ALPHAS) -> Comparison:
    """Measure one student against its teacher on all tasks that say something about it.

    Where there is no such task, nothing is shown: every rate is 0, every tolerance 1.
    """
    _require_tasks(pairs)
    apart = {pair.task: reason for pair in pairs if (reason := no_evidence(pair))}
    counted = [pair for pair in pairs if pair.task not in apart]
    domains: dict[str, list[TaskPair]] = {}
    for pair in pairs:
        if pair.domain is not None:
            own = domains.setdefault(pair.domain, [])
            own += [] if pair.task in apart else [pair]
    worst = max(counted, key=required_tolerance, default=None)
    rates = {alpha: win_and_tie_rate(counted, alpha) if counted else 0.0 for alpha in alphas}
    return Comparison(
        name=name,
        tasks=tuple(pairs),
        recovery={pair.task: recovery_rate(pair) for pair in pairs},
        recovery_by_domain={domain: mean_recovery(own) for domain, own in domains.items()},
        mean_recovery=mean_recovery(counted),
        win_and_tie={str(float(alpha)): rate for alpha, rate in rates.items()},
        critical_tolerance=critical_tolerance(counted) if counted else 1.0,
        critical_tolerance_75=critical_tolerance(counted, rate=0.75) if counted else 1.0,
        worst_drop=1.0 if worst is None else float(required_tolerance(worst)),
        worst_task=None if worst is None else worst.task,
        lossless=bool(counted) and win_and_tie_rate(counted, 0.0) >= 0.5,
        apart=apart,
    )


def no_evidence(pair: TaskPair) -> str | None:
    """Say why a task tells nothing about the student, or return None where it does.

    A teacher with a score of 0, or one that is not shown to be better than chance, leaves nothing
    to lose: any student would win or tie.
    """
    # Where lower is better, 0 is the best score, and no level of chance is known.
    if not pair.higher_is_better:
        return None
    if pair.teacher == 0:
        return "the teacher's score is 0"
    if pair.chance and not _above_chance(pair, pair.chance):
        return f"the teacher is at chance ({pair.chance:.2f})"
    return None


def _above_chance(pair: TaskPair, chance: float) -> bool:
    """Tell whether the teacher's score is above chance, at a one-sided level of 5 %."""
    if pair.samples is not None and pair.teacher_correct is not None:
        from scipy.stats import binomtest  # it takes a second to load

        found = binomtest(pair.teacher_correct, pair.samples, chance, alternative="greater")
        return bool(found.pvalue <= CHANCE_LEVEL)
    # Without counts a standard error must do; without one, the score alone.
    return pair.teacher - CHANCE_QUANTILE * (pair.teacher_stderr or 0.0) > chance


def pair_results(
    teacher: Sequence[TaskResult], student: Sequence[TaskResult]
) -> tuple[TaskPair, ...]:
    """Join teacher's and student's results by task, in the teacher's order.

    Raises EvalError if the two were not measured alike: other tasks, metric or number of samples.
    """
    by_task = {result.task: result for result in student}
    # A task on one side alone would change the set that C_alpha is a fraction of.
    unshared = {result.task for result in teacher} ^ set(by_task)
    if unshared:
        names = ", ".join(sorted(unshared))
        raise EvalError(
            f"tasks: only one of teacher and student has {names}. Evaluate both on one suite."
        )
    return tuple(_pair(result, by_task[result.task]) for result in teacher)


def _pair(teacher: TaskResult, student: TaskResult) -> TaskPair:
    for field in ("metric", "samples", "higher_is_better"):
        ours, theirs = getattr(student, field), getattr(teacher, field)
        if ours != theirs:
            raise EvalError(
                f"{teacher.task}.{field}: the student has {ours!r}, the teacher {theirs!r}. "
                "Evaluate both alike."
            )
    # Both or none: counts on one side alone compare with nothing.
    counted = teacher.correct is not None and student.correct is not None
    paired = teacher.items is not None and student.items is not None
    return TaskPair(
        task=teacher.task,
        teacher=teacher.score,
        student=student.score,
        teacher_stderr=teacher.stderr,
        student_stderr=student.stderr,
        domain=teacher.domain,
        higher_is_better=teacher.higher_is_better,
        samples=teacher.samples if counted else None,
        teacher_correct=teacher.correct if counted else None,
        student_correct=student.correct if counted else None,
        teacher_items=teacher.items if paired else None,
        student_items=student.items if paired else None,
        chance=teacher.chance,
        kind=teacher.kind,
    )


def _rate(pair: TaskPair) -> Fraction | None:
    """Return the exact recovery rate, or None where its denominator is 0."""
    ratio = _ratio(pair)
    if ratio is not None and ratio > LARGEST_RATE:
        raise EvalError(
            f"{pair.task}: the teacher's {pair.teacher} and the student's {pair.student} are "
            f"more than a factor {LARGEST_RATE:.0e} apart: no recovery rate. "
            "Correct the score that is near zero, or make it 0."
        )
    return ratio


def _ratio(pair: TaskPair) -> Fraction | None:
    """Return the exact ratio of the scores, or None where its denominator is 0."""
    if (
        pair.samples is not None
        and pair.teacher_correct is not None
        and pair.student_correct is not None
    ):
        teacher, student = Fraction(pair.teacher_correct), Fraction(pair.student_correct)
    else:
        # repr gives the decimal number as written: Fraction(0.95) would be 0.9499999...
        teacher, student = Fraction(repr(pair.teacher)), Fraction(repr(pair.student))
    above, below = (student, teacher) if pair.higher_is_better else (teacher, student)
    return None if below == 0 else above / below


def _exact(value: float, name: str) -> Fraction:
    """Read a tolerance or rate as the decimal number it is written as."""
    if not 0 <= value <= 1:
        raise EvalError(f"{name}: {value} is not allowed. Give a number in [0, 1].")
    return Fraction(repr(float(value)))


def _float_at_or_above(exact: Fraction) -> float:
    """Return the smallest float that, as the decimal it is printed as, is not below ``exact``."""
    # A tolerance rounded down would be too small for the task that decides it.
    value = float(exact)
    while Fraction(repr(value)) < exact:
        value = math.nextafter(value, math.inf)
    return value


def _require_tasks(pairs: Sequence[TaskPair]) -> None:
    if not pairs:
        raise EvalError("tasks: empty. Give at least one.")

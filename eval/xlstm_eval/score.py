"""Score a file of teacher and student results: recovery, Win-and-Tie rates, critical tolerance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xlstm_eval.metrics import ALPHAS, MARGIN, compare
from xlstm_eval.records import Comparison, EvalError, Interval, TaskEvidence, load_pairs


class ScoreError(EvalError):
    """Report a score file that cannot be used, in one line."""


@dataclass(frozen=True)
class ScoreReport:
    """Hold a comparison with its statistics, and render it."""

    comparison: Comparison

    def to_dict(self) -> dict[str, object]:
        """Return the report as plain values, for JSON."""
        result = self.comparison
        return {
            "recovery": result.recovery,
            "recovery_by_domain": result.recovery_by_domain,
            "mean_recovery": result.mean_recovery,
            "win_and_tie": result.win_and_tie,
            "critical_tolerance": result.critical_tolerance,
            "critical_tolerance_75": result.critical_tolerance_75,
            "worst_drop": result.worst_drop,
            "worst_task": result.worst_task,
            "lossless": result.lossless,
            "tasks": len(result.tasks),
            "apart": result.apart,
            **statistics_values(result),
        }

    def to_json(self) -> str:
        """Return the report as JSON; every number in it is finite."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_text(self) -> str:
        """Return the report as plain text: the tasks, the decision, then the paper's metric."""
        result = self.comparison
        lines = _task_table(result)
        lines += [""] + [f"Apart: {task}: {why}." for task, why in result.apart.items()]
        if result.apart:
            lines += ["These tasks count neither as wins nor as losses.", ""]
        return "\n".join([*lines, *decision_lines(result), "", *_metric_lines(result)])


def statistics_values(result: Comparison) -> dict[str, object]:
    """Return a comparison's tests and intervals as plain values, for JSON.

    Intervals are [low, high], or null where there are no items to compute them from.
    """
    found = result.statistics
    if found is None:
        raise EvalError(f"{result.name}: has no statistics. Call xlstm_eval.statistics.measure.")
    tasks = found.tasks
    return {
        "decision": found.pooled.decision,
        "pooled": found.pooled.model_dump(mode="json", exclude={"decision"}),
        "p_values": {task: own.p_value for task, own in tasks.items()},
        "p_values_holm": {task: own.p_value_holm for task, own in tasks.items()},
        "differences": {task: own.difference for task, own in tasks.items()},
        "intervals": {
            "critical_tolerance": found.critical_tolerance,
            "critical_tolerance_75": found.critical_tolerance_75,
            "worst_drop": found.worst_drop,
            "mean_recovery": found.mean_recovery,
            "win_and_tie": found.win_and_tie,
            "recovery": {task: own.recovery_interval for task, own in tasks.items()},
            "difference": {task: own.difference_interval for task, own in tasks.items()},
            "teacher": {task: own.teacher_interval for task, own in tasks.items()},
            "student": {task: own.student_interval for task, own in tasks.items()},
        },
    }


def decision_lines(result: Comparison) -> list[str]:
    """Say what stands beside the paper's metric: the pooled decision and the worst drop."""
    found = result.statistics
    # Where no task counts, the worst drop is all that could be lost.
    worst = percent(result.worst_drop if result.counted() else None)
    if result.worst_task is not None:
        worst += f" on {result.worst_task}"
    if found is None:
        return [f"worst drop  {worst}"]
    pooled = found.pooled
    words = f"{pooled.decision} at margin {pooled.margin:g}"
    if pooled.decision != "non-inferior":
        words = f"{pooled.decision} (margin {pooled.margin:g})"
    if pooled.reason:
        words += f": {pooled.reason}"
    lines = [f"decision    {words}"]
    if pooled.kept is not None and not pooled.reason:
        kept = f"{percent(pooled.kept)} of the teacher's score{ends(pooled.kept_interval, 100)}"
        lines.append(f"kept        {kept}, {pooled.tasks} tasks, {pooled.items:,} items")
    if pooled.smallest_margin is not None:
        p_value = "" if pooled.p_value is None else f"; difference from 0: p = {pooled.p_value:.2g}"
        lines.append(f"margin      {pooled.smallest_margin:.4f} is the smallest shown{p_value}")
    return [*lines, f"worst drop  {worst}{ends(found.worst_drop, 100)}"]


def _metric_lines(result: Comparison) -> list[str]:
    if not result.counted():
        return ["No task counts, so there is no Win-and-Tie rate and no critical tolerance."]
    found = result.statistics
    rates = found.win_and_tie if found else None
    lines = ["Win-and-Tie rate:"]
    for alpha, rate in result.win_and_tie.items():
        lines.append(f"  C at {alpha:<6} {rate:.3f}{ends(rates[alpha] if rates else None)}")
    half = found.critical_tolerance if found else None
    three_quarters = found.critical_tolerance_75 if found else None
    mean = found.mean_recovery if found else None
    return [
        *lines,
        "",
        f"critical tolerance (rate 0.5)   {result.critical_tolerance:.4f}{ends(half)}",
        f"critical tolerance (rate 0.75)  {result.critical_tolerance_75:.4f}{ends(three_quarters)}",
        f"mean recovery                   {percent(result.mean_recovery)}{ends(mean, 100)}",
        f"lossless (C at 0 >= 0.5)        {'yes' if result.lossless else 'no'}",
    ]


def _task_table(result: Comparison) -> list[str]:
    """Return a row for each task; with items also the difference, its interval, and p-values."""
    evidence = result.statistics.tasks if result.statistics else {}
    head = ["task", "domain", "teacher", "student", "recovery"]
    if evidence:
        head += ["difference", "95 %", "p", "p (Holm)"]
    rows = [head]
    for pair in result.tasks:
        row = [
            pair.task if pair.higher_is_better else f"{pair.task} (lower is better)",
            pair.domain or "-",
            with_stderr(pair.teacher, pair.teacher_stderr),
            with_stderr(pair.student, pair.student_stderr),
            percent(result.recovery[pair.task]),
        ]
        if evidence:
            row += _evidence_cells(evidence.get(pair.task))
        rows.append(row)
    return aligned(rows)


def _evidence_cells(found: TaskEvidence | None) -> list[str]:
    if found is None:
        return ["-"] * 4
    between = ends(found.difference_interval, sign="+").strip() or "-"
    return [
        f"{found.difference:+.3f}",
        between,
        f"{found.p_value:.2g}",
        f"{found.p_value_holm:.2g}",
    ]


def score_file(
    path: str | Path, alphas: Sequence[float] = ALPHAS, margin: float | None = None
) -> ScoreReport:
    """Read ``{"tasks": [...]}`` from a JSON file and compare the student with its teacher.

    ``margin`` is the share of the teacher's score that may be lost, for the decision over all
    tasks. Raises ScoreError, one line: file missing, not JSON, unknown key, wrong type, not finite;
    EvalError: a margin outside [0, 1].
    """
    path = Path(path)
    pairs = load_pairs(_read_json(path), ScoreError)
    # scipy takes a second to load: a bad file is reported before.
    from xlstm_eval.statistics.measure import measure

    margin = MARGIN if margin is None else margin
    return ScoreReport(measure(compare(path.stem, pairs, alphas), alphas, margin))


def _read_json(path: Path) -> object:
    try:
        # Windows' editors put a mark before the text.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ScoreError(f"{path}: no such file. Give the path of a JSON file.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ScoreError(
            f"{path}: cannot be read ({reason}). Give the path of a JSON file."
        ) from None
    try:
        # Numbers such as NaN pass here, which JSON has not; the records refuse them.
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ScoreError(f"{path}: not JSON at {where} ({error.msg}). Correct it there.") from None
    except ScoreError:
        raise
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise ScoreError(f"{path}: a number cannot be read ({_first_words(error)}).") from None
    except RecursionError:
        message = f'{path}: nested too deeply. It must hold {{"tasks": [...]}}.'
        raise ScoreError(message) from None


def _first_words(error: ValueError) -> str:
    return str(error).partition(":")[0]


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that names a key twice."""
    # Python's parser would keep the last value and say nothing.
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise ScoreError(f"{name}: the key appears twice in one object. Keep one.")
        result[name] = value
    return result


def with_stderr(score: float, stderr: float | None) -> str:
    """Write a score with its standard error, if it has one.

    Items of equal scores have none to show: ± 0 would say that the score is certain.
    """
    # Perplexities and scores in percent need fewer digits than shares do.
    digits = 3 if score < 10 else 2
    if not stderr:
        return f"{score:.{digits}f}"
    return f"{score:.{digits}f} ± {stderr:.{digits}f}"


def percent(value: float | None) -> str:
    """Write a rate as a percentage, or a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f} %"


def ends(interval: Interval | None, factor: float = 1, sign: str = "") -> str:
    """Write an interval in brackets, after a space; nothing where there is none.

    ``factor`` 100 writes shares as percentages.
    """
    if interval is None:
        return ""
    digits = 1 if factor == 100 else 3
    low, high = (f"{factor * end:{sign}.{digits}f}" for end in interval)
    return f" [{low}, {high}]"


def aligned(rows: Sequence[Sequence[str]], names: int = 2) -> list[str]:
    """Return a table's lines: the first ``names`` columns to the left, numbers to the right.

    ``rows`` begins with the head, under which a rule is drawn.
    """
    widths = [0] * len(rows[0])
    for row in rows:
        for column, cell in enumerate(row):
            widths[column] = max(widths[column], len(cell))
    lines = []
    for row in rows:
        cells = []
        for column, cell in enumerate(row):
            width = widths[column]
            cells.append(cell.ljust(width) if column < names else cell.rjust(width))
        lines.append("  ".join(cells))
    head, *body = lines
    return [head, "-" * len(head), *body]

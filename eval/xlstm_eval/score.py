"""Score a file of teacher and student results: recovery, Win-and-Tie rates, critical tolerance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xlstm_eval.metrics import ALPHAS, compare
from xlstm_eval.records import Comparison, EvalError, TaskPair, load_pairs


class ScoreError(EvalError):
    """Report a score file that cannot be used, in one line."""


@dataclass(frozen=True)
class ScoreReport:
    """Hold a comparison and render it."""

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
        }

    def to_json(self) -> str:
        """Return the report as JSON; every number in it is finite."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_text(self) -> str:
        """Return the report as a plain table: the tasks first, then the rates."""
        result = self.comparison
        rows = [("task", "domain", "teacher", "student", "recovery")]
        rows += [self._task_row(pair) for pair in result.tasks]
        lines = [*aligned(rows), "", "Win-and-Tie rate:"]
        for alpha, rate in result.win_and_tie.items():
            lines.append(f"  C at {alpha:<6} {rate:.3f}")
        lines += [
            "",
            f"critical tolerance (rate 0.5)   {result.critical_tolerance:.4f}",
            f"critical tolerance (rate 0.75)  {result.critical_tolerance_75:.4f}",
            f"worst drop                      {result.worst_drop:.4f} ({result.worst_task})",
            f"mean recovery                   {percent(result.mean_recovery)}",
            f"lossless (C at 0 >= 0.5)        {'yes' if result.lossless else 'no'}",
        ]
        return "\n".join(lines)

    def _task_row(self, pair: TaskPair) -> tuple[str, str, str, str, str]:
        return (
            pair.task if pair.higher_is_better else f"{pair.task} (lower is better)",
            pair.domain or "-",
            with_stderr(pair.teacher, pair.teacher_stderr),
            with_stderr(pair.student, pair.student_stderr),
            percent(self.comparison.recovery[pair.task]),
        )


def score_file(path: str | Path, alphas: Sequence[float] = ALPHAS) -> ScoreReport:
    """Read ``{"tasks": [...]}`` from a JSON file and compare the student with its teacher.

    Raises ScoreError, one line: file missing, not JSON, unknown key, wrong type, not finite.
    """
    path = Path(path)
    pairs = load_pairs(_read_json(path), ScoreError)
    return ScoreReport(compare(path.stem, pairs, alphas))


def _read_json(path: Path) -> object:
    try:
        text = path.read_text(encoding="utf-8")
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
    except RecursionError:
        message = f'{path}: nested too deeply. It must hold {{"tasks": [...]}}.'
        raise ScoreError(message) from None


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
    """Write a score with its standard error, if it has one."""
    # Perplexities and scores in percent need fewer digits than shares do.
    digits = 3 if score < 10 else 2
    if stderr is None:
        return f"{score:.{digits}f}"
    return f"{score:.{digits}f} ± {stderr:.{digits}f}"


def percent(value: float | None) -> str:
    """Write a rate as a percentage, or a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f} %"


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

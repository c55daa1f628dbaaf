"""Score a file of teacher and student results: recovery, Win-and-Tie rates, critical tolerance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xlstm_eval.metrics import ALPHAS, compare
from xlstm_eval.records import Comparison, EvalError, load_pairs


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
        """Return the report as a plain table, tasks first, then the rates."""
        result = self.comparison
        rows: list[tuple[str, ...]] = [("task", "domain", "teacher", "student", "recovery")]
        for pair in result.tasks:
            rows.append(
                (
                    pair.task + ("" if pair.higher_is_better else " (lower is better)"),
                    pair.domain or "-",
                    with_stderr(pair.teacher, pair.teacher_stderr),
                    with_stderr(pair.student, pair.student_stderr),
                    percent(result.recovery[pair.task]),
                )
            )
        lines = _columns(rows)
        lines += ["", "Win-and-Tie rate:"]
        lines += [f"  C at {alpha:<6} {rate:.3f}" for alpha, rate in result.win_and_tie.items()]
        lines += [
            "",
            f"critical tolerance (rate 0.5)   {result.critical_tolerance:.4f}",
            f"critical tolerance (rate 0.75)  {result.critical_tolerance_75:.4f}",
            f"worst drop                      {result.worst_drop:.4f} ({result.worst_task})",
            f"mean recovery                   {percent(result.mean_recovery)}",
            f"lossless (C at 0 >= 0.5)        {'yes' if result.lossless else 'no'}",
        ]
        return "\n".join(lines)


def score_file(path: str | Path, alphas: Sequence[float] = ALPHAS) -> ScoreReport:
    """Read ``{"tasks": [...]}`` from a JSON file and compare student with teacher.

    Raises ScoreError with one line: file missing, not JSON, unknown key, wrong type, not a finite number.
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
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ScoreError(f"{path}: not JSON at {where} ({error.msg}). Correct it there.") from None
    except RecursionError:
        raise ScoreError(f"{path}: nested too deeply. It must hold {{'tasks': [...]}}.") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that names a key twice: JSON would silently keep the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ScoreError(f"{twice}: the key appears twice in one object. Keep one.")
    return result


def with_stderr(score: float, stderr: float | None) -> str:
    """Write a score with its standard error, if it has one."""
    digits = 3 if score < 10 else 2
    return f"{score:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def percent(value: float | None) -> str:
    """Write a rate as a percentage; a dash where it is undefined."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Align cells: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i]) for i, cell in enumerate(row)
        )
        lines.append("  ".join(cells))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]

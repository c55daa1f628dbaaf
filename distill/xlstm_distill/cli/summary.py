"""The table a run ends with: scores of all models, C_α, α*, worst drop and decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from xlstm_eval.records import LongContext

# At 0 it says whether the student is lossless (at least 0.5; paper). `report.json` has every
# model's rate at these two, whatever the recipe lists.
SHOWN_ALPHAS = (0.0, 0.05)


def summary_table(report: Mapping[str, Any]) -> Table:
    """Lay out report.json: a row per task, then mean, C_α, α*, worst drop and decision.

    A column per model; the merged student comes first.
    """
    from rich import box
    from rich.table import Table

    models = report["models"]
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("task")
    for name in ("teacher", *(model["name"] for model in models)):
        table.add_column(name, justify="right")
    for row in summary_rows(report):
        table.add_row(*row[:-1], end_section=row[-1])
    return table


def summary_rows(report: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return the table's cells row by row; the last item tells whether a section ends."""
    models, teacher = report["models"], report["teacher"]["scores"]
    tasks = list(teacher)
    rows: list[tuple[Any, ...]] = []
    for task in tasks:
        cells = [_score(teacher[task]), *(_score(model["scores"][task]) for model in models)]
        rows.append((task, *cells, task == tasks[-1]))
    rows.append(
        (
            "mean",
            _mean(teacher.values()),
            *(_mean(model["scores"].values()) for model in models),
            False,
        )
    )
    for alpha in SHOWN_ALPHAS:
        rates = [f"{model['win_and_tie'][str(alpha)]:.2f}" for model in models]
        rows.append((f"C at α = {alpha:g}", "", *rates, False))
    rows.append(("α*", "", *(f"{model['critical_tolerance']:.3f}" for model in models), False))
    # The paper's metric is never shown alone: half of the tasks may hide the other half.
    rows.append(("worst drop", "", *(f"{model['worst_drop']:.3f}" for model in models), False))
    rows.append(("decision", "", *(model["decision"] for model in models), False))
    return rows


def _score(value: float) -> str:
    return f"{value:.3f}"


def _mean(values: Sequence[float] | Any) -> str:
    scores = list(values)
    return _score(sum(scores) / len(scores))


def long_context_table(found: LongContext) -> Table:
    """Lay out long-context results: a row per kind and length, then per range of positions."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("needles", "tokens", "right", "of", "95 %"):
        table.add_column(name, justify="left" if name == "needles" else "right")
    rows = found.recall_by_length
    for index, row in enumerate(rows):
        low, high = row.interval
        ends = index + 1 == len(rows) or rows[index + 1].kind != row.kind
        table.add_row(
            row.kind,
            f"{row.length_tokens:,}",
            str(row.right),
            str(row.n),
            f"{low:.2f} to {high:.2f}",
            end_section=ends,
        )
    for loss in found.loss_by_position:
        table.add_row("loss at position", f"{loss.start:,} to {loss.to - 1:,}", f"{loss.nll:.3f}")
    return table

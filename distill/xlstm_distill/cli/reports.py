"""Reports of what lies outside a run, or of several runs: parse, check, call, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xlstm_distill.errors import UserError

if TYPE_CHECKING:
    from xlstm_distill.runtime.console import Console

DEFAULT_OUT = Path("report")


def check_usage(sources: Sequence[Path], results: bool, many: bool, of_run: bool) -> None:
    """Refuse a mixture of the ways to call `report`; raises UserError."""
    if (results or many) and of_run:
        raise UserError(
            "--run, --set, --replace: they are for a recipe; leave them out with "
            f"{'--results' if results else 'run directories'}."
        )
    if results and len(sources) < 2:
        raise UserError("--results: give the teacher's results file, then a student's.")
    if not results and not many and len(sources) != 1:
        raise UserError(
            f"report: {len(sources)} sources. Give one recipe, run directories, or results files "
            "of lm-eval with --results."
        )


def report_results(
    files: Sequence[Path], out: Path | None, margin: float | None, console: Console
) -> None:
    """Write the report of stock lm-eval's results files: the teacher's first."""
    from xlstm_eval.metrics import MARGIN
    from xlstm_eval.report.outside import stock_report
    from xlstm_eval.report.page import write_report

    data = stock_report(files, MARGIN if margin is None else margin)
    page = write_report(data, out or DEFAULT_OUT)
    show(page, console)


def show(page: Path, console: Console) -> None:
    """Print what a report says, and where it is."""
    from xlstm_distill.cli.summary import summary_table

    values = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    console.rich().print(summary_table(values))
    for model in values["models"]:
        console.line(f"{model['name']}: {model['sentence']}")
    console.line(f"Report: {page}")

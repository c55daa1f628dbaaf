"""Reports of what lies outside a run, or of several runs: parse, check, call, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xlstm_distill.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from xlstm_distill.runtime.console import Console
    from xlstm_eval.report.entries import Entry

DEFAULT_OUT = Path("report")
OWN_FILES = {"report.html", "report.md", "report.json"}
OWN_COMPARISON = {"compare.html", "compare.md", "compare.json"}


def check_usage(
    sources: Sequence[Path],
    results: bool,
    many: bool,
    *,
    recipe_options: bool,
    page_options: bool,
    item_option: bool,
) -> None:
    """Refuse a mixture of the ways to call `report`; raises UserError."""
    if (results or many) and recipe_options:
        raise UserError(
            "--run, --set, --full, --replace: they are for a recipe; leave them out with "
            f"{'--results' if results else 'run directories'}."
        )
    if item_option and not results:
        raise UserError(
            "--items: it is for --results. A run's report has the recipe's report.items (--set)."
        )
    if results:
        if len(sources) < 2:
            raise UserError("--results: give the teacher's results file, then a student's.")
        return
    if many:
        files = [str(path) for path in sources if not path.is_dir()]
        if files:
            raise UserError(f"{files[0]}: no run directory. Give run directories alone.")
        return
    if len(sources) != 1:
        raise UserError(
            f"report: {len(sources)} sources. Give one recipe, run directories, or results files "
            "of lm-eval with --results."
        )
    if page_options:
        raise UserError(
            "--out, --margin: a recipe's report lies in its run, with the recipe's report.margin; "
            "use --run and --set."
        )


def report_results(
    files: Sequence[Path],
    out: Path | None,
    margin: float | None,
    items: int | None,
    console: Console,
) -> None:
    """Write the report of stock lm-eval's results files: the teacher's first."""
    from xlstm_eval.metrics import MARGIN
    from xlstm_eval.report.items import MOST_ITEMS
    from xlstm_eval.report.outside import stock_report
    from xlstm_eval.report.page import write_report

    target = _checked_out(out, OWN_FILES)
    most = MOST_ITEMS if items is None else items
    data = stock_report(files, MARGIN if margin is None else margin, most)
    show(write_report(data, target), console)
    if data.no_items:
        console.line(data.no_items)


def report_runs(
    runs: Sequence[Path], published: bool, out: Path | None, margin: float | None, console: Console
) -> None:
    """Write a page that sets the students of runs, and published rows, side by side."""
    target = _checked_out(out, OWN_COMPARISON)
    console.line(f"comparing {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    from xlstm_eval.report.many import write_many

    entries = []
    if runs:
        from xlstm_distill.stages.measuring.compare import read_entries

        entries += read_entries(runs, margin)
    if published:
        from xlstm_eval.report.published import published_entries

        entries += published_entries()
    page = write_many(f"{len(entries)} students", entries, target)
    console.rich().print(comparison_table(entries))
    console.line(f"Report: {page}")


def _checked_out(out: Path | None, own: set[str]) -> Path:
    """Return the folder to write; raises UserError where it holds files of others."""
    target = out or DEFAULT_OUT
    if target.exists() and not target.is_dir():
        raise UserError(f"--out: {target} is a file; give a folder.")
    # The folder is replaced as a whole: nobody's files may be in it.
    others = sorted({path.name for path in target.iterdir()} - own) if target.is_dir() else []
    if others:
        raise UserError(f"--out: {target} holds other files ({others[0]}); give a new folder.")
    return target


def comparison_table(entries: Sequence[Entry]) -> Table:
    """Lay out students: decision, kept, worst drop, then the paper's metric."""
    from rich import box
    from rich.table import Table

    from xlstm_eval.score import ends, percent

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("student")
    for name in ("decision", "kept", "worst drop", "α*", "α* .75", "C(0)", "lossless"):
        table.add_column(name, justify="right")
    for entry in entries:
        result, found = entry.comparison, entry.comparison.statistics
        assert found is not None
        kept = "-" if found.reason else percent(found.pooled.kept)
        table.add_row(
            entry.name,
            "-" if entry.source else found.pooled.decision,
            f"{kept}{ends(found.pooled.kept_interval, 100)}",
            f"{percent(result.worst_drop)}{ends(found.worst_drop, 100)}",
            f"{result.critical_tolerance:.3f}{ends(found.critical_tolerance)}",
            f"{result.critical_tolerance_75:.3f}",
            f"{result.win_and_tie['0.0']:.2f}",
            "yes" if result.lossless else "no",
        )
    return table


def show(page: Path, console: Console) -> None:
    """Print what a report says, and where it is."""
    from xlstm_distill.cli.summary import summary_table

    values = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    console.rich().print(summary_table(values))
    for model in values["models"]:
        console.line(f"{model['name']}: {model['sentence']}")
    console.line(f"Report: {page}")

"""The jobs of a run as a table, and as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xlstm_distill.jobs.graph import array_words
from xlstm_distill.jobs.progress import TaskStatus
from xlstm_distill.jobs.submission import Plan
from xlstm_distill.runtime.console import clock_time, short

if TYPE_CHECKING:
    from rich.table import Table


def tasks_json(tasks: Sequence[TaskStatus]) -> list[dict[str, Any]]:
    """Return the indices of all jobs as JSON values, facts that do not apply left out."""
    found: list[dict[str, Any]] = []
    for task in tasks:
        found.append({key: value for key, value in asdict(task).items() if value is not None})
    return found


def tasks_table(tasks: Sequence[TaskStatus]) -> Table:
    """Lay out where the indices of all jobs stand, a row for each."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("job", "index", "for", "state", "Slurm id", "node", "tokens/s", "left"):
        right = name in ("index", "Slurm id", "tokens/s", "left")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "state")
    for task in tasks:
        # As text: a line of a log may hold brackets, which are no markup.
        table.add_row(*map(Text, _cells(task)))
    return table


def _cells(task: TaskStatus) -> tuple[str, ...]:
    return (
        task.job,
        "" if task.index is None else str(task.index),
        task.name,
        _state_in_words(task),
        "" if task.id is None else str(task.id),
        task.nodes or "",
        short(task.tokens_per_second) if task.tokens_per_second else "",
        clock_time(task.seconds_left) if task.seconds_left is not None else "",
    )


def _state_in_words(task: TaskStatus) -> str:
    words = "to be submitted" if task.state == "missing" else task.state
    if task.requeues:
        words += f" ({task.requeues + 1}. start)" if task.state == "running" else ""
        words += f" ({task.requeues} before)" if task.state == "requeued" else ""
    # `None` is what squeue says of a job that it will start at its next look.
    why = task.why if task.why not in (None, "None") else None
    return words if why is None else f"{words}: {why}"


def plan_json(plan: Plan) -> list[dict[str, Any]]:
    """Return the jobs of a plan as JSON values: what `jobs.json` has, and what is missing."""
    found: list[dict[str, Any]] = []
    for job in plan.book.jobs:
        missing = plan.missing[job.name]
        found.append(
            {
                "name": job.name,
                "script": str(plan.book.folder.script(job.name)),
                "depends_on": list(job.depends_on),
                "tasks": len(job.tasks),
                "missing": [task.index for task in missing] if job.is_array else bool(missing),
            }
        )
    return found


def plan_table(plan: Plan) -> Table:
    """Lay out the jobs of a plan."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("job", "tasks", "to submit", "after", "script"):
        table.add_column(name, no_wrap=True)
    run = plan.book.folder.run
    for job in plan.book.jobs:
        script = plan.book.folder.script(job.name).relative_to(run)
        cells = (
            job.name,
            str(len(job.tasks)),
            _to_submit(plan, job.name),
            ", ".join(job.depends_on),
        )
        table.add_row(*map(Text, (*cells, str(script))))
    return table


def _to_submit(plan: Plan, name: str) -> str:
    missing = plan.missing[name]
    if not missing:
        return "nothing"
    indices = [task.index for task in missing if task.index is not None]
    return array_words(indices, None) if indices else "it"

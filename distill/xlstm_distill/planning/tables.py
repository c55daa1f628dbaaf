"""A plan as tables for people (at most 100 columns) and as JSON for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xlstm_distill.runtime.console import short

if TYPE_CHECKING:
    from rich.table import Table

    from xlstm_distill.planning.memory import Memory
    from xlstm_distill.planning.plan import Plan, StagePlan
    from xlstm_distill.runtime.console import Console

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser states",
    "working_copies": "working copies",
    "activations": "activations",
    "loss": "logits and loss",
    "teacher": "teacher",
    "cache": "decoding cache",
    "reserve": "reserve",
}
Rows = list[list[str]]
WIDTH = 100
"""Columns that a plan takes at most."""


def to_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON; bytes and operations are plain numbers."""
    return {
        "recipe": plan.recipe,
        "teacher": plan.teacher,
        "architecture": asdict(plan.architecture),
        "parameters": asdict(plan.parameters)
        | {"teacher": plan.parameters.teacher, "student": plan.parameters.student},
        "machine": asdict(plan.machine),
        "target_bytes_per_token": {"measured": plan.measured, **plan.target_bytes},
        "stages": [_stage_json(stage) for stage in plan.stages],
        "total": {
            name: _total(plan, name) for name in ("flops", "disk", "hours", "gpu_hours", "cost")
        },
        "fits": not any(stage.fit and not stage.fit.fits for stage in plan.stages),
        "problems": plan.problems,
    }


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    values = asdict(stage)
    del values["fit"]
    memory = stage.memory
    values["memory_per_gpu"] = _memory_json(memory) if memory else None
    values["fits"] = stage.fit.fits if stage.fit else None
    return values


def _memory_json(memory: Memory) -> dict[str, float]:
    return asdict(memory) | {"reserve": memory.reserve, "total": memory.total}


def _total(plan: Plan, name: str) -> float | None:
    values = [getattr(stage, name) for stage in plan.stages]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def show(plan: Plan, console: Console) -> None:
    """Print a plan: rich tables on a terminal, aligned text elsewhere."""
    for line in _heading(plan):
        console.line(line)
    for head, rows in (_stage_rows(plan), _memory_rows(plan)):
        console.line()
        if console.terminal:
            console.rich().print(_table(head, rows))
        else:
            for line in _aligned([head, *rows]):
                console.line(line)
    for line in _notes(plan):
        console.line(line)


def _heading(plan: Plan) -> Iterator[str]:
    m, p = plan.machine, plan.parameters
    checkpointing = "with" if plan.checkpointing else "without"
    yield f"{plan.recipe} on {m.gpus} x {m.gpu.name}"
    yield f"sharding {m.sharding}, {checkpointing} activation checkpointing, {m.backend} kernels"
    yield f"teacher {plan.teacher}: {short(p.teacher)} parameters"
    yield f"student: {short(p.student)} parameters, {short(p.new)} of them new"


def _stage_rows(plan: Plan) -> tuple[list[str], Rows]:
    """A row per stage and expert, then the total."""
    priced = plan.machine.price is not None
    head = ["stage", "tokens", "steps", "FLOPs", "GB per GPU", "disk", "hours", "GPU-hours"] + [
        "cost"
    ] * priced
    rows = []
    for stage in plan.stages:
        memory = stage.memory
        gigabytes = (
            ""
            if memory is None
            else f"{memory.total / 1e9:.1f}" + ("" if stage.fit and stage.fit.fits else " !")
        )
        rows.append([
            stage.label, _count(stage.tokens), _count(stage.steps), _si(stage.flops), gigabytes, _bytes(stage.disk),
            _hours(stage.hours), _hours(stage.gpu_hours),
        ] + [_price(stage.cost)] * priced)  # fmt: skip
    sums = {name: _total(plan, name) for name in ("flops", "disk", "hours", "gpu_hours", "cost")}
    rows.append([
        "total", "", "", _si(sums["flops"]), "", _bytes(sums["disk"] or 0.0), _hours(sums["hours"]),
        _hours(sums["gpu_hours"]),
    ] + [_price(sums["cost"])] * priced)  # fmt: skip
    return head, rows


def _memory_rows(plan: Plan) -> tuple[list[str], Rows]:
    """A row per part of memory, a column per kind of stage; all experts need the same."""
    stages: dict[str, StagePlan] = {}
    for stage in plan.stages:
        if stage.fit:
            stages.setdefault("distill" if stage.stage == "distill" else stage.label, stage)
    columns = {name: _memory_json(stage.memory) for name, stage in stages.items() if stage.memory}
    rows = [
        [title, *(_gigabytes(column[part]) for column in columns.values())]
        for part, title in PARTS.items()
        if any(column[part] for column in columns.values())
    ]
    rows.append(["total", *(f"{column['total'] / 1e9:.1f}" for column in columns.values())])
    return ["GB per GPU", *columns], rows


def _notes(plan: Plan) -> Iterator[str]:
    yield ""
    seen: dict[str, str] = {}
    for stage in plan.stages:
        if stage.utilisation and stage.stage not in seen:
            seen[stage.stage] = f"{stage.utilisation.share:.0%} ({stage.utilisation.reason})"
    if plan.machine.mfu is not None:
        yield f"MFU assumed: {plan.machine.mfu:.0%} in every stage (--mfu)."
    else:
        yield "MFU assumed, before recomputation (--mfu changes it):"
        yield from (f"  {name}: {text}" for name, text in seen.items())
    if any(stage.stage == "capture" for stage in plan.stages):
        source = (
            "measured in the run" if plan.measured else "docs/planning.md; a run's own: --run DIR"
        )
        sizes = sorted({f"{value:.0f}" for value in plan.target_bytes.values()}, key=float)
        yield f"Stored targets: {' or '.join(sizes)} bytes per token ({source})."
    if scratch := max(stage.scratch for stage in plan.stages):
        yield f"While an expert trains, its checkpoints take {_bytes(scratch)} of disk."
    merge = next(stage for stage in plan.stages if stage.stage == "merge")
    yield f"Merge runs on the host, with {_bytes(merge.host_memory or 0.0)} of its memory."
    yield "Not counted: tokenisation, validation, loading, saving, hours of the evaluation."
    yield ""
    if plan.problems:
        yield "As it stands, this does not run:"
        for problem in plan.problems:
            yield from textwrap.wrap(problem, WIDTH, initial_indent="- ", subsequent_indent="  ")
    else:
        yield "Every stage fits."


def _table(head: Sequence[str], rows: Rows) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for n, title in enumerate(head):
        table.add_column(title, justify="left" if n == 0 else "right", no_wrap=True)
    for n, row in enumerate(rows):
        table.add_row(*row, end_section=n == len(rows) - 2)
    return table


def _aligned(rows: Rows) -> Iterator[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _count(value: float | None) -> str:
    return "" if value is None else short(value)


def _hours(value: float | None) -> str:
    if value is None:
        return ""
    if value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _price(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}" if value else ""


def _bytes(value: float) -> str:
    if not value:
        return ""
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def _si(value: float | None) -> str:
    if value is None:
        return ""
    for size, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return short(value)

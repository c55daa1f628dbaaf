"""Show a plan as tables for people (at most 100 columns) and as JSON for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from xlstm_distill.planning.fit import command_line
from xlstm_distill.runtime.console import short

if TYPE_CHECKING:
    from rich.table import Table

    from xlstm_distill.planning.costs import StageCost
    from xlstm_distill.planning.memory import Memory
    from xlstm_distill.planning.plan import CostPlan
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
"""Columns that a plan's text takes at most."""


def to_json(plan: CostPlan) -> dict[str, Any]:
    """Return a plan as JSON; bytes and operations are plain numbers."""
    parameters = plan.parameters
    totals = {
        "teacher": parameters.teacher,
        "student": parameters.student,
        "active": parameters.active,
    }
    return {
        "recipe": plan.recipe,
        "teacher": plan.teacher,
        "architecture": asdict(plan.architecture),
        "parameters": asdict(parameters) | totals,
        "machine": asdict(plan.machine),
        "target_bytes_per_token": {"measured": plan.measured, **plan.target_bytes},
        "decoding": {
            "state_bytes": plan.state_bytes,
            "bytes_per_token": plan.bytes_per_token,
            "teacher_bytes_per_token": plan.teacher_bytes_per_token,
        },
        "stages": [_stage_json(stage) for stage in plan.stages],
        "total": _totals(plan),
        "fits": not any(stage.fit and not stage.fit.fits for stage in plan.stages),
        "problems": plan.problems,
        "smallest_gpus": [{"gpus": count, "gpu": name} for count, name in plan.smallest],
        "changes": None if plan.changes is None else dict(plan.changes),
    }


def _stage_json(stage: StageCost) -> dict[str, Any]:
    # Programs get the text of each problem and the memory's sum, instead of these two.
    values = asdict(replace(stage, fit=None, batch_problem=None))
    del values["fit"], values["batch_problem"]
    values["problems"] = [problem.text for problem in stage.problems]
    values["memory_per_gpu"] = _memory_json(stage.memory) if stage.memory else None
    values["fits"] = stage.fit.fits if stage.fit else None
    return values


def _memory_json(memory: Memory) -> dict[str, float]:
    return asdict(memory) | {"reserve": memory.reserve, "total": memory.total}


def _totals(plan: CostPlan) -> dict[str, float | None]:
    """Sum the stages; None for what no stage knows."""
    sums = {}
    for name in ("flops", "disk", "hours", "gpu_hours", "cost"):
        values = [getattr(stage, name) for stage in plan.stages]
        known = [value for value in values if value is not None]
        sums[name] = sum(known) if known else None
    return sums


def show(plan: CostPlan, console: Console) -> None:
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


def _heading(plan: CostPlan) -> Iterator[str]:
    m, p = plan.machine, plan.parameters
    recomputing = " and ".join(plan.checkpointing) or "no stage"
    yield f"{plan.recipe} on {m.gpus} x {m.gpu.name}"
    yield f"sharding {m.sharding}, activation checkpointing in {recomputing}, {m.backend} kernels"
    active = f", {short(p.active)} of them active for a token" if p.inactive else ""
    yield f"teacher {plan.teacher}: {short(p.teacher)} parameters{active}"
    yield f"student: {short(p.student)} parameters, {short(p.new)} of them new"
    if plan.bytes_per_token:
        yield (
            f"decoding holds {_bytes(plan.state_bytes)} for a sequence and, for kept attention, "
            f"{plan.bytes_per_token:,} bytes a token (teacher: {plan.teacher_bytes_per_token:,})"
        )


def _stage_rows(plan: CostPlan) -> tuple[list[str], Rows]:
    """Return the head, a row per stage and expert, and the total."""
    priced = plan.machine.price is not None
    head = ["stage", "tokens", "steps", "FLOPs", "GB per GPU", "disk", "hours", "GPU-hours"]
    rows = [_stage_row(stage) for stage in plan.stages]
    sums = _totals(plan)
    work, disk = _si(sums["flops"]), _bytes(sums["disk"] or 0.0)
    hours, gpu_hours, cost = (
        _hours(sums["hours"]),
        _hours(sums["gpu_hours"]),
        _price(sums["cost"]),
    )
    rows.append(["total", "", "", work, "", disk, hours, gpu_hours, cost])
    if priced:
        return [*head, "cost"], rows
    return head, [row[:-1] for row in rows]


def _stage_row(stage: StageCost) -> list[str]:
    gigabytes = "" if stage.memory is None else f"{stage.memory.total / 1e9:.1f}"
    if stage.fit and not stage.fit.fits:
        gigabytes += " !"
    return [
        stage.label,
        _count(stage.tokens),
        _count(stage.steps),
        _si(stage.flops),
        gigabytes,
        _bytes(stage.disk),
        _hours(stage.hours),
        _hours(stage.gpu_hours),
        _price(stage.cost),
    ]


def _memory_rows(plan: CostPlan) -> tuple[list[str], Rows]:
    """Return the head and a row per part of memory; a column per kind of stage."""
    columns: dict[str, dict[str, float]] = {}
    for stage in plan.stages:
        if stage.memory:
            # All experts need the same, so they share a column.
            name = stage.stage if stage.stage in ("distill", "refine") else stage.label
            columns.setdefault(name, _memory_json(stage.memory))
    rows = []
    for part, title in PARTS.items():
        values = [column[part] for column in columns.values()]
        if any(values):
            rows.append([title, *map(_gigabytes, values)])
    rows.append(["total", *(f"{column['total'] / 1e9:.1f}" for column in columns.values())])
    return ["GB per GPU", *columns], rows


def _notes(plan: CostPlan) -> Iterator[str]:
    yield ""
    yield from _utilisation_notes(plan)
    yield from _communication_notes(plan)
    if any(stage.stage == "capture" for stage in plan.stages):
        source = "measured in the run"
        if not plan.measured:
            source = "docs/planning.md; a run's own: --run DIR"
        sizes = sorted({f"{value:.0f}" for value in plan.target_bytes.values()}, key=float)
        yield f"Stored targets: {' or '.join(sizes)} bytes per token ({source})."
    if scratch := max(stage.scratch for stage in plan.stages):
        yield f"While an expert trains, its checkpoints take {_bytes(scratch)} of disk."
    merge = next(stage for stage in plan.stages if stage.stage == "merge")
    yield f"Merge runs on the host, with {_bytes(merge.host_memory or 0.0)} of its memory."
    yield from (stage.note for stage in plan.stages if stage.note is not None)
    yield "Not counted: tokenisation, validation, loading, saving, hours of the evaluation."
    yield ""
    yield from _verdict(plan)


def _utilisation_notes(plan: CostPlan) -> Iterator[str]:
    """Say which MFU the hours assume, each kind of stage once."""
    reasons: dict[str, str] = {}
    for stage in plan.stages:
        if stage.utilisation:
            text = f"{stage.utilisation.share:.0%} ({stage.utilisation.reason})"
            reasons.setdefault(stage.stage, text)
    if not reasons:
        yield "Hours are not known: name a GPU with --gpu, beside --gpu-memory."
    elif plan.machine.mfu is not None:
        yield f"MFU assumed: {plan.machine.mfu:.0%} in every stage (--mfu)."
    else:
        yield "MFU assumed, before recomputation (--mfu changes it):"
        yield from (f"  {name}: {text}" for name, text in reasons.items())


def _communication_notes(plan: CostPlan) -> Iterator[str]:
    """Say what a GPU sends in an optimiser step, each kind of stage once, and what that bounds."""
    bounds = {stage.stage: stage.bound for stage in plan.stages if stage.bound is not None}
    sent = {name: bound for name, bound in bounds.items() if bound.traffic.total}
    if not sent:
        return
    yield "Sent by each GPU in an optimiser step (--link, --network, --node change the links):"
    for name, bound in sent.items():
        t = bound.traffic
        parts = {"gathers": t.gathered, "reduce-scatters": t.scattered, "all-reduces": t.reduced}
        words = ", ".join(f"{part} {_bytes(size)}" for part, size in parts.items() if size)
        yield f"  {name}: {words}"
        if bound.communication is None or bound.compute is None:
            continue
        times = f"{bound.communication:.3g} s beside {bound.compute:.3g} s of computing"
        warning = ": BOUND BY COMMUNICATION, hours are for that" if bound.by_communication else ""
        yield f"    {times}{warning}"


def _verdict(plan: CostPlan) -> Iterator[str]:
    """Say whether every stage fits, or what does not and which settings to give."""
    if not plan.problems:
        yield "Every stage fits."
        return
    yield "As it stands, this does not run:"
    for problem in plan.problems:
        yield from _wrapped(problem, "- ")
    if plan.smallest:
        machines = ", or ".join(f"{count} x {name}" for count, name in plan.smallest)
        yield from _wrapped(f"As it is, it fits on {machines}.", "")
    if plan.changes is None:
        yield "No change of settings that was tried makes every stage fit."
    else:
        yield "Every stage fits with:"
        yield from _wrapped(command_line(plan.changes), "  ")


def _wrapped(text: str, start: str) -> list[str]:
    """Wrap a text, without breaking the options in it."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )


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
    if value is None:
        return ""
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


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

"""One training loop for alignment and distillation, on Accelerate."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from xlstm_distill.console import Console
from xlstm_distill.data import Batch, DomainRows, Row, RowSchedule, load_batch
from xlstm_distill.errors import RunError
from xlstm_distill.optim import make_optimizer, make_schedule
from xlstm_distill.recipe import Optimization
from xlstm_distill.tasks import Task

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Stretch:
    """A stretch of training on one mixture of domains, with its peak learning rate."""

    schedule: RowSchedule
    steps: int
    lr: float


@dataclass(frozen=True)
class Plan:
    """What to train on and in what portions: `batch` rows an optimiser step, `micro_batch` at a time."""

    label: str
    stretches: tuple[Stretch, ...]
    batch: int
    micro_batch: int

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return sum(stretch.steps for stretch in self.stretches)

    def rows(self) -> Iterator[list[Row]]:
        """Rows of every step, stretch after stretch."""
        for stretch in self.stretches:
            for step in range(stretch.steps):
                yield stretch.schedule.rows(step, self.batch)

    def peaks(self) -> list[float]:
        """Peak learning rate of every step."""
        return [stretch.lr for stretch in self.stretches for _ in range(stretch.steps)]


def train(
    task: Task,
    optim: Optimization,
    plan: Plan,
    domains: Mapping[str, DomainRows],
    directory: Path,
    console: Console,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Train the task's trainable parameters in place; log every step to `directory/log.jsonl`.

    Losses are averaged over the tokens of the whole optimiser step, on all processes and micro-batches together.
    Returns the last step's figures.

    Raises:
        RunError: the loss or the gradient is not finite, or the processes cannot share the batch evenly.
    """
    if plan.batch % accelerator.num_processes:
        raise RunError(
            f"{plan.label}: batch {plan.batch} cannot be shared by {accelerator.num_processes} processes; "
            "start a number of processes that divides it."
        )
    optimizer = make_optimizer(task.named_parameters(), optim)
    schedule = make_schedule(optimizer, optim, plan.peaks())
    wrapped, optimizer = accelerator.prepare(task, optimizer)
    wrapped.train()
    figures: dict[str, float] = {}
    context = next(iter(domains.values())).context
    with (
        (directory / LOG_FILE).open("w") as log,
        console.progress(plan.label, plan.steps * plan.batch * context) as bar,
    ):
        for step, rows in enumerate(plan.rows()):
            started = time.monotonic()
            batches = _micro_batches(rows, domains, plan, accelerator)
            figures = _step(wrapped, task, batches, optimizer, optim.clip, accelerator, f"{plan.label}: step {step}")
            figures["lr"] = float(schedule.get_last_lr()[0])
            schedule.step()
            figures["tokens_per_second"] = plan.batch * context / (time.monotonic() - started)
            if accelerator.is_main_process:
                log.write(json.dumps({"step": step, **figures}) + "\n")
            bar.update(plan.batch * context, loss=figures["loss"])
    return figures


def _micro_batches(
    rows: list[Row], domains: Mapping[str, DomainRows], plan: Plan, accelerator: Accelerator
) -> list[Batch]:
    """This process's share of a step's rows, in micro-batches."""
    mine = rows[accelerator.process_index :: accelerator.num_processes]
    return [
        load_batch(domains, mine[start : start + plan.micro_batch]).to(accelerator.device)
        for start in range(0, len(mine), plan.micro_batch)
    ]


def _step(
    wrapped: nn.Module,
    task: Task,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    clip: float | None,
    accelerator: Accelerator,
    where: str,
) -> dict[str, float]:
    """One optimiser step; returns its loss parts per token and the gradient norm."""
    counts = torch.tensor([sum(task.count(b) for b in batches)], device=accelerator.device)
    tokens = int(accelerator.reduce(counts, "sum"))
    if tokens == 0:
        raise RunError(f"{where}: none of its rows {_names(batches)} has a supervised token; check the data's labels.")
    totals: dict[str, torch.Tensor] = {}
    for n, batch in enumerate(batches):
        with contextlib.nullcontext() if n == len(batches) - 1 else accelerator.no_sync(wrapped):
            sums = wrapped(batch)
            # Gradients are averaged over processes afterwards; the factor turns that mean back into a sum.
            accelerator.backward(sums.loss * (accelerator.num_processes / tokens))
        for name, value in {"loss": sums.loss.detach(), **sums.parts}.items():
            totals[name] = totals.get(name, 0) + value.float()
    stacked = accelerator.reduce(torch.stack(list(totals.values())), "sum") / tokens
    figures = dict(zip(totals, stacked.tolist(), strict=True))
    norm = accelerator.clip_grad_norm_(wrapped.parameters(), clip if clip is not None else math.inf)
    figures["grad_norm"] = float(norm)
    for name in ("loss", "grad_norm"):
        if not math.isfinite(figures[name]):
            raise RunError(
                f"{where}: {name} is {figures[name]} (rows {_names(batches)}); nothing was published. "
                "Lower lr, or look at these rows."
            )
    optimizer.step()
    optimizer.zero_grad()
    return figures


def _names(batches: Sequence[Batch]) -> str:
    rows = [f"{name}[{index}]" for batch in batches for name, index in batch.rows]
    return ", ".join(rows[:4]) + (", ..." if len(rows) > 4 else "")


@torch.no_grad()
def validate(task: Task, domains: Mapping[str, DomainRows], batch: int, device: torch.device) -> dict[str, float]:
    """Mean loss parts per token over the validation rows of the given domains."""
    names = [(name, index) for name, rows in domains.items() for index in range(rows.validation)]
    totals: dict[str, float] = {}
    tokens = 0
    task.eval()
    for start in range(0, len(names), batch):
        part = load_batch(domains, names[start : start + batch]).to(device)
        sums = task(part)
        tokens += task.count(part)
        for name, value in sums.parts.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    return {name: value / max(tokens, 1) for name, value in totals.items()}

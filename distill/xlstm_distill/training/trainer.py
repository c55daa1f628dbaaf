"""One training loop for alignment and distillation, on Accelerate, that ends the same however often it is cut short."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from xlstm_distill.data.rows import Batch, DomainRows, Row, load_batch
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Optimization, Training
from xlstm_distill.runtime import signals as stopping
from xlstm_distill.runtime.console import Console, QuietConsole
from xlstm_distill.runtime.device import peak_bytes, published_peak
from xlstm_distill.runtime.ranks import all_agree
from xlstm_distill.training.accelerator import clip_gradients, micro_step, prepare
from xlstm_distill.training.checkpoints import Checkpoints
from xlstm_distill.training.log import TrainingLog, training_log
from xlstm_distill.training.non_finite import blame, first_bad_gradient, first_bad_module, row_names
from xlstm_distill.training.objectives import Task
from xlstm_distill.training.optim import learning_rate, make_optimizer
from xlstm_distill.training.state import TrainingState
from xlstm_distill.training.validation import validate

MOST_SKIPS = 10
"""Steps in a row that are skipped, for a loss that is not finite or for want of a supervised token; then it stops."""


@dataclass(frozen=True)
class Stretch:
    """A stretch of training on one mixture of domains, with its peak learning rate."""

    schedule: RowSchedule
    steps: int
    lr: float


@dataclass(frozen=True)
class Plan:
    """What to train on and in what portions: `batch` rows an optimiser step, `micro_batch` at a time.

    `flops_per_token` are the useful operations per token of text, for the model FLOPs utilisation (MFU).
    """

    label: str
    stretches: tuple[Stretch, ...]
    batch: int
    micro_batch: int
    flops_per_token: float | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return sum(stretch.steps for stretch in self.stretches)

    def stretch_of(self, step: int) -> tuple[Stretch, int]:
        """The stretch a step belongs to, and its number there."""
        for stretch in self.stretches:
            if step < stretch.steps:
                return stretch, step
            step -= stretch.steps
        raise IndexError(step)


@dataclass(frozen=True)
class Outcome:
    """Figures of the last step, held-out ones before and after, skipped steps, and the seconds before a restart.

    Figures of steps before a restart and the number of skipped steps are those of the main process's log.
    """

    last: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    skipped_steps: int = 0
    earlier_seconds: float = 0.0


class Trainer:
    """Trains a task's trainable parameters in place.

    Losses are averaged over the tokens of the whole optimiser step, on all processes and micro-batches together. The
    rows and the learning rate of a step are functions of its number, so that a checkpoint holds tensors and a number.
    `directory` keeps checkpoints and the log between two runs of the same training; it is the caller's to see to it
    that there is one at a time (`Run.make` with `together`).

    Raises:
        RunError: the processes cannot share the batch evenly, a loss or gradient is not finite, no token is supervised.
        Stopped: a signal asked for it; a checkpoint was written before.
    """

    def __init__(
        self,
        task: Task,
        optim: Optimization,
        plan: Plan,
        domains: Mapping[str, DomainRows],
        directory: Path,
        accelerator: Accelerator,
        *,
        training: Training | None = None,
        console: Console | None = None,
    ) -> None:
        if plan.batch % accelerator.num_processes:
            raise RunError(
                f"{plan.label}: batch {plan.batch} cannot be shared by {accelerator.num_processes} processes; "
                "start a number of processes that divides it."
            )
        self.training = training or Training()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _refuse_under_deepspeed(plan.label.split("/")[0], optim, self.training)
        self.task, self.optim, self.plan, self.domains, self.directory = (
            task,
            optim,
            plan,
            domains,
            directory,
        )
        self.accelerator = accelerator
        self.console = console or QuietConsole()
        self.tokens_per_step = plan.batch * next(iter(domains.values())).context
        optimizer = make_optimizer(task.named_parameters(), optim)
        self.wrapped, self.optimizer = prepare(
            accelerator, task, optimizer, micro_batch=plan.micro_batch, clip=optim.clip
        )
        self.state = TrainingState(task, self.optimizer)
        self.checkpoints = Checkpoints(directory, self.training.keep_checkpoints)
        self.peak = published_peak(accelerator.device)
        self.skipped = self.mute = 0  # steps in a row, until now
        self.started, self.earlier_seconds = time.monotonic(), 0.0

    def run(self) -> Outcome:
        """Train from the newest checkpoint, or from the start, to the end."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.checkpoints.clean()
        start, before = self._resume()
        before = before or self.validate()
        self.wrapped.train()  # a model that was loaded is in eval mode, which turns activation checkpointing off
        with (
            stopping.deferred(),
            self._log(start) as log,
            self.console.progress(self.plan.label, self.plan.steps * self.tokens_per_step) as bar,
        ):
            bar.skip(start * self.tokens_per_step)
            for step in range(start, self.plan.steps):
                figures, asked = self._timed_step(step)
                if self._due(self.training.validate_steps, step + 1):
                    figures |= {
                        f"held_out_{name}": value for name, value in self.validate().items()
                    }
                if log is not None:
                    log.write(step, figures)
                bar.update(self.tokens_per_step, loss=figures.get("loss", math.nan))
                if asked:
                    self._stop(step, before)
                if self._due(self.training.checkpoint_steps, step + 1, at_end=True):
                    self._save(step + 1, before)
            after = self.validate()
            if not all_agree(not stopping.requested()):
                self._stop(self.plan.steps - 1, before, saved=True)
            last, skipped = (log.last, log.skipped) if log is not None else ({}, 0)
            return Outcome(last, before, after, skipped, self.earlier_seconds)

    def _stop(self, step: int, before: dict[str, float], *, saved: bool = False) -> NoReturn:
        """End after a step, with a checkpoint where the recipe has any."""
        kept = "no checkpoint, as the recipe says"
        if self.training.checkpoint_steps is not None:
            if not saved:
                self._save(step + 1, before)
            kept = "a checkpoint"
        raise stopping.stop(f"after step {step} of {self.plan.label}, with {kept}")

    def _due(self, every: int | None, done: int, *, at_end: bool = False) -> bool:
        """Whether it is time again after so many steps; at the end, always or never."""
        return every is not None and (at_end if done == self.plan.steps else done % every == 0)

    def _resume(self) -> tuple[int, dict[str, float] | None]:
        """Load the newest checkpoint: the step to go on with, and the held-out figures of the start."""
        found = self.checkpoints.latest(self.console.line)
        if found is None:
            return 0, None
        exact = self.state.load(found)
        self.earlier_seconds = found.facts["seconds"]
        self.console.line(
            f"{self.plan.label}: goes on at step {found.step} of {self.plan.steps}"
            + (
                ""
                if exact
                else f"; {found.processes} processes wrote the checkpoint, so not to the last bit as before"
            )
        )
        return found.step, dict(found.facts["before"])

    def _save(self, step: int, before: dict[str, float]) -> None:
        seconds = round(self.earlier_seconds + time.monotonic() - self.started, 3)
        facts = {"before": before, "layout": self.state.layout(), "seconds": seconds}
        self.checkpoints.save(step, self.state.tensors(), facts)

    def _log(self, start: int) -> contextlib.AbstractContextManager[TrainingLog | None]:
        """The main process's log."""
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        header = {
            "steps": self.plan.steps,
            "tokens_per_step": self.tokens_per_step,
            "processes": self.accelerator.num_processes,
            "distributed_type": str(self.accelerator.distributed_type.value),
        }
        return training_log(self.directory, self.plan.label, header, start, self.training.trackers)

    def _timed_step(self, step: int) -> tuple[dict[str, float], bool]:
        """Do a step; returns its figures and whether a process was asked to stop."""
        started = time.monotonic()
        stretch, number = self.plan.stretch_of(step)
        lr = learning_rate(self.optim, self.plan.steps, step, stretch.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        figures, asked = self._step(step, stretch.schedule.rows(number, self.plan.batch))
        figures["lr"] = lr
        figures["tokens_per_second"] = self.tokens_per_step / (time.monotonic() - started)
        figures["peak_memory_gib"] = peak_bytes(self.accelerator.device) / 2**30
        if self.plan.flops_per_token and self.peak:
            rate = figures["tokens_per_second"] / self.accelerator.num_processes
            figures["mfu"] = self.plan.flops_per_token * rate / self.peak[0]
        return figures, asked

    def _micro_batches(self, rows: list[Row]) -> list[Batch]:
        """This process's share of a step's rows, in micro-batches."""
        mine = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        size = self.plan.micro_batch
        return [
            load_batch(self.domains, mine[start : start + size]).to(self.accelerator.device)
            for start in range(0, len(mine), size)
        ]

    def _step(self, step: int, rows: list[Row]) -> tuple[dict[str, float], bool]:
        """One optimiser step; returns its loss parts per token, its gradient norm, and who was asked to stop."""
        accelerator, where = self.accelerator, f"{self.plan.label}: step {step}"
        batches = self._micro_batches(rows)
        counted = [sum(self.task.count(b) for b in batches), int(stopping.requested())]
        tokens, asked = accelerator.reduce(
            torch.tensor(counted, device=accelerator.device), "sum"
        ).tolist()
        if tokens == 0:
            self._nothing_supervised(rows, where)
            return {"skipped": 1.0}, bool(asked)
        self.mute = 0
        figures, losses = self._backward(batches, tokens)
        figures["grad_norm"] = clip_gradients(accelerator, self.wrapped, self.optim.clip)
        if bad := next(
            (name for name in ("loss", "grad_norm") if not math.isfinite(figures[name])), None
        ):
            origin = (
                first_bad_module(self.wrapped, batches)
                if bad == "loss"
                else first_bad_gradient(self.task)
            )
            origin, blamed = blame(origin, losses, batches)
            self._not_finite(
                f"{where}: {bad} is {figures[bad]}, first at {origin or 'the loss'} (rows {row_names(blamed or rows)})"
            )
            figures = {name: value for name, value in figures.items() if math.isfinite(value)} | {
                "skipped": 1.0
            }
        else:
            self.skipped = 0
            self.optimizer.step()
        self.optimizer.zero_grad()
        return figures, bool(asked)

    def _backward(
        self, batches: list[Batch], tokens: int
    ) -> tuple[dict[str, float], list[torch.Tensor]]:
        """Run the micro-batches forward and backward.

        Returns the loss and its parts per token of the whole step, and the sum of each of this process's micro-batches.
        """
        accelerator = self.accelerator
        totals: dict[str, torch.Tensor] = {}
        losses = []
        for n, batch in enumerate(batches):
            with micro_step(accelerator, self.wrapped, last=n == len(batches) - 1):
                sums = self.wrapped(batch)
                # Gradients are averaged over processes afterwards; the factor turns that mean back into a sum.
                accelerator.backward(sums.loss * (accelerator.num_processes / tokens))
            losses.append(sums.loss.detach())
            for name, value in {"loss": losses[-1], **sums.parts}.items():
                totals[name] = totals.get(name, 0) + value.float()
        stacked = accelerator.reduce(torch.stack(list(totals.values())), "sum") / tokens
        return dict(zip(totals, stacked.tolist(), strict=True)), losses

    def _nothing_supervised(self, rows: list[Row], where: str) -> None:
        """Leave out a step that has nothing to train on.

        Raises:
            RunError: too many in a row, or all there are.
        """
        self.mute += 1
        message = f"{where}: none of its rows {row_names(rows)} has a supervised token"
        if self.mute > min(MOST_SKIPS, self.plan.steps - 1):
            again = f", nor has one of the {self.mute - 1} steps before it" if self.mute > 1 else ""
            raise RunError(f"{message}{again}; check the data's labels.")
        self.console.line(f"{message}; the step is skipped")

    def _not_finite(self, message: str) -> None:
        """Stop, or skip the step if the recipe says so.

        Raises:
            RunError: the recipe says stop, or too many steps in a row were skipped.
        """
        self.skipped += 1
        if self.optim.non_finite == "skip" and self.skipped <= MOST_SKIPS:
            self.console.line(f"{message}; the step is skipped")
            return
        again = (
            f"{MOST_SKIPS} steps before it were skipped, so it is not these rows alone. "
            if self.skipped > 1
            else ""
        )
        raise RunError(
            f"{message}; nothing was published, the last checkpoint is kept. {again}Lower lr, look at these rows, or "
            f"set non_finite: skip, which goes on from the checkpoint."
        )

    def validate(self) -> dict[str, float]:
        """Held-out figures of the task as it is now, in no larger portions than training has."""
        rows = min(self.plan.micro_batch, self.plan.batch // self.accelerator.num_processes)
        return validate(self.wrapped, self.task.count, self.domains, rows, self.accelerator)


def _refuse_under_deepspeed(section: str, optim: Optimization, training: Training) -> None:
    """Refuse what DeepSpeed's engine cannot give.

    Raises:
        UserError: names the recipe's key, and what to set.
    """
    if optim.non_finite == "skip":
        raise UserError(
            f"{section}.non_finite: 'skip' cannot be had under DeepSpeed, whose backward pass steps; set it to 'stop'."
        )
    if training.checkpoint_steps is not None:
        raise UserError(
            f"training.checkpoint_steps: {training.checkpoint_steps} cannot be had under DeepSpeed, whose checkpoints "
            "are pickled; set it to null, or launch with FSDP2, which goes on exactly."
        )

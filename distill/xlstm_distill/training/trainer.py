"""One training loop for alignment and distillation, on Accelerate.

It ends in the same weights however often it is cut short and started again.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from xlstm_distill.data.rows import Batch, DomainRows, Row
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime import signals
from xlstm_distill.runtime.arithmetic import arithmetic, differences
from xlstm_distill.runtime.console import Console, QuietConsole
from xlstm_distill.runtime.device import (
    forget_peak,
    keep_freed_memory,
    peak_bytes,
    published_peak,
)
from xlstm_distill.runtime.exchange import Agreed, exchange
from xlstm_distill.runtime.prefetch import Prefetcher
from xlstm_distill.runtime.products import fast_linear_layers
from xlstm_distill.runtime.ranks import gathered
from xlstm_distill.training.accelerator import clip_gradients, micro_step, prepare, running_layout
from xlstm_distill.training.checkpoints import Checkpoint, Checkpoints
from xlstm_distill.training.compilation import compile_parts, kernels_of
from xlstm_distill.training.feed import Feed, StepBatches
from xlstm_distill.training.log import TrainingLog, training_log
from xlstm_distill.training.non_finite import blame, first_bad_gradient, first_bad_module, row_names
from xlstm_distill.training.objectives import Objective
from xlstm_distill.training.optim import learning_rate
from xlstm_distill.training.plan import TrainingPlan, TrainingResult
from xlstm_distill.training.reduction import Reduction
from xlstm_distill.training.skips import Skips
from xlstm_distill.training.state import TrainingState
from xlstm_distill.training.validation import validate


class Trainer:
    """Trains an objective's trainable parameters in place.

    The loss is the mean over the tokens of the whole optimiser step, over all ranks and
    micro-batches. A step's rows and learning rate are functions of its number. So a checkpoint
    holds tensors and a number, and nothing about the position in the data.

    `directory` keeps checkpoints and the log between two runs of the same training. The caller must
    ensure that only one training uses it (`Run.make` with `together` does).

    Raises:
        RunError: the ranks cannot share the batch evenly, a loss or gradient is not finite, or no
            token is supervised.
        Stopped: a signal asked for it; a checkpoint was written before.
    """

    def __init__(
        self,
        objective: Objective,
        plan: TrainingPlan,
        domains: Mapping[str, DomainRows],
        directory: Path,
        accelerator: Accelerator,
        console: Console | None = None,
    ) -> None:
        _refuse_uneven_batch(plan, accelerator.num_processes)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _refuse_under_deepspeed(plan, accelerator.state.deepspeed_plugin.zero_stage)
        self.objective = objective
        self.plan = plan
        self.domains = domains
        self.directory = directory
        self.accelerator = accelerator
        self.console = console or QuietConsole()
        self.context = next(iter(domains.values())).context
        self.tokens_per_step = plan.batch * (plan.row_tokens or self.context)
        self.wrapped, self.optimizer = prepare(
            accelerator,
            objective,
            plan.optim,
            micro_batch=plan.micro_batch,
            clip=plan.optim.clip,
        )
        # `auto` is off, because no compiled step was compared with a plain one on a GPU.
        self.compiled = plan.settings.compile == "on"
        if self.compiled:
            compile_parts(objective)
        self.reduction = Reduction(plan.settings.reduce, self.wrapped, accelerator, self.optimizer)
        self.state = TrainingState(objective, self.optimizer)
        self.feed = Feed(
            plan=plan,
            objective=objective,
            domains=domains,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            device=accelerator.device,
        )
        self.checkpoints = Checkpoints(directory, plan.settings.keep_checkpoints)
        self.skips = Skips(
            self.console.line, tolerant=plan.optim.non_finite == "skip", steps=plan.steps
        )
        self.peak = published_peak(accelerator.device)
        # Of the newest checkpoint, None without one: the same command goes on there.
        self.saved_step: int | None = None
        self.started, self.earlier_seconds = time.monotonic(), 0.0
        # Of all ranks: nodes of a cluster can have different processors.
        computed = {
            "kernels": kernels_of(objective),
            "layers": "compiled" if self.compiled else "plain",
            "layout": str(running_layout(accelerator)),
            "micro_batch": plan.micro_batch or plan.batch // accelerator.num_processes,
            **objective.computed(),
        }
        self.arithmetic = gathered(arithmetic(accelerator.device) | computed)
        self.inexact: list[str] = []

    def run(self) -> TrainingResult:
        """Train from the newest checkpoint, or from the start, to the end."""
        with keep_freed_memory(self.accelerator.device):
            return self._run()

    def _run(self) -> TrainingResult:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.checkpoints.clean()
        start, before = self._resume()
        # Signals still end the command at once here: there is nothing to save yet.
        before = before or self.validate()
        # A loaded model is in eval mode, in which transformers checkpoints no activations.
        self.wrapped.train()
        # Of this process's earlier stages: every rank measures whether gradients fit (`Reduction`).
        forget_peak()
        tokens = self.plan.steps * self.tokens_per_step
        with (
            self._deferred_signals(),
            self._log(start) as log,
            self.feed.ahead(start) as feed,
            self.console.progress(self.plan.label, tokens) as bar,
        ):
            bar.skip(start * self.tokens_per_step)
            read = feed.take(start)
            agreed = exchange(self.accelerator, read.tokens)
            for step in range(start, self.plan.steps):
                if agreed.stop is not None:
                    self._stop(step, before, agreed.stop)
                self.reduction.begin()
                figures, read, agreed = self._step(step, read, agreed.tokens, feed)
                self.reduction.decide(skipped="skipped" in figures)
                if self._is_due(self.plan.settings.validate_steps, step + 1):
                    held_out = self.validate()
                    figures |= {f"held_out_{name}": value for name, value in held_out.items()}
                if log is not None:
                    log.write(step, figures)
                shown = self.objective.shown
                bar.update(self.tokens_per_step, **{shown: figures.get(shown, math.nan)})
                if self._is_due(self.plan.settings.checkpoint_steps, step + 1, at_end=True):
                    self._save(step + 1, before)
            after = self.validate()
            # The last validation can take minutes; a signal in it must not be lost.
            stop = exchange(self.accelerator, 0).stop
            if stop is not None:
                self._stop(self.plan.steps, before, stop)
            last, skipped = (log.last, log.skipped) if log is not None else ({}, 0)
            return TrainingResult(
                last=last,
                before=before,
                after=after,
                skipped_steps=skipped,
                earlier_seconds=self.earlier_seconds,
                inexact=tuple(self.inexact),
                compiled=self.compiled,
            )

    @contextlib.contextmanager
    def _deferred_signals(self) -> Iterator[None]:
        """Leave signals to the loop; a second Ctrl-C names the checkpoint that is there."""
        with signals.deferred():
            try:
                yield
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"Run the same command again: {self.plan.label} goes on at step "
                    f"{self.saved_step or 0} of {self.plan.steps}."
                ) from None

    def _stop(self, step: int, before: dict[str, float], number: signal.Signals) -> NoReturn:
        """End before a step, with a checkpoint where the recipe has any."""
        kept = "no checkpoint (training.checkpoint_steps is null)"
        if self.plan.settings.checkpoint_steps is not None:
            if self.saved_step != step:
                self._save(step, before)
            kept = "a checkpoint"
        # Finished steps, as `status` counts them.
        raise signals.stopped(
            f"after {step} of {self.plan.steps} steps of {self.plan.label}, with {kept}",
            f"to go on at step {self.saved_step or 0} of {self.plan.steps}",
            interrupted=number == signal.SIGINT,
        )

    def _is_due(self, every: int | None, done: int, *, at_end: bool = False) -> bool:
        """Whether something is due after `done` steps; `at_end` decides for the last one."""
        if every is None:
            return False
        return at_end if done == self.plan.steps else done % every == 0

    def _resume(self) -> tuple[int, dict[str, float] | None]:
        """Load the newest checkpoint; returns the next step and the figures before training."""
        found = self.checkpoints.latest(self.console.line)
        if found is None:
            return 0, None
        exact = self.state.load(found)
        self.earlier_seconds = found.facts["seconds"]
        self.saved_step = found.step
        goes_on = f"goes on at step {found.step} of {self.plan.steps}"
        self.reduction.restore(found.facts.get("waits"))
        self.inexact = list(found.facts.get("inexact", []))
        if changes := self._changed_since(found, exact):
            goes_on += f"; {changes}, so the result will differ in the last bits"
            self.inexact.append(f"at step {found.step}: {changes}")
        self.console.line(f"{self.plan.label}: {goes_on}")
        return found.step, dict(found.facts["before"])

    def _changed_since(self, found: Checkpoint, exact: bool) -> str:
        """Say why going on from a checkpoint is not exact to the last bit; empty if it is."""
        changes = differences(found.facts.get("arithmetic", []), self.arithmetic)
        if not exact and not any(change.startswith("layout ") for change in changes):
            # Ranks are not the same ones then, so only their number is sure to have changed.
            changes.insert(0, f"processes {found.processes} -> {self.accelerator.num_processes}")
        if self.reduction.differs(found.facts.get("waits")):
            changes.append("when gradients are reduced (training.reduce)")
        return ", ".join(changes)

    def _save(self, step: int, before: dict[str, float]) -> None:
        """Write a checkpoint from which `step` is the next to do."""
        seconds = round(self.earlier_seconds + time.monotonic() - self.started, 3)
        facts = {
            "before": before,
            "layout": self.state.layout(),
            "replicas": self.state.replicas(),
            "waits": self.reduction.chosen(),
            "seconds": seconds,
            "arithmetic": self.arithmetic,
            "inexact": self.inexact,
        }
        self.checkpoints.save(step, self.state.tensors(), facts)
        self.saved_step = step

    def _log(self, start: int) -> contextlib.AbstractContextManager[TrainingLog | None]:
        """Open the log on the main process; None on the others."""
        if not self.accelerator.is_main_process:
            return contextlib.nullcontext()
        header = {
            "steps": self.plan.steps,
            "tokens_per_step": self.tokens_per_step,
            "processes": self.accelerator.num_processes,
            "distributed_type": str(self.accelerator.distributed_type.value),
        }
        trackers = self.plan.settings.trackers
        return training_log(self.directory, self.plan.label, header, start, trackers)

    def _step(
        self, step: int, read: StepBatches, tokens: int, feed: Prefetcher[StepBatches]
    ) -> tuple[dict[str, float], StepBatches, Agreed]:
        """Do one optimiser step on what was read for it; `tokens` are those of all ranks.

        Returns its figures, and what was read and agreed on for the next step.
        """
        started = time.monotonic()
        stretch, _ = self.plan.stretch_of(step)
        lr = learning_rate(self.plan.optim, self.plan.steps, step, stretch.lr)
        # Set at every step, not by a scheduler, whose state a checkpoint would have to hold.
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        drawn: dict[str, float] = {}
        if self.objective.renews:
            read, tokens, drawn = self.feed.renewed(step, read, self.accelerator)
        figures, following, agreed = self._optimize(step, read, tokens, feed)
        figures |= {"lr": lr, **self.objective.figures_of_renewal(drawn)}
        text = self.tokens_per_step if read.text is None else read.text
        return figures | self._speed(time.monotonic() - started, text), following, agreed

    def _speed(self, seconds: float, text: int) -> dict[str, float]:
        """Return tokens/s of all ranks, this rank's peak memory, and MFU where it is known.

        `text` are the tokens of the step that were there to compute: samples may end early.
        """
        figures = {
            "tokens_per_second": self.tokens_per_step / seconds,
            "peak_memory_gib": peak_bytes(self.accelerator.device) / 2**30,
        }
        if self.plan.flops_per_token and self.peak:
            rate_of_one = text / seconds / self.accelerator.num_processes
            figures["mfu"] = self.plan.flops_per_token * rate_of_one / self.peak[0]
        return figures

    def _optimize(
        self, step: int, read: StepBatches, tokens: int, feed: Prefetcher[StepBatches]
    ) -> tuple[dict[str, float], StepBatches, Agreed]:
        """Update the weights; returns loss parts per token and the gradient's norm, and the rest.

        A step without a supervised token, or with a figure that is not finite, changes no weight.
        """
        where = f"{self.plan.label}: step {step}"
        if tokens == 0:
            self.skips.no_supervised_token(where, row_names(read.rows))
            following = feed.take(step + 1)
            return {"skipped": 1.0}, following, exchange(self.accelerator, following.tokens)
        self.skips.has_tokens()
        totals, losses = self._backward(read.batches, tokens)
        norm = clip_gradients(self.accelerator, self.wrapped, self.plan.optim.clip)
        following = feed.take(step + 1)
        # The host waits for the device here, and nowhere else in a step.
        agreed = exchange(self.accelerator, following.tokens, totals, norm)
        means = {name: value / tokens for name, value in agreed.sums.items()}
        figures = self.objective.figures(means)
        figures["grad_norm"] = cast(float, agreed.norm)
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(figures[name])]
        if bad:
            origin, blamed = self._find_origin(bad[0], losses, read.batches)
            self.skips.bad_figure(
                f"{where}: {bad[0]} is {figures[bad[0]]}, first at {origin or 'the loss'} "
                f"(rows {row_names(blamed or read.rows)})"
            )
            # JSON has no NaN: the log leaves such figures out.
            finite = {name: value for name, value in figures.items() if math.isfinite(value)}
            figures = finite | {"skipped": 1.0}
        else:
            self.skips.is_finite()
            self.optimizer.step()
        # Also after a skipped step: its gradient must not add to that of the next.
        self.optimizer.zero_grad()
        return figures, following, agreed

    def _backward(
        self, batches: list[Batch], tokens: int
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Run the micro-batches forward and backward, without waiting for the device.

        Returns this rank's sums of the loss and its parts, and the loss sum of each micro-batch.
        """
        accelerator = self.accelerator
        totals: dict[str, torch.Tensor] = {}
        losses = []
        for n, batch in enumerate(batches):
            last, wait = n == len(batches) - 1, self.reduction.waits
            with micro_step(accelerator, self.wrapped, last=last, wait=wait), self._products():
                # Moved one by one: the targets of all would take as much of the GPU as they do
                # of the host.
                sums = self.wrapped(batch.to(accelerator.device))
                # Gradients are averaged over ranks afterwards; the factor turns that mean back
                # into a sum.
                accelerator.backward(sums.loss * (accelerator.num_processes / tokens))
            losses.append(sums.loss.detach())
            for name, value in {"loss": losses[-1], **sums.parts}.items():
                totals[name] = totals.get(name, 0) + value.float()
        return totals, losses

    def _products(self) -> contextlib.AbstractContextManager[Any]:
        """Surround a micro-batch, also its backward pass, which may compute layers again."""
        if self.compiled:  # its graphs have products of their own
            return contextlib.nullcontext()
        return fast_linear_layers(self.accelerator.device)

    def _find_origin(
        self, figure: str, losses: list[torch.Tensor], batches: list[Batch]
    ) -> tuple[str | None, list[Row]]:
        """Find the module or parameter where a figure stopped being finite, and the rows."""
        if figure == "loss":
            on_device = [batch.to(self.accelerator.device) for batch in batches]
            origin = first_bad_module(self.wrapped, on_device)
        else:
            origin = first_bad_gradient(self.objective)
        return blame(origin, losses, batches)

    def validate(self) -> dict[str, float]:
        """Return the held-out figures of the objective as it is now."""
        rows = self.plan.validation_rows(self.accelerator.num_processes, self.context)
        return validate(self.wrapped, self.objective, self.domains, rows, self.accelerator)


def _refuse_uneven_batch(plan: TrainingPlan, processes: int) -> None:
    if plan.batch % processes:
        raise RunError(
            f"{plan.label}: batch {plan.batch} cannot be shared by {processes} processes; "
            "start a number of processes that divides it."
        )


def _refuse_under_deepspeed(plan: TrainingPlan, stage: int) -> None:
    """Refuse what DeepSpeed's engine cannot do in a stage of ZeRO.

    Raises:
        UserError: names the recipe's key, and what to set.
    """
    section = plan.label.split("/")[0]
    if plan.optim.non_finite == "skip":
        raise UserError(
            f"{section}.non_finite: 'skip' is impossible under DeepSpeed, whose backward pass "
            "steps the optimiser; set it to 'stop'."
        )
    if section == "align" and plan.optim.activation_checkpointing and stage == 3:
        raise UserError(
            "align.activation_checkpointing: true is impossible under ZeRO-3, which gives up the "
            "gates' parameters before a mixer is computed again; set it to false, or launch with "
            "FSDP2 or ZeRO-2."
        )
    if plan.settings.checkpoint_steps is not None:
        raise UserError(
            f"training.checkpoint_steps: {plan.settings.checkpoint_steps} is impossible under "
            "DeepSpeed, whose checkpoints are pickled; set it to null, or launch with FSDP2, which "
            "goes on exactly."
        )

"""What a training is to do, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.recipe import Optimization, Training


@dataclass(frozen=True)
class Stretch:
    """A stretch of training on one mixture of domains, with its peak learning rate."""

    schedule: RowSchedule
    steps: int
    lr: float


@dataclass(frozen=True)
class TrainingPlan:
    """What a training does with its objective: rows, steps, optimiser, checkpoints.

    `label` is `align` or `distill/EXPERT`. `flops_per_token` are the useful operations per token of
    text, for the model FLOPs utilisation (MFU). `row_tokens` is the length of the rows trained on,
    where it is not that of the domains' rows.
    """

    label: str
    stretches: tuple[Stretch, ...]
    optim: Optimization  # the recipe's align or distill section
    settings: Training  # its training section: checkpoints, validation, trackers
    flops_per_token: float | None = None
    row_tokens: int | None = None

    @property
    def batch(self) -> int:
        """Rows of an optimiser step, over all ranks."""
        return self.optim.batch

    @property
    def micro_batch(self) -> int:
        """Most rows of a forward pass on one rank."""
        return self.optim.micro_batch or self.optim.batch

    @property
    def steps(self) -> int:
        """Optimiser steps of all stretches."""
        return sum(stretch.steps for stretch in self.stretches)

    def validation_rows(self, processes: int, context: int) -> int:
        """Return the most rows (of `context` tokens) of a validation's pass on one of the ranks.

        They have no more tokens than in training, so that validation needs no more memory; but one
        row always is.
        """
        rows = min(self.micro_batch, self.batch // processes)
        return max(1, rows * (self.row_tokens or context) // context)

    def stretch_of(self, step: int) -> tuple[Stretch, int]:
        """Return the stretch a step belongs to, and the step's number in it."""
        for stretch in self.stretches:
            if step < stretch.steps:
                return stretch, step
            step -= stretch.steps
        raise IndexError(step)


@dataclass(frozen=True)
class TrainingResult:
    """Figures of the last step, held-out figures before and after, skipped steps, earlier seconds.

    `last` and `skipped_steps` come from the main process's log, so they include steps before a
    restart; other ranks have none. `earlier_seconds` is the time spent before the last restart.
    `inexact` names every restart after which the last bits are not those of an uninterrupted run.
    """

    last: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    skipped_steps: int = 0
    earlier_seconds: float = 0.0
    inexact: tuple[str, ...] = ()
    compiled: bool = False

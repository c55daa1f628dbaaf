"""What a training reads: the batches of each step, made one step ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from xlstm_distill.data.rows import Batch, DomainRows, Row
from xlstm_distill.runtime.prefetch import Prefetcher
from xlstm_distill.training.objectives import Objective
from xlstm_distill.training.plan import TrainingPlan


@dataclass(frozen=True)
class StepBatches:
    """A step's batches on the host, before the step.

    `rows` are those of all ranks. `batches` are this rank's micro-batches, in pinned memory where
    the device is a GPU, and `tokens` counts what the loss is averaged over in them. `text` counts
    the tokens of all ranks' rows without padding, where rows are shorter than the plan has them.
    """

    rows: list[Row]
    batches: list[Batch]
    tokens: int
    text: int | None = None


@dataclass(frozen=True)
class Feed:
    """Makes the batches of any step: a pure function of the step's number."""

    plan: TrainingPlan
    objective: Objective
    domains: Mapping[str, DomainRows]
    rank: int
    ranks: int
    device: torch.device

    def step(self, number: int) -> StepBatches:
        """Load a step's rows of this rank, with the stored targets that the objective reads.

        There are none after the last step.

        Raises:
            RunError: a row or its targets are missing, damaged, or of another text.
        """
        if number == self.plan.steps:
            return StepBatches([], [], 0)
        stretch, place = self.plan.stretch_of(number)
        rows = stretch.schedule.rows(place, self.plan.batch)
        mine, places = rows[self.rank :: self.ranks], self.numbers(number)
        size = self.plan.micro_batch
        batches = []
        for start in range(0, len(mine), size):
            part = slice(start, start + size)
            batch = self.objective.read(self.domains, mine[part], places[part])
            # Pinned, so that the copy to the GPU runs beside its work and not between.
            batches.append(batch.pinned() if self.device.type == "cuda" else batch)
        tokens = sum(self.objective.count(batch) for batch in batches)
        return StepBatches(rows, batches, tokens)

    def numbers(self, step: int) -> range:
        """Return the places in the training of this rank's rows of a step."""
        first = step * self.plan.batch
        return range(first + self.rank, first + self.plan.batch, self.ranks)

    def renewed(
        self, step: int, read: StepBatches, accelerator: Accelerator
    ) -> tuple[StepBatches, int, dict[str, float]]:
        """Return a step's batches as the objective renews them, just before the step.

        Also their tokens over all ranks, and the figures. Waits for the device once more than
        other trainings do: nobody can know the tokens before.
        """
        batches, sums = self.objective.renew(self.domains, read.batches, self.numbers(step))
        if self.device.type == "cuda":
            batches = [batch.pinned() for batch in batches]
        mine = sum(self.objective.count(batch) for batch in batches)
        text = sum(batch.tokens for batch in batches)
        told = torch.tensor([mine, text, *sums.values()], dtype=torch.float64, device=self.device)
        tokens, text, *totals = accelerator.reduce(told, "sum").tolist()
        figures = dict(zip(sums, totals, strict=True))
        return StepBatches(read.rows, batches, mine, int(text)), int(tokens), figures

    def ahead(self, first: int) -> Prefetcher[StepBatches]:
        """Make the steps from `first` on in a thread, one ahead of the training.

        At the end of a step, a rank's batches of three steps lie in host memory. For 8 rows of 4096
        tokens with 256 ids each that is 3 x 102 MB.
        """
        # The ranks tell each other a step's tokens one step before: so there is one after the last.
        return Prefetcher(self.step, first, self.plan.steps + 1)

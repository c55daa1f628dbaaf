"""When FSDP2 reduces gradients over the ranks: after every micro-batch, or after a step's last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from xlstm_distill.runtime.device import peak_bytes, usable_bytes

FP32 = 4
MARGIN = 0.9
"""Share of the memory that may be planned with: the allocator cannot use all of the rest."""
Measure = Callable[[torch.device], tuple[int, int]]


class Reduction:
    """Whether micro-batches before the last of a step leave their gradients whole on every rank.

    To wait saves a reduce-scatter of all gradients for each of them, and takes 4 bytes a trained
    parameter. `auto` measures: the first steps reduce at every micro-batch, and if their peak and
    the whole gradients fit together on every rank, later steps wait. The peak counts once a step
    has begun with the optimiser's moments, which the first update makes. Sums round differently
    when gradients wait, so a checkpoint keeps the choice. On a CPU, `auto` never waits.

    Only FSDP2 has the choice: DDP holds whole gradients anyway, DeepSpeed reduces as it does.
    """

    def __init__(
        self,
        choice: Literal["auto", "every", "last"],
        wrapped: nn.Module,
        accelerator: Accelerator,
        optimizer: torch.optim.Optimizer,
        measure: Measure | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.measure = measure or _measured
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        # A sharded parameter's numel is that of the whole one.
        self.whole_bytes = FP32 * sum(p.numel() for p in trained)
        self.waits = choice == "last"
        self.sharded = isinstance(wrapped, FSDPModule)
        measurable = measure is not None or accelerator.device.type == "cuda"
        self.undecided = choice == "auto" and self.sharded and measurable
        self.counts = False

    def begin(self) -> None:
        """Note before a step whether the optimiser's moments are there, so that its peak counts."""
        # A resumed training has them at once, so it decides at the step it would have decided at.
        self.counts = self.undecided and bool(self.optimizer.state)

    def decide(self, *, skipped: bool) -> None:
        """Choose after a step whose peak counts, where that is still to be done.

        A skipped step does not count. All ranks must call this.
        """
        if not self.undecided or not self.counts or skipped:
            return
        peak, usable = self.measure(self.accelerator.device)
        fits = torch.tensor(int(peak + self.whole_bytes <= MARGIN * usable))
        # Ranks must agree, as a reduction is collective: the fullest one decides.
        agreed = self.accelerator.reduce(fits.to(self.accelerator.device), "sum")
        self.waits = int(agreed) == self.accelerator.num_processes
        self.undecided = False

    def restore(self, waits: bool | None) -> None:
        """Take over what a checkpoint's training had chosen; None if it had not yet."""
        if self.undecided and waits is not None:
            self.waits, self.undecided = waits, False

    def differs(self, waited: bool | None) -> bool:
        """Whether a checkpoint's training reduced at other times, so that sums round otherwise."""
        return self.sharded and waited is not None and waited != self.chosen()

    def chosen(self) -> bool | None:
        """Return what a checkpoint keeps."""
        return None if self.undecided else self.waits


def _measured(device: torch.device) -> tuple[int, int]:
    return peak_bytes(device), usable_bytes(device)

"""What ranks tell each other once a step: figures, the next step's tokens, signals.

All of it goes through one reduction, and the host reads the device once. Each further read would
leave the device without work until the host has launched the next kernels.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from xlstm_distill.runtime import signals


@dataclass(frozen=True)
class Agreed:
    """What all ranks know after an exchange.

    sums: the figures, summed over ranks. norm: of the gradient; None where none was given. tokens:
    of the next step, over all ranks. stop: the signal to stop for before the next step.
    """

    sums: dict[str, float]
    norm: float | None
    tokens: int
    stop: signal.Signals | None


def exchange(
    accelerator: Accelerator,
    tokens: int,
    sums: Mapping[str, Tensor] | None = None,
    norm: Tensor | None = None,
) -> Agreed:
    """Sum this rank's scalars over ranks and agree on a signal; waits for the device, once.

    `tokens` are this rank's of the next step. `norm` is the same on all ranks. One rank that got a
    signal stops all; SIGTERM stands for any signal of a scheduler, which outweighs Ctrl-C.
    """
    sums = sums or {}
    pending = signals.pending()
    mine = [tokens, int(pending in signals.SIGNALS), int(pending == signal.SIGINT)]
    # Filled on the device: a copy from the host's memory would wait. In float64 counts are exact.
    fill = {"dtype": torch.float64, "device": accelerator.device}
    counts = [torch.full((), number, **fill) for number in mine]
    told = torch.stack([*counts, *(value.double() for value in sums.values())])
    heard: Tensor = accelerator.reduce(told, "sum")
    if norm is not None:
        heard = torch.cat([heard, norm.double().reshape(1)])
    total, terms, interrupts, *figures = heard.tolist()
    read_norm = figures.pop() if norm is not None else None
    stop = signal.SIGINT if interrupts else None
    return Agreed(
        sums=dict(zip(sums, figures, strict=True)),
        norm=read_norm,
        tokens=int(total),
        stop=signal.SIGTERM if terms else stop,
    )

"""Optimiser, parameter groups and learning-rate schedules of both training stages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from xlstm_distill.recipe import Optimization


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: Optimization,
    device: torch.device | None = None,
) -> AdamW:
    """Make fused AdamW over what is trainable; gates, norms and biases do not decay.

    `device` is where the parameters will be when it steps; by default, where they are.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        is_plain = parameter.ndim < 2 or "_gate." in name
        (plain if is_plain else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    # A student waits on the CPU until it is wrapped: its parameters do not tell.
    kinds = {p.device.type for p in decayed + plain} if device is None else {device.type}
    # A CPU's fused step pairs numbers by their places in memory. A gradient's are its parameter's
    # only if that has no gaps.
    paired = all(p.is_contiguous() for p in decayed + plain)
    fused = kinds == {"cuda"} or (kinds == {"cpu"} and paired)
    # None, not False, leaves the choice to torch; False would also rule out its foreach version.
    return AdamW(used, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused or None)


def learning_rate(config: Optimization, steps: int, step: int, peak: float) -> float:
    """Return the learning rate of a step (from 0) of a training of `steps`.

    It rises linearly to `peak`, then stays, or falls linearly or as a cosine. The last step is done
    at `final_lr`. Without `final_lr` the rate reaches 0 one step after the last, since a step at 0
    would train nothing. A single step after the warm-up is done at the peak.
    """
    if step < config.warmup_steps:
        # + 1 twice: the first step is not done at 0, and the peak comes right after the warm-up.
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    final = config.final_lr or 0.0
    falls = steps - config.warmup_steps - (1 if final else 0)
    done = min(1.0, (step - config.warmup_steps) / max(1, falls))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return final + (peak - final) * shape

"""Optimiser, parameter groups and learning-rate schedules of both training stages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW

from xlstm_distill.recipe import Optimization


def make_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: Optimization) -> AdamW:
    """AdamW over the trainable parameters; no weight decay on gates, norms and biases. Fused on CUDA."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (plain if parameter.ndim < 2 or "_gate." in name else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = all(p.device.type == "cuda" for p in decayed + plain)
    return AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=fused or None
    )


def learning_rate(config: Optimization, steps: int, step: int, peak: float) -> float:
    """Learning rate at a step (from 0): linear warm-up to `peak`, then constant, or linear or cosine down.

    The last step is done at `final_lr`. Without one the rate would be zero the step after the last: a step at rate
    zero teaches nothing. A single step after the warm-up is done at the peak.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    final = config.final_lr or 0.0
    falls = steps - config.warmup_steps - (1 if final else 0)
    done = min(1.0, (step - config.warmup_steps) / max(1, falls))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return final + (peak - final) * shape

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
    return AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=fused or None)


def schedule_factor(config: Optimization, steps: int, step: int) -> float:
    """Learning rate at a step (from 0) as a fraction of the peak: linear warm-up, then constant, linear or cosine."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    floor = (config.final_lr or 0.0) / config.lr
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return floor + (1 - floor) * shape

"""Low-rank adapters (LoRA, Hu et al. 2021) on the projections: add them, and merge them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM

ADAPTER = "default"
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_lora(student: CausalLM, rank: int, alpha: int) -> None:
    """Give every projection of the decoder layers an adapter; only these and new parameters train.

    New parameters are those that the mixers have and the teacher has not. A projection computes
    W x + (alpha / rank) B A x with A random and B zero, so the student starts unchanged. It keeps
    its class. Until `merge_lora` its state dict has `base_layer`, `lora_A` and `lora_B`.

    Routers, and the experts they choose, are no linear layers but tensors of all experts at once:
    they get no adapters and stay as they are. A shared expert has linear layers.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError(
            "distill.trainable: 'lora' needs peft; install xlstm-distill[lora]."
        ) from None
    new = [parameter for _, parameter in student.new_parameters()]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=_projections(student),
        lora_dropout=0.0,
        bias="none",
    )
    with _without_memory(student):
        inject_adapter_in_model(config, student, adapter_name=ADAPTER)
    # peft has frozen everything but its adapters.
    for parameter in new:
        parameter.requires_grad_(True)


@contextlib.contextmanager
def _without_memory(student: CausalLM) -> Iterator[None]:
    """Let projections on the meta device be on the CPU for a while, with no memory behind them.

    peft puts adapters where the projection is. They must be drawn on the CPU, as they are for a
    student that is loaded whole, and not be lost on the meta device.
    """
    projections = [student.get_submodule(name) for name in _projections(student)]
    on_meta = [module for module in projections if module.weight.is_meta]
    for module in on_meta:
        stand_in = torch.empty((), dtype=module.weight.dtype).expand(module.weight.shape)
        module.weight = nn.Parameter(stand_in, requires_grad=module.weight.requires_grad)
    yield
    for module in on_meta:
        empty = torch.empty_like(
            module.weight, device="meta", memory_format=torch.contiguous_format
        )
        module.weight = nn.Parameter(empty, requires_grad=module.weight.requires_grad)


def _projections(student: CausalLM) -> list[str]:
    """Return the full names of the plain linear layers inside the decoder layers."""
    named = student.model.layers.named_modules()
    # Not isinstance: a gate is a subclass, and trains in full.
    return [f"model.layers.{name}" for name, module in named if type(module) is nn.Linear]


def merge_lora(student: CausalLM) -> None:
    """Add the adapters to the projections and remove them.

    Modules and names in the state dict are the student's again, and all parameters may train.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(student.named_modules()):
        if isinstance(module, LoraLayer):
            adapted: Any = module
            adapted.merge()
            student.set_submodule(name, adapted.get_base_layer())
    student.requires_grad_(True)


def merged_state(weights: Mapping[str, Tensor], rank: int, alpha: int) -> dict[str, Tensor]:
    """Merge the adapters in a state dict, as `merge_lora` does in a model.

    For weights gathered from several processes, which no model on one of them holds.
    """
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if DOWN in name or UP in name:
            continue
        if BASE not in name:
            merged[name] = value
            continue
        module, leaf = name.split(BASE)
        if leaf == "weight":
            value = value + (alpha / rank) * (weights[module + UP] @ weights[module + DOWN])
        merged[f"{module}.{leaf}"] = value
    return merged

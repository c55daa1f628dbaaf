"""Low-rank adapters (LoRA) on the teacher's projections, and their weights merged back (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM

ADAPTER = "default"
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_lora(student: CausalLM, rank: int, alpha: int) -> None:
    """Give every projection of the decoder layers an adapter; train these and the mixers' new parameters only.

    A projection computes W x + (alpha / rank) B A x, with A random and B zero, so that the student starts unchanged.
    The student keeps its class; until `merge_lora` its state dict names `base_layer` and `lora_A`, `lora_B`.

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
    inject_adapter_in_model(config, student, adapter_name=ADAPTER)
    for parameter in new:
        parameter.requires_grad_(True)


def _projections(student: CausalLM) -> list[str]:
    """Full names of the plain linear layers inside the decoder layers; a gate, a subclass, trains as it is."""
    layers = student.model.layers
    return [
        f"model.layers.{name}"
        for name, module in layers.named_modules()
        if type(module) is nn.Linear
    ]


def merge_lora(student: CausalLM) -> None:
    """Add the adapters into the projections and remove them: modules and state-dict names are the student's again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(student.named_modules()):
        if isinstance(module, LoraLayer):
            merged: Any = module
            merged.merge()
            student.set_submodule(name, merged.get_base_layer())
    student.requires_grad_(True)


def merged_state(weights: Mapping[str, Tensor], rank: int, alpha: int) -> dict[str, Tensor]:
    """Merge the adapters in a state dict: what `merge_lora` does, for weights gathered from several processes."""
    merged: dict[str, Tensor] = {}
    for name, value in weights.items():
        if DOWN in name or UP in name:
            continue
        if BASE in name:
            module, leaf = name.split(BASE)
            if leaf == "weight":
                value = value + (alpha / rank) * (weights[module + UP] @ weights[module + DOWN])
            name = f"{module}.{leaf}"
        merged[name] = value
    return merged

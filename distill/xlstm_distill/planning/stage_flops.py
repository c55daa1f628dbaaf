"""Floating-point operations per token of each stage, from the count of a forward pass (`flops`). Loads no torch.

Rows are taken as one document each: shorter documents see fewer pairs of tokens. A backward pass of a product is one
product for its input and one for its weight; a frozen weight needs the first alone, and constants need neither.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from xlstm_distill.planning.architecture import Architecture, lora_parameters
from xlstm_distill.planning.flops import MixerShape, TokenFlops, attention_flops, token_flops
from xlstm_distill.recipe import MixerConfig


def teacher_flops(a: Architecture, context: int) -> TokenFlops:
    """One forward pass of the teacher, its layers with a window of their own included."""
    pairs = sum(attention_flops(a, context, None if reach is None else min(reach, context)) for reach in a.reaches)
    return replace(token_flops(a, context), mixing=pairs)


def student_flops(a: Architecture, mixer: MixerConfig, context: int) -> TokenFlops:
    """One forward pass of the student."""
    return token_flops(a, context, mixer_shape(a, mixer))


def mixer_shape(a: Architecture, mixer: MixerConfig) -> MixerShape:
    """Sizes of the mixer's branches; 0 for one that it does not have."""
    window, mlstm = "window" in mixer.branches, "mlstm" in mixer.branches
    return MixerShape(
        window=mixer.window if window else 0,
        sinks=mixer.sinks if window else 0,
        features=(mixer.feature_dim or a.head_dim) if mlstm else 0,
        expansion=2 if mixer.feature_map == "hedgehog" else 1,
    )


def distill_flops(
    a: Architecture,
    mixer: MixerConfig,
    context: int,
    trainable: Literal["all", "mixer", "lora"] = "all",
    *,
    lora_rank: int = 0,
    online: bool = False,
) -> float:
    """Forward and backward pass of stage II, the teacher's forward pass included where it runs `online`."""
    f = student_flops(a, mixer, context)
    frozen = {"all": 0.0, "mixer": f.mlp + f.head, "lora": f.projections + f.mlp + f.head}[trainable]
    adapters = 3 * 2 * lora_parameters(a, lora_rank) if trainable == "lora" else 0
    return f.training() - frozen + adapters + (teacher_flops(a, context).forward() if online else 0.0)


def recomputed_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """What activation checkpointing of every layer adds to stage II: their forward pass once more."""
    return student_flops(a, mixer, context).forward(supervised=0)


def align_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """Stage I: the teacher's layers forward, the mixers forward on its inputs, and their new parameters back.

    Queries, keys and values are constants there, so that maps and gates need the gradient of their weights alone, and
    the window branch none. The output projection is not computed.
    """
    f = student_flops(a, mixer, context)
    window = a.layers * attention_flops(a, context, mixer.window, mixer.sinks) if "window" in mixer.branches else 0.0
    inputs = f.projections * (a.heads + 2 * a.groups) / (2 * (a.heads + a.groups))
    return teacher_flops(a, context).forward(supervised=0) + inputs + 2 * f.new + window + 3 * (f.mixing - window)

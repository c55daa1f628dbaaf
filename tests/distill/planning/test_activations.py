"""Saved activations, counted by the planner, against what autograd keeps in a real pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.planning.activations import Pass, layer_saved, mixer_saved, outside_layers
from xlstm_distill.recipe import MixerConfig
from xlstm_distill.stages.workbench import architecture_of
from xlstm_distill.training.objectives import AlignObjective

MIXERS = {
    "softmax": MixerConfig(window=40, sinks=4),
    "hedgehog": MixerConfig(window=16, sinks=4, feature_map="hedgehog", feature_dim=24),
    "mlstm": MixerConfig(window=40, branches=("mlstm",)),
    "window": MixerConfig(window=40, branches=("window",)),
}
SAVED_ERROR = 0.02  # stated in docs/planning.md
ROWS, TOKENS = 2, 200
Make = Callable[..., CausalLM]


def saved_bytes(run: Callable[[], object], models: list[CausalLM]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3"])
def test_saved_activations_of_stage_two(
    tiny_teacher: Make, small_batch: Any, family: str, precision: Any, mixer: MixerConfig
) -> None:
    measured = []
    for layers in (1, 2):
        teacher = tiny_teacher(family, num_hidden_layers=layers)
        student = convert(teacher.bfloat16() if precision == "bf16" else teacher, mixer).train()
        batch = small_batch(ROWS, TOKENS)
        inputs = {
            "input_ids": batch.input_ids,
            "segment_ids": batch.segment_ids,
            "use_cache": False,
        }
        measured.append(saved_bytes(lambda s=student, i=inputs: s(**i), [student]))  # type: ignore[misc]
    a = architecture_of(teacher)
    forward = Pass(ROWS, TOKENS, precision, "torch", "cpu")
    assert layer_saved(a, mixer, forward).bytes(forward) == pytest.approx(
        measured[1] - measured[0], rel=SAVED_ERROR
    )
    outside = 2 * measured[0] - measured[1]
    assert outside_layers(a, forward).bytes(forward) == pytest.approx(outside, rel=SAVED_ERROR)


@pytest.mark.parametrize("mixer", ["softmax", "hedgehog", "mlstm"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_activations_of_stage_one(
    tiny_teacher: Make, small_batch: Any, precision: Any, mixer: str
) -> None:
    measured = []
    for layers in (1, 2):
        teacher = tiny_teacher(num_hidden_layers=layers)
        teacher = teacher.bfloat16() if precision == "bf16" else teacher
        student = convert(teacher, MIXERS[mixer], share_weights=True).train()
        task = AlignObjective(student, teacher)
        measured.append(
            saved_bytes(lambda t=task: t(small_batch(ROWS, TOKENS)), [student, teacher])
        )  # type: ignore[misc]
    a = architecture_of(teacher)
    forward = Pass(ROWS, TOKENS, precision, "torch", "cpu")
    # The pass holds the teacher's heads, and autograd does not.
    heads = forward.compute * a.query_width * ROWS * TOKENS
    expected = measured[1] - measured[0] + heads
    assert mixer_saved(a, MIXERS[mixer], forward).bytes(forward) == pytest.approx(
        expected, rel=SAVED_ERROR
    )

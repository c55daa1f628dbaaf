"""The planner's count of what the Triton operators save, against a pass of a small student."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from xlstm_distill.models import feature_maps
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.planning.activations.passes import Pass
from xlstm_distill.planning.activations.saved import layer_saved
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.recipe import MixerConfig

pytest.importorskip("triton")
ROWS, TOKENS = 2, 32


def saved_bytes(student: CausalLM, ids: torch.Tensor, segments: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(input_ids=ids, segment_ids=segments, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("feature_map", ["softmax", "hedgehog"])
def test_activations_saved_by_the_triton_operators(
    tiny_teacher: Callable[..., CausalLM],
    device: str,
    feature_map: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_maps, "_in_few_passes", lambda device: False)  # as on a GPU
    mixer = MixerConfig(window=16, feature_map=feature_map)
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long, device=device)
    segments = (torch.arange(TOKENS, device=device) >= 20).long().expand(ROWS, -1)
    measured = []
    for layers in (1, 2):
        teacher = tiny_teacher(num_hidden_layers=layers)
        student = convert(teacher, mixer).train().to(device)
        for layer in student.mixers():
            layer.backend = "triton"
        measured.append(saved_bytes(student, ids, segments))
    forward = Pass(ROWS, TOKENS, "fp32", "triton", "cuda")
    architecture = read_architecture(teacher.config.to_dict(), "test")
    planned = layer_saved(architecture, mixer, forward).bytes(forward)
    assert planned == pytest.approx(measured[1] - measured[0], rel=0.02)

"""The mixer against the paper's formula, written out head by head in float64."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_kernels.reference import mlstm_reference, sliding_window_reference
from xlstm_kernels.testing import error_ratio


def stirred(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2", "olmo3"])
def test_mixer_is_equation_11(family, tiny_teacher):
    student = convert(tiny_teacher(family), MixerConfig(window=6, sinks=2))
    mixer = student.mixers()[0]
    for child in ("feature_map_q", "feature_map_k", "input_gate", "forget_gate", "output_gate"):
        stirred(getattr(mixer, child), seed=len(child))
    x = torch.randn(2, 19, 64)
    segments = torch.tensor([[0] * 7 + [1] * 12, [0] * 19])
    positions = torch.arange(19)[None].expand(2, -1)
    rope = student.model.rotary_emb
    embedding = (
        rope(x, positions, student.config.layer_types[0])
        if family == "olmo3"
        else rope(x, positions)
    )
    actual = mixer.mix(x, embedding, segment_ids=segments)

    q, k, v = mixer.project(x)
    gate = mixer.output_gate(q, k, v).double()
    q, k = mixer.family.apply_rotary(q, k, *embedding)
    window = sliding_window_reference(
        q.double(),
        k.double(),
        v.double(),
        window=6,
        sinks=2,
        segment_ids=segments,
        scale=mixer.scale,
    )
    i = (x @ mixer.input_gate.weight.T + mixer.input_gate.bias).transpose(1, 2).double()
    f = (x @ mixer.forget_gate.weight.T + mixer.forget_gate.bias).transpose(1, 2).double()
    memory, _ = mlstm_reference(
        mixer.feature_map_q(q).double(),
        mixer.feature_map_k(k).double(),
        v.double(),
        i,
        f,
        segment_ids=segments,
    )
    expected = (gate * memory + (1 - gate) * window).transpose(1, 2).flatten(2)
    assert error_ratio(actual, expected) < 2e-6

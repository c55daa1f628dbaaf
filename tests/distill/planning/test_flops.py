"""Counts of operations against torch's own counter, brute force and the kernels' benchmark."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xlstm_distill import MixerConfig, convert
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.planning.flops import (
    MixerShape,
    attention_flops,
    mean_keys,
    mlstm_flops,
    token_flops,
)
from xlstm_distill.stages.workbench import architecture_of
from xlstm_kernels.benchmarks.entries import ENTRIES, Shape, work

LLAMA_1B = read_architecture(
    {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "1B",
)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
NEW = ("feature_map_q", "feature_map_k", "input_gate", "forget_gate")


def counted(model, children, tokens=24):
    """Operations per token of the modules of the given names in a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 3 + tokens)[None])
    by_module = counter.get_flop_counts()
    return (
        sum(sum(c.values()) for name, c in by_module.items() if name.split(".")[-1] in children)
        / tokens
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "olmo2"])
def test_products_with_weights_are_those_that_torch_counts(family, tiny_teacher):
    teacher = tiny_teacher(family)
    count = token_flops(architecture_of(teacher), context=24)
    assert counted(teacher, LINEAR) == count.projections + count.mlp + count.head
    student = convert(teacher, MixerConfig(window=8, sinks=2, feature_dim=12))
    assert counted(student, LINEAR) == counted(teacher, LINEAR)
    new = token_flops(architecture_of(student), 24, MixerShape(8, 2, features=12)).new
    output_gate = 2 * (6 * 4 * 16)  # sums of elementwise products, which torch does not count
    assert new == counted(student, NEW) + output_gate


@pytest.mark.parametrize(
    ("context", "window", "sinks"), [(1, 4, 2), (10, 4, 2), (10, 4, 9), (10, 20, 3), (64, 1, 0)]
)
def test_mean_keys_are_those_of_the_mask(context, window, sinks):
    t = torch.arange(context)
    behind = t[:, None] - t
    causal = behind >= 0
    seen = causal & ((behind < window) | (t < sinks))
    assert mean_keys(context, window, sinks) == pytest.approx(
        float(seen.sum(1).float().mean()), rel=1e-6
    )
    assert mean_keys(context) == pytest.approx(float(causal.sum(1).float().mean()), rel=1e-6)


def test_the_mlstm_is_counted_as_in_the_benchmark_of_the_kernels():
    entry = next(e for e in ENTRIES if (e.operator, e.backend) == ("mlstm", "torch"))
    shape = Shape(
        batch=2,
        tokens=100,
        heads=4,
        groups=2,
        key_dim=32,
        value_dim=16,
        window=8,
        sinks=2,
        document=0,
    )
    assert work(entry, shape, 4, backward=False)[0] == 200 * mlstm_flops(4, 32, 16)


def test_a_training_step_is_about_six_operations_per_weight():
    weights = 16 * (2048 * 64 * (2 * 32 + 2 * 8) + 3 * 2048 * 8192) + 2048 * 128256
    count = token_flops(LLAMA_1B, context=4096)
    attention = 16 * attention_flops(LLAMA_1B, 4096)
    assert count.training() == pytest.approx(6 * weights + 3 * attention)
    assert count.training(0.5) == pytest.approx(6 * weights + 3 * attention - 3 * count.head / 2)


def test_branches_of_the_mixer_add_up_and_do_not_grow_with_the_context():
    both = MixerShape(512, 4, 64)
    window, mlstm = MixerShape(512, 4, 0), MixerShape(0, 0, 64)
    parts = [token_flops(LLAMA_1B, 8192, mixer).mixing for mixer in (both, window, mlstm)]
    assert parts[0] == parts[1] + parts[2]
    assert token_flops(LLAMA_1B, 8192, window).new == 0
    assert token_flops(LLAMA_1B, 2**20, both).mixing < 1.1 * parts[0]
    hedgehog = token_flops(LLAMA_1B, 8192, MixerShape(0, 0, 64, expansion=2))
    assert hedgehog.mixing == pytest.approx(16 * mlstm_flops(32, 128, 64))

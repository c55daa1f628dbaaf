"""Counts of operations against torch's own counter, brute force and the kernels' benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.families import FAMILIES, CausalLM
from xlstm_distill.planning.architecture import (
    Architecture,
    count_parameters,
    read_architecture,
)
from xlstm_distill.planning.flops import (
    MixerShape,
    align_flops,
    attention_flops,
    distill_flops,
    mean_keys,
    mlstm_flops,
    student_flops,
    teacher_flops,
    token_flops,
)
from xlstm_distill.stages.workbench import architecture_of
from xlstm_distill.training.objectives import AlignObjective
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
LINEAR += ("c_fc", "c_proj", "gate", "experts", "shared_expert_gate")
MLSTM = MixerConfig(window=40, branches=("mlstm",))
WINDOW = MixerConfig(window=40, branches=("window",))
ROWS, TOKENS = 2, 200
Make = Callable[..., CausalLM]
NEW = ("feature_map_q", "feature_map_k", "input_gate", "forget_gate")


def counted(model, children, tokens=24):
    """Operations per token of the modules of the given names in a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # As in training: with a cache, the gates are one product.
        model(torch.arange(3, 3 + tokens)[None], use_cache=False)
    by_module = counter.get_flop_counts()
    return (
        sum(sum(c.values()) for name, c in by_module.items() if name.split(".")[-1] in children)
        / tokens
    )


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "olmo2", "starcoder2", "mixtral", "qwen2_moe"]
)
def test_products_with_weights_are_those_that_torch_counts(family, tiny_teacher):
    teacher = tiny_teacher(family)
    student = convert(teacher, MixerConfig(window=8, sinks=2, feature_dim=12))
    if FAMILIES[family].experts != "none":
        # Torch's counter does not know the grouped product.
        for model in (teacher, student):
            model.set_experts_implementation("eager")
    count = token_flops(architecture_of(teacher), context=24)
    assert counted(teacher, LINEAR) == count.projections + count.mlp + count.head
    assert counted(student, LINEAR) == counted(teacher, LINEAR)
    new = token_flops(architecture_of(student), 24, MixerShape(8, 2, features=12)).new
    output_gate = 2 * (6 * 4 * 16)  # sums of elementwise products, which torch does not count
    assert new == counted(student, NEW) + output_gate


def test_kept_heads_are_counted_as_the_teachers(facts):
    a = facts("llama-3.1-8b")
    mixers = [MixerConfig(), MixerConfig(attention={"every": 2})]
    mixers.append(MixerConfig(attention={"layers": list(range(a.layers))}))
    plain, half, whole = (student_flops(a, mixer, 4096) for mixer in mixers)
    assert whole == teacher_flops(a, 4096)
    assert half.mixing == pytest.approx((plain.mixing + whole.mixing) / 2)
    assert half.new == plain.new / 2
    # Stage I has nothing to do with what is kept but for the teacher's own pass.
    aligned = [align_flops(a, mixer, 4096) for mixer in mixers]
    assert aligned[2] == teacher_flops(a, 4096).forward(supervised=0)
    assert aligned[1] == pytest.approx((aligned[0] + aligned[2]) / 2)


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


def product_flops(run: Callable[[], object]) -> int:
    """Operations of linear layers, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = {
        str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()
    }
    return sum(counts.get(name, 0) for name in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo3"])
def test_operations_of_linear_layers_are_those_that_torch_counts(
    tiny_teacher: Make, small_batch: Any, family: str
) -> None:
    teacher, mixer = tiny_teacher(family, num_hidden_layers=3), WINDOW
    batch = small_batch(ROWS, TOKENS)
    a, n = architecture_of(teacher), ROWS * TOKENS
    counted = teacher_flops(a, TOKENS)
    linear = counted.forward() - counted.mixing
    assert product_flops(lambda: teacher(batch.input_ids)) == linear * n
    student = convert(teacher, mixer).train()
    pairs = student_flops(a, mixer, TOKENS).mixing
    trained = distill_flops(a, mixer, TOKENS) - 3 * pairs
    assert product_flops(lambda: student(batch.input_ids).logits.sum().backward()) == pytest.approx(
        trained * n
    )
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    frozen = distill_flops(a, mixer, TOKENS, "mixer") - 3 * pairs
    by_torch = product_flops(lambda: student(batch.input_ids).logits.sum().backward())
    # Below the first mixer nothing needs a gradient: its three input products are not computed.
    first = 2 * a.hidden * (a.query_width + 2 * a.key_width) * n
    assert by_torch == pytest.approx(frozen * n - first)


def test_operations_of_alignment_leave_out_what_is_constant(
    tiny_teacher: Make, small_batch: Any
) -> None:
    teacher, mixer = tiny_teacher(num_hidden_layers=3), MLSTM
    a, n = architecture_of(teacher), ROWS * TOKENS
    task = AlignObjective(convert(teacher, mixer, share_weights=True).train(), teacher)
    s, t = student_flops(a, mixer, TOKENS), teacher_flops(a, TOKENS)
    # Feature maps are batched products, which are not among those counted; gates are linear layers.
    maps = 4 * a.heads * a.head_dim**2 * a.layers
    expected = align_flops(a, mixer, TOKENS) - t.mixing - 3 * s.mixing - 2 * maps
    # On a CPU the teacher's pass ends with the last heads: without their projection and the MLP.
    last = teacher.model.layers[-1]
    expected -= 2 * sum(
        p.numel() for m in (last.self_attn.o_proj, last.mlp) for p in m.parameters()
    )
    # The mLSTM is one operator to torch, which does not look inside.
    assert product_flops(lambda: task(small_batch(ROWS, TOKENS)).loss.backward()) == pytest.approx(
        expected * n
    )


def test_a_large_student_costs_about_six_operations_a_parameter_and_token(
    facts: Callable[[str], Architecture],
) -> None:
    a, mixer = facts("llama-3.1-8b"), MixerConfig()
    p = count_parameters(a, mixer)
    ratio = distill_flops(a, mixer, 4096) / (6 * (p.student - p.embedding))
    assert 1.0 < ratio < 1.05  # window and mLSTM add little at 4096 tokens

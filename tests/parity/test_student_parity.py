"""The student is its teacher where it must be, in every family."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.families import FAMILIES
from xlstm_kernels.testing import error_ratio

# One family of each kind; the others, which differ in a fact of the table, are slow tests.
QUICK = ("llama", "qwen2", "qwen3", "olmo2", "olmo3", "cohere2", "phi3", "gemma2", "gemma3_text")
QUICK += ("qwen2_moe", "gpt_oss")
ALL = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in sorted(FAMILIES)]
HYBRID = MixerConfig(window=8, sinks=2)
LAYER_TYPES = ["sliding_attention", "full_attention"]


def ids(batch: int = 2, tokens: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def stir(student: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Give the new parameters random values, so that no part of the mixer is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in student.new_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return student


@pytest.mark.parametrize("family", ALL)
def test_softmax_inside_gives_the_teachers_logits(family, tiny_teacher):
    teacher = tiny_teacher(family)
    student = convert(teacher, MixerConfig(window=48, sinks=0, branches=("window",)))
    with torch.no_grad():
        assert error_ratio(student(ids()).logits, teacher(ids()).logits.double()) < 1e-6


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("olmo3", {"num_hidden_layers": 4, "sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        # Layers without a window have no rotary positions here.
        ("exaone4", {"num_hidden_layers": 4, "sliding_window": 16}),
        ("cohere2", {"num_hidden_layers": 4, "sliding_window": 16}),
        ("ministral", {"sliding_window": 16, "layer_types": LAYER_TYPES}),
        # All layers have one; 48 is that of no layer.
        ("mistral", {"sliding_window": 16}),
        ("phi3", {"sliding_window": 16}),
        ("starcoder2", {"sliding_window": 16}),
        ("mixtral", {"sliding_window": 16}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 16}),
        ("gemma2", {"sliding_window": 16, "layer_types": LAYER_TYPES}),
        ("gpt_oss", {"sliding_window": 16, "layer_types": LAYER_TYPES}),
        # Layers with a window have rotary frequencies of their own.
        ("gemma3_text", {"sliding_window": 16, "layer_types": LAYER_TYPES}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_sees_no_further_than_its_teachers_own_window(family, own, tiny_teacher):
    teacher = tiny_teacher(family, **own)
    student = convert(teacher, MixerConfig(window=48, sinks=0, branches=("window",)))
    by_model = FAMILIES[family].window == "model"
    assert {mixer.window for mixer in student.mixers()} == ({16} if by_model else {16, 48})
    with torch.no_grad():
        expected = teacher(ids()).logits.double()
        assert error_ratio(student(ids()).logits, expected) < 1e-6
        cache = student.new_cache()
        parts = [
            student(part, past_key_values=cache).logits
            for part in ids().split([20, 1, 1, 26], dim=1)
        ]
    assert error_ratio(torch.cat(parts, dim=1), expected) < 3e-6


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
        ("exaone4", {"layer_types": LAYER_TYPES}),
        ("cohere2", {"layer_types": LAYER_TYPES}),
        ("olmo", {"clip_qkv": 0.2}),
        ("gemma3_text", {"query_pre_attn_scalar": 4, "final_logit_softcapping": 3.0}),
        ("gemma2", {"query_pre_attn_scalar": 4, "final_logit_softcapping": 3.0}),
        # Scores are about as large as the bound.
        ("gemma2", {"attn_logit_softcapping": 1.0}),
        ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
        ("granite", {"attention_multiplier": 0.3, "logits_scaling": 7.0}),
        (
            "glm4",
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 100.0,
                    "partial_rotary_factor": 0.25,
                }
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_a_familys_own_stays(family, own, tiny_teacher):
    teacher, plain = tiny_teacher(family, **own), tiny_teacher(family)
    student = convert(teacher, MixerConfig(window=48, sinks=0, branches=("window",)))
    with torch.no_grad():
        expected = teacher(ids()).logits.double()
        assert error_ratio(plain(ids()).logits, expected) > 1e-3  # else the setting does nothing
        assert error_ratio(student(ids()).logits, expected) < 1e-6


@pytest.mark.parametrize("family", ALL)
def test_new_student_is_finite_and_close_to_window_attention(family, tiny_teacher):
    teacher = tiny_teacher(family)
    window_only = convert(teacher, MixerConfig(window=8, sinks=2, branches=("window",)))
    with torch.no_grad():
        student = convert(teacher, HYBRID)(ids()).logits
        closed = convert(teacher, MixerConfig(window=8, sinks=2, output_gate_bias=-30.0))(
            ids()
        ).logits
        window = window_only(ids()).logits.double()
        untouched = convert(teacher, MixerConfig(branches=("mlstm",), window=8, sinks=2))(
            ids()
        ).logits
    assert student.isfinite().all()
    assert error_ratio(closed, window) < 1e-6
    assert error_ratio(student, window) < 0.5 * error_ratio(untouched, window)


@pytest.mark.parametrize("family", ALL)
def test_packed_documents_equal_separate_ones(family, tiny_teacher):
    student = stir(convert(tiny_teacher(family), HYBRID))
    lengths, row = [1, 17, 9, 21], ids(1)
    documents = row[0].split(lengths)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        separate = torch.cat([student(d[None]).logits[0] for d in documents])
        by_segments = student(row, segment_ids=segments).logits[0]
        by_positions = student(row, position_ids=positions).logits[0]
    assert error_ratio(by_segments, separate.double()) < 2e-6
    assert error_ratio(by_positions, separate.double()) < 2e-6


@pytest.mark.parametrize("family", ["llama", "olmo3", "gemma2", "gpt_oss"])
def test_packed_gradients_equal_separate_ones(family, tiny_teacher):
    student = stir(convert(tiny_teacher(family), HYBRID)).train()
    lengths, row = [5, 22, 21], ids(1)
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    weight = torch.randn(48, 97, generator=torch.Generator().manual_seed(0))

    def gradients(logits):
        student.zero_grad()
        (logits * weight).sum().backward()
        return {n: p.grad.clone() for n, p in student.named_parameters()}

    packed = gradients(student(row, segment_ids=segments).logits[0])
    separate = gradients(torch.cat([student(d[None]).logits[0] for d in row[0].split(lengths)]))
    for name, grad in separate.items():
        if name.endswith(
            "input_gate.bias"
        ):  # cancels in the mLSTM's ratio: the true gradient is zero
            scale = separate[name.replace("bias", "weight")].abs().max()
            assert packed[name].abs().max() < 1e-4 * scale
        else:
            assert error_ratio(packed[name], grad.double()) < 1e-5, name


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("where", ["autocast", "fp32 parameters in a bf16 student"])
def test_bf16_computes_nearly_what_fp32_does(family, where, tiny_teacher):
    # All experts are in use: where a router chooses, rounding may make it choose another.
    student = stir(convert(tiny_teacher(family, num_experts_per_tok=8), HYBRID)).train()
    expected = student(ids()).logits
    if where == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(ids()).logits
    else:
        new = {id(parameter) for _, parameter in student.new_parameters()}
        for parameter in student.parameters():
            if id(parameter) not in new:
                parameter.data = parameter.data.bfloat16()
        logits = student(ids()).logits
    logits.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())
    assert error_ratio(logits.float(), expected.double()) < 0.02  # measured: 0.012 to 0.014

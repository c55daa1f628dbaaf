"""The mixer's gates, and the meter that averages them."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.gates import GateMeter, OutputGate, ScalarGate


def stirred(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def test_output_gate_reads_the_heads_own_q_k_v():
    gate = stirred(OutputGate(heads=4, dim=8, bias=0.0))
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    out = gate(q, k, v)
    for head in range(4):
        joined = torch.cat([q[:, head], k[:, head // 2], v[:, head // 2]], -1).double()
        expected = torch.sigmoid(
            joined @ gate.weight[head].reshape(-1).double() + gate.bias[head].double()
        )
        torch.testing.assert_close(out[:, head, :, 0].double(), expected, rtol=1e-5, atol=1e-6)


def test_gates_start_as_configured(tiny_teacher):
    config = MixerConfig(window=6, forget_bias=4.0, output_gate_bias=-1.0)
    mixer = convert(tiny_teacher(), config).mixers()[1]
    x = torch.randn(1, 3, 64)
    assert torch.equal(mixer.forget_gate(x), torch.full((1, 3, 4), 4.0))
    q, k, v = mixer.project(x)
    torch.testing.assert_close(mixer.output_gate(q, k, v), torch.full((1, 4, 3, 1), -1.0).sigmoid())


def test_the_meter_averages_gates_over_real_tokens(tiny_teacher):
    student = convert(tiny_teacher(), MixerConfig(window=6)).eval()
    gates = [stirred(mixer.output_gate, seed) for seed, mixer in enumerate(student.mixers())]
    real = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    seen = []
    handles = [g.register_forward_hook(lambda _, __, out: seen.append(out)) for g in gates]
    with torch.no_grad(), GateMeter(student) as meter:
        meter.expect(real)
        student(torch.arange(3, 17).view(2, 7), attention_mask=real.long())
    for handle in handles:
        handle.remove()
    for means, gate in zip(meter.means(), seen, strict=True):
        by_head = gate[..., 0].transpose(0, 1)[:, real]  # (H, real tokens)
        torch.testing.assert_close(torch.tensor(means), by_head.mean(-1), rtol=1e-5, atol=1e-6)
    expected = 12 * torch.tensor(meter.means()).mean()
    torch.testing.assert_close(meter.total(), expected, rtol=1e-5, atol=1e-4)


def test_scalar_gates_are_linear_layers_with_the_heads_last():
    gate = stirred(ScalarGate(64, 4, 0.0))
    x = torch.randn(2, 5, 64)
    assert torch.equal(gate(x), torch.nn.functional.linear(x, gate.weight, gate.bias))


@pytest.mark.parametrize("tokens", [3, 4])  # 4 is also the number of heads
def test_adapters_on_all_linear_layers_start_as_the_student_and_train(tokens, tiny_teacher):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    student = convert(tiny_teacher(), MixerConfig(window=6)).eval()
    rows = torch.arange(3, 3 + 2 * tokens).view(2, tokens)
    expected = student(rows).logits
    config = peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(student, config)
    gate = adapted.get_base_model().mixers()[0].input_gate
    assert isinstance(gate, peft.tuners.lora.LoraLayer)
    assert torch.equal(adapted(rows).logits, expected)
    with torch.no_grad():
        gate.lora_B["default"].weight.normal_()
    changed = adapted(rows).logits
    assert not torch.equal(changed, expected)
    changed.sum().backward()
    assert gate.lora_A["default"].weight.grad.abs().sum() > 0


def test_heads_that_keep_full_attention_have_no_gate(tiny_teacher):
    attention = {"layers": [1], "heads": {2: [0, 3]}}
    teacher = tiny_teacher(num_hidden_layers=3)
    student = convert(teacher, MixerConfig(window=6, attention=attention)).eval()
    with torch.no_grad(), GateMeter(student) as meter:
        meter.expect(torch.ones(1, 9, dtype=torch.bool))
        student(torch.arange(3, 12)[None])
    first, second, third = meter.means()
    gate = round(torch.tensor(-2.0).sigmoid().item(), 6)
    assert first == pytest.approx([gate] * 4)
    assert second == [None] * 4
    assert [third[0], third[3]] == [None, None]
    assert third[1:3] == pytest.approx([gate] * 2)

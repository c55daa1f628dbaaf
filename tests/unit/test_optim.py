"""Schedules and parameter groups."""

from __future__ import annotations

import pytest

from xlstm_distill import MixerConfig, convert
from xlstm_distill.optim import make_optimizer, schedule_factor
from xlstm_distill.recipe import Align

ALIGN = Align(tokens=100, batch=2, warmup_steps=4)


def test_cosine_warms_up_peaks_and_ends_at_the_final_rate():
    factors = [schedule_factor(ALIGN, 40, s) for s in range(41)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[40] == pytest.approx(1e-5 / 1e-2)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_constant_and_linear():
    constant = ALIGN.model_copy(update={"schedule": "constant", "final_lr": None})
    linear = ALIGN.model_copy(update={"schedule": "linear", "final_lr": None})
    assert schedule_factor(constant, 40, 39) == 1.0
    assert schedule_factor(linear, 40, 22) == pytest.approx(0.5)


def test_gates_norms_and_biases_do_not_decay(tiny_teacher):
    student = convert(tiny_teacher("qwen3"), MixerConfig(window=8))
    optimizer = make_optimizer(student.named_parameters(), ALIGN)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    names = {name for name, p in student.named_parameters() if id(p) in decayed}
    assert any("feature_map_q" in n for n in names)
    assert not [n for n in names if "_gate." in n or "norm" in n or n.endswith("bias")]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(student.parameters()))

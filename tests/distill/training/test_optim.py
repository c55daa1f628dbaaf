"""Schedules and parameter groups."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.recipe import Align
from xlstm_distill.training.optim import learning_rate, make_optimizer
from xlstm_kernels.testing import error_ratio

ALIGN = Align(tokens=100, batch=2, warmup_steps=4)


def rates(settings, steps, peak=ALIGN.lr, **changes):
    return [
        learning_rate(settings.model_copy(update=changes), steps, s, peak) for s in range(steps)
    ]


def test_cosine_warms_up_peaks_and_ends_at_the_final_rate():
    found = rates(ALIGN, 40)
    assert found[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] == ALIGN.final_lr


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [6, 40, 98])
def test_the_last_step_is_done_at_the_final_rate_and_never_at_none(schedule, steps):
    assert rates(ALIGN, steps, schedule=schedule)[-1] == pytest.approx(ALIGN.final_lr)
    for nothing in (None, 0.0):
        assert rates(ALIGN, steps, schedule=schedule, final_lr=nothing)[-1] > 0


def test_the_final_rate_is_that_of_every_phase():
    assert rates(ALIGN, 40, peak=1e-3)[4] == pytest.approx(1e-3)
    assert rates(ALIGN, 40, peak=1e-3)[-1] == pytest.approx(ALIGN.final_lr)


def test_a_single_step_after_the_warm_up_is_done_at_the_peak():
    assert rates(ALIGN, 5)[-1] == ALIGN.lr


def test_constant_and_linear():
    assert rates(ALIGN, 40, schedule="constant", final_lr=None)[-1] == ALIGN.lr
    assert rates(ALIGN, 40, schedule="linear", final_lr=None)[22] == pytest.approx(0.5 * ALIGN.lr)


def test_gates_norms_and_biases_do_not_decay(tiny_teacher):
    student = convert(tiny_teacher("qwen3"), MixerConfig(window=8))
    optimizer = make_optimizer(student.named_parameters(), ALIGN)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    names = {name for name, p in student.named_parameters() if id(p) in decayed}
    assert any("feature_map_q" in n for n in names)
    assert not [n for n in names if "_gate." in n or "norm" in n or n.endswith("bias")]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(student.parameters()))


def test_adamw_is_fused_where_parameters_are_on_one_kind_of_device():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    assert make_optimizer([("weight", weight)], ALIGN).defaults["fused"] is True
    waiting = torch.device("meta")
    assert make_optimizer([("weight", weight)], ALIGN, waiting).defaults["fused"] is None


@pytest.mark.parametrize("gaps", [False, True])
def test_steps_are_those_of_adamw_however_a_parameter_lies_in_memory(gaps):
    """Stage I's smallest gradients, 1e-18, and its eps; by the formula, in float64."""
    generator = torch.Generator().manual_seed(1)
    draw = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator) * 1e-18
    weight = torch.nn.Parameter(draw[0][:, ::2] if gaps else draw[0][:, ::2].contiguous())
    gradient = draw[1][:, ::2]
    optimizer = make_optimizer([("weight", weight)], ALIGN)
    expected, mean, square = weight.detach().double(), 0.0, 0.0
    for step in range(1, 4):
        optimizer.zero_grad()
        (weight * (gradient * step)).sum().backward()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * step * gradient.double()
        square = 0.95 * square + 0.05 * (step * gradient.double()) ** 2
        root = (square / (1 - 0.95**step)).sqrt() + 1e-15
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * mean / (1 - 0.9**step) / root
    assert error_ratio(weight.detach(), expected) < 2e-7

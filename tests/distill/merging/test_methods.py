"""Every method against a float64 reference over whole tensors; files and threads change no bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from xlstm_distill.errors import UserError
from xlstm_distill.merging import streaming
from xlstm_distill.merging.dare import mask
from xlstm_distill.merging.files import NewWeights, SavedWeights
from xlstm_distill.merging.merge import MergePlan, Sources, merge_files
from xlstm_distill.merging.slerp import angle, coefficients, slerp
from xlstm_distill.merging.streaming import blocks_of

# The test's own modules cannot be imported by name: fixtures give folders, torch's files the rest.
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}
PLANS = {
    "linear": MergePlan("linear", WEIGHTS),
    "task_arithmetic": MergePlan("task_arithmetic", WEIGHTS, scale=1.5),
    "ties": MergePlan("ties", WEIGHTS, scale=0.7, density=0.3),
    "dare": MergePlan("dare", WEIGHTS, scale=0.9, density=0.4, seed=7),
    "slerp": MergePlan("slerp", {"a": 0.25, "b": 0.75}),
}


def merged(plan, places, folder) -> dict[str, Tensor]:
    """Merge saved students; read the result with our reader."""
    experts = {name: SavedWeights(places[name]) for name in plan.weights}
    sources = Sources(experts, SavedWeights(places["base"]))
    target = NewWeights(next(iter(experts.values())), folder)
    merge_files(plan, sources, target)
    written = SavedWeights(folder)
    return {
        name: written.read(name).reshape(entry.shape) for name, entry in written.entries.items()
    }


def reference(plan: MergePlan, key: str, students) -> Tensor:
    """The method over a whole tensor, in float64."""
    base = students["base"][key].double()
    diffs = {name: students[name][key].double() - base for name in plan.weights}
    weights = plan.weights
    if plan.method == "linear":
        return sum(weights[name] * students[name][key].double() for name in weights)
    if plan.method == "task_arithmetic":
        return base + plan.scale * sum(weights[name] * diffs[name] for name in weights)
    if plan.method == "dare":
        kept = {name: drawn_mask(plan, name, key, base) * diffs[name] for name in weights}
        return base + plan.scale / plan.density * sum(weights[n] * kept[n] for n in weights)
    if plan.method == "ties":
        for name, diff in diffs.items():
            count = max(1, round(plan.density * diff.numel()))
            cut = diff.float().abs().flatten().topk(count).values.min()
            diffs[name] = torch.where(diff.float().abs() >= cut, diff, 0.0)
        elected = sum(weights[name] * diffs[name] for name in weights).sign()
        agree = {name: (diffs[name].sign() == elected) & (diffs[name] != 0) for name in weights}
        total = sum(weights[name] * diffs[name] * agree[name] for name in weights)
        mass = sum(weights[name] * agree[name].double() for name in weights)
        return base + plan.scale * torch.where(mass > 0, total / mass, 0.0)
    a, b = (students[name][key].double() for name in weights)
    omega = torch.acos((a.flatten() @ b.flatten()) / a.norm() / b.norm())
    if omega < 1e-7 or torch.equal(a, b):
        return a
    share = list(weights.values())[1]
    return (torch.sin((1 - share) * omega) * a + torch.sin(share * omega) * b) / torch.sin(omega)


def drawn_mask(plan: MergePlan, expert: str, key: str, like: Tensor) -> Tensor:
    blocks = blocks_of(key, like.numel())
    parts = [mask(plan.seed, expert, block, plan.density) for block in blocks]
    return torch.cat(parts).reshape(like.shape)


@pytest.mark.parametrize("method", PLANS)
def test_a_method_is_its_formula_whatever_the_files_and_threads(
    method, places, students, tmp_path, monkeypatch
):
    plan = PLANS[method]
    monkeypatch.setattr(streaming, "threads", lambda: 1)
    one = merged(plan, places(1), tmp_path / "one")
    monkeypatch.setattr(streaming, "threads", lambda: 3)
    several = merged(plan, places(2), tmp_path / "several")
    assert set(one) == set(several) == set(students["base"])
    for key, tensor in one.items():
        assert torch.equal(tensor, several[key]), key
        own = students["a"][key]
        assert (tensor.dtype, tensor.shape) == (own.dtype, own.shape)
        if key == "steps":
            continue
        # One rounding: half a unit in the last place, and what float64 adds to it.
        unit = torch.finfo(tensor.dtype).eps
        expected = reference(plan, key, students)
        torch.testing.assert_close(tensor.double(), expected, rtol=0.51 * unit, atol=1e-7 * unit)
    assert torch.equal(one["norm.frozen"], students["base"]["norm.frozen"])


def test_weights_that_are_not_binary_keep_frozen_numbers(places, tmp_path):
    thirds = {"a": 1 / 3, "b": 0.333334, "c": 1 - 1 / 3 - 0.333334 + 9e-7}
    one = merged(MergePlan("linear", thirds), places(1), tmp_path / "thirds")
    base = SavedWeights(places(1)["base"]).read("norm.frozen")
    # Bits and not values: -0.0 equals 0.0.
    assert torch.equal(one["norm.frozen"].view(torch.int32), base.view(torch.int32))


def test_dare_keeps_each_number_with_its_probability_and_anew_for_each_name():
    first, second = blocks_of("w", 2**21)
    kept = mask(0, "a", first, 0.3)
    # Five deviations of a binomial distribution.
    assert abs(kept.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 2**20) ** 0.5
    other_tensor = blocks_of("v", 2**20)[0]
    for other in (
        mask(1, "a", first, 0.3), mask(0, "b", first, 0.3), mask(0, "a", second, 0.3),
        mask(0, "a", other_tensor, 0.3),
    ):  # fmt: skip
        both = (kept & other).double().mean()
        assert abs(both - 0.09) < 5 * (0.09 * 0.91 / 2**20) ** 0.5
    assert mask(0, "a", first, 1.0).all()
    # These numbers are part of what a recipe means: they must stay from version to version.
    packed = np.packbits(kept.numpy()).tobytes()
    assert hashlib.sha256(packed).hexdigest()[:16] == "7c5271994928419f"


def test_slerp_knows_the_angle_of_tensors_that_are_almost_parallel():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1000, generator=generator, dtype=torch.float64)
    across = torch.randn(1000, generator=generator, dtype=torch.float64)
    across -= a * (a @ across) / (a @ a)
    for omega in (1e-7, 1e-4, 0.3, 2.0):
        # Longer by a third: an angle does not depend on lengths.
        b = 4 / 3 * (a + torch.tan(torch.tensor(omega)) * a.norm() / across.norm() * across)
        b = b if omega < 1.57 else -b
        # |a - b| is rounded to 1e-16 of a length here, so Ω² to 1e-16 / Ω of itself.
        assert angle([(a, b)]) == pytest.approx(omega, rel=1e-6 if omega > 1e-5 else 0.5)
    assert angle([(a, 2 * a)]) == pytest.approx(0, abs=1e-7)
    half = slerp(a, across, coefficients(torch.pi / 2, 0.5))
    assert half.norm() ** 2 == pytest.approx(float(a.norm() ** 2 + across.norm() ** 2) / 2)
    assert coefficients(0.5, 0.0) == pytest.approx((1, 0))
    assert coefficients(0.0, 0.3) == (0.7, 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer.f16": None}, r"in layer.f16: 'a' has shape \(3,\) in float16, 'b' has none;"),
        ({"layer.more": torch.ones(2)}, r"in layer.more: 'a' has none, 'b' has shape \(2,\)"),
        ({"layer.f16": torch.ones(4).half()}, r"'a' has shape \(3,\) in float16, 'b' has .*\(4,\)"),
        ({"layer.f16": torch.ones(3)}, r"shape \(3,\) in float16, 'b' has shape \(3,\) in float32"),
        ({"steps": torch.tensor([3, 6])}, "in steps, which holds whole numbers"),
    ],
)
def test_every_tensor_of_every_expert_is_accounted_for(change, message, places, students, tmp_path):
    from safetensors.torch import save_file

    tensors = {key: value for key, value in (students["b"] | change).items() if value is not None}
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    plan = MergePlan("linear", {"a": 0.5, "b": 0.5})
    with pytest.raises(UserError, match=message):
        merged(plan, {**places(1), "b": tmp_path / "b"}, tmp_path / "merged")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", PLANS)
def test_numbers_that_are_not_finite_are_named_by_every_method(
    method, bad, places, students, tmp_path
):
    """A tensor of several blocks, of which the last number is spoiled: also where TIES trims it."""
    from safetensors.torch import save_file

    spoiled = dict(students["b"], **{"layer.big": students["b"]["layer.big"].clone()})
    spoiled["layer.big"][-1] = bad
    (tmp_path / "b").mkdir()
    save_file(spoiled, tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match=r"'b' holds numbers in layer\.big that are not finite"):
        merged(PLANS[method], {**places(1), "b": tmp_path / "b"}, tmp_path / "merged")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (MergePlan("ties", WEIGHTS, density=0.0), r"merge\.density: 0\.0 is not above 0"),
        (MergePlan("dare", WEIGHTS, density=1.5), r"merge\.density: 1\.5 is not above 0"),
        (MergePlan("task_arithmetic", WEIGHTS, scale=float("inf")), r"merge\.scale: inf"),
        (MergePlan("slerp", WEIGHTS), "slerp merges two experts, not 3"),
        (MergePlan("linear", {"a": 0.5, "b": 0.6}), r"they sum to 1\.1, not 1"),
        (MergePlan("linear", {"a": 1.5, "b": -0.5}), r"merge\.weights\.b: -0\.5"),
        (MergePlan("linear", {"a": float("nan"), "b": 1.0}), r"merge\.weights\.a: nan"),
    ],
)
def test_values_that_no_recipe_may_hold_are_refused(plan, message, places, tmp_path):
    with pytest.raises(UserError, match=message):
        merged(plan, places(1), tmp_path / "merged")


def test_a_seed_student_with_other_tensors_is_refused(places, students, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    tensors = {k: v for k, v in students["base"].items() if k != "layer.big"}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match=r"in layer\.big: 'align' has none, 'a' has"):
        merged(PLANS["ties"], {**places(1), "base": tmp_path / "base"}, tmp_path / "merged")

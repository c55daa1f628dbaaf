"""The training loop: the same result however the work is cut, and steps that are left out."""

from __future__ import annotations

import contextlib
import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.recipe import Training
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.runtime.device import forget_peak, peak_bytes
from xlstm_distill.training.accelerator import clip_gradients
from xlstm_distill.training.non_finite import first_bad_gradient
from xlstm_distill.training.objectives import Objective, Sums
from xlstm_distill.training.plan import TrainingPlan
from xlstm_distill.training.trainer import _refuse_under_deepspeed
from xlstm_distill.training.validation import validate
from xlstm_kernels.testing import error_ratio


def read_log(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def start_far_off(mixers) -> None:
    """Mostly mLSTM, which forgets at once: far from the teacher."""
    with torch.no_grad():
        for mixer in mixers:
            mixer.output_gate.bias.fill_(3.0)
            mixer.forget_gate.bias.fill_(-3.0)


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_micro_batches_do_not_change_the_training(
    kind, align_objective, distill_objective, align_settings, trainer, tmp_path
):
    make = align_objective if kind == "align" else distill_objective
    whole, parts = make(), make()
    losses = []
    for objective, name, micro_batch in ((whole, "whole", None), (parts, "parts", 1)):
        optim = align_settings(micro_batch=micro_batch)
        losses.append(trainer(objective, tmp_path / name, optim=optim).run().last["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        # The input gate's bias has no true gradient: Adam amplifies rounding.
        if p.requires_grad and not name.endswith("input_gate.bias"):
            assert error_ratio(p.detach(), q.detach().double()) < 1e-3, name


def test_alignment_trains_the_new_parameters_only_and_lowers_the_error(
    align_objective, trainer, domains, tmp_path
):
    objective = align_objective()
    start_far_off(objective.mixers)
    before = {n: p.detach().clone() for n, p in objective.mixers.named_parameters()}
    result = trainer(objective, tmp_path, steps=30).run()
    assert result.after["relative_error"] < 0.8 * result.before["relative_error"]
    assert result.after == validate(objective, objective, domains, 4, Accelerator(cpu=True))
    parameters = objective.mixers.named_parameters()
    changed = {name for name, p in parameters if not torch.equal(before[name], p)}
    assert changed
    assert all(any(part in name for part in ("feature_map", "_gate")) for name in changed)


@pytest.mark.parametrize("writes", [True, False], ids=["rank-0", "another-rank"])
def test_a_training_measures_its_own_peak_of_memory(
    writes, align_objective, trainer, tmp_path, monkeypatch
):
    """Every rank does: whether gradients wait is decided by all of them."""
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda _: writes))
    training = trainer(align_objective(), tmp_path, steps=1)
    forget_peak()  # of other tests
    before = peak_bytes(torch.device("cpu"))
    # Of the system, not of the heap: a block freed there can stay with the process.
    with mmap.mmap(-1, 256 * 2**20) as ballast:
        for _ in range(256):
            ballast.write(b"x" * 2**20)
        assert peak_bytes(torch.device("cpu")) > before + 200 * 2**20
    training.run()
    assert peak_bytes(torch.device("cpu")) < before + 100 * 2**20


def test_distillation_lowers_the_kl(distill_objective, distill_settings, trainer, tmp_path):
    objective = distill_objective()
    start_far_off(objective.student.mixers())
    objective.weights = LossWeights(cross_entropy=0.0, kl=1.0)
    result = trainer(objective, tmp_path, steps=30, optim=distill_settings()).run()
    assert result.after["kl"] < 0.8 * result.before["kl"]
    assert 0 < result.after["gate"] < result.before["gate"]
    log = read_log(tmp_path)
    assert len(log) == 30
    assert log[-1]["loss"] < log[0]["loss"]
    assert set(log[0]) == {
        "step", "loss", "ce", "kl", "grad_norm", "lr", "tokens_per_second", "peak_memory_gib",
    }  # fmt: skip


def test_a_loss_that_is_not_finite_names_step_and_rows(distill_objective, trainer, tmp_path):
    objective = distill_objective()
    with torch.no_grad():
        objective.student.lm_head.weight[5, 0] = float("nan")
    expected = (
        r"test: step 0: loss is nan, first at student.lm_head \(rows [ab]\[\d+\], "
        ".*nothing was published"
    )
    with pytest.raises(RunError, match=expected):
        trainer(objective, tmp_path).run()


class Mute(Objective):
    """Finds nothing to train on in the batches of some steps."""

    def __init__(self, steps):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.steps, self.counted = steps, -1

    def count(self, batch):
        if not self.training:
            return 1
        self.counted += 1
        return 0 if self.counted in self.steps else 1

    def forward(self, batch):
        return Sums(self.weight.sum(), {})

    def checkpoint_activations(self):
        """Nothing is kept."""


def test_rows_without_a_supervised_token_are_an_error(trainer, tmp_path):
    expected = (
        r"step 3: none of its rows a\[.* has a supervised token, nor has one of the 3 steps "
        "before it; check"
    )
    with pytest.raises(RunError, match=expected):
        trainer(Mute(range(4)), tmp_path).run()
    with pytest.raises(RunError, match=r"step 13: .* nor has one of the 10 steps before it"):
        trainer(Mute(range(3, 20)), tmp_path / "later", steps=20).run()


def test_a_step_without_a_supervised_token_is_left_out_and_said(trainer, tmp_path):
    console = QuietConsole()
    result = trainer(Mute({2, 5}), tmp_path, steps=6, console=console).run()
    assert [line["step"] for line in read_log(tmp_path) if line.get("skipped")] == [2, 5]
    assert (result.skipped_steps, result.last["skipped"]) == (2, 1.0)
    said = [line for line in console.lines if "has a supervised token; the step is skipped" in line]
    assert [line.split(": none")[0] for line in said] == ["test: step 2", "test: step 5"]


def test_memory_is_measured_after_the_second_update(trainer, tmp_path):
    seen = []
    made = trainer(Mute({0, 2}), tmp_path, steps=5)

    def measure(_):
        seen.extend(int(state["step"]) for state in made.optimizer.state.values())
        return 0, 1

    made.reduction.undecided = True
    made.reduction.measure = measure
    made.run()
    assert seen == [2]  # steps 0 and 2 are skipped, and step 1 began without moments


def test_a_resumed_training_trains_in_training_mode_and_keeps_its_last_figures(
    distill_objective, distill_settings, trainer, tmp_path
):
    """What load_student gives is in eval mode, in which transformers checkpoints no activations."""
    modes = []

    def note_mode(module, *_):
        if torch.is_grad_enabled():
            modes.append(module.training)

    def go_on(steps):
        objective = distill_objective()
        objective.student.eval()
        objective.student.model.register_forward_hook(note_mode)
        settings = Training(checkpoint_steps=2, validate_steps=None)
        optim = distill_settings()
        return trainer(objective, tmp_path, steps=steps, optim=optim, settings=settings).run()

    (tmp_path / ".step-00000001.partial").mkdir()
    go_on(2)
    assert [p.name for p in tmp_path.glob("*step-*")] == ["step-00000002"]
    result = go_on(4)
    assert modes == [True] * 4
    again = go_on(4)  # all steps are done
    assert modes == [True] * 4
    assert again.last == result.last
    assert again.last["loss"] > 0


def test_going_on_with_other_threads_is_said_and_kept_for_the_manifest(
    align_objective, trainer, tmp_path
):
    settings = Training(checkpoint_steps=1, validate_steps=None)

    def go_on(steps, threads):
        torch.set_num_threads(threads)
        console = QuietConsole()
        made = trainer(align_objective(), tmp_path, steps=steps, settings=settings, console=console)
        return made.run(), console.lines[0]

    try:
        go_on(1, 1)
        same, said = go_on(2, 1)
        assert (same.inexact, said) == ((), "test: goes on at step 1 of 2")
        other, said = go_on(3, 2)
        change = "threads 1 -> 2"
        assert other.inexact == (f"at step 2: {change}",)
        assert said == (
            f"test: goes on at step 2 of 3; {change}, so the result will differ in the last bits"
        )
        # It stays true of the weights, also where the next restart is exact.
        assert go_on(4, 2)[0].inexact == other.inexact
    finally:
        torch.set_num_threads(1)


def test_going_on_with_other_micro_batches_is_said(
    align_objective, align_settings, trainer, tmp_path
):
    settings = Training(checkpoint_steps=1, validate_steps=None)

    def go_on(steps, micro_batch):
        optim = align_settings(micro_batch=micro_batch)
        return trainer(
            align_objective(), tmp_path, steps=steps, settings=settings, optim=optim
        ).run()

    go_on(1, None)
    assert go_on(2, 4).inexact == ()  # all four rows at once, as before
    assert go_on(3, 2).inexact == ("at step 2: micro_batch 4 -> 2",)


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_mixers_is_refused_under_zero_3(stage, align_settings):
    optim = align_settings(activation_checkpointing=True)
    plan = TrainingPlan("align", (), optim, Training(checkpoint_steps=None))
    with pytest.raises(UserError, match="ZeRO-3") if stage == 3 else contextlib.nullcontext():
        _refuse_under_deepspeed(plan, stage)


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_is_left_to_be_found(value, clip):
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("healthy", "culprit")})
    for parameter in layers.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    layers["culprit"].weight.grad[0, 1] = float(value)
    norm = clip_gradients(Accelerator(cpu=True), layers, clip)
    assert not norm.isfinite()
    assert first_bad_gradient(layers) == "culprit.weight"


@pytest.mark.parametrize("clip", [None, 1.0, 1e3])
def test_gradients_are_clipped_as_torch_does(clip):
    mine, theirs = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for layer in (mine, theirs):
        for n, parameter in enumerate(layer.parameters()):
            parameter.grad = torch.full_like(parameter, 3.0 + n)
    norm = clip_gradients(Accelerator(cpu=True), mine, clip)
    limit = float("inf") if clip is None else clip
    assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(("micro_batch", "processes", "rows"), [(None, 2, 3), (2, 1, 2)])
def test_validation_runs_no_more_rows_at_a_time_than_training(
    micro_batch, processes, rows, align_settings, trainer, tmp_path
):
    optim = align_settings(batch=6, micro_batch=micro_batch)
    made = trainer(Mute(()), tmp_path, steps=1, optim=optim)
    assert made.plan.validation_rows(processes, made.context) == rows
    # Rows of the context are longer than those trained on: fewer, but one always is read.
    short = replace(made.plan, row_tokens=made.context // 2)
    assert short.validation_rows(processes, made.context) == max(1, rows // 2)


def poisoned(objective, rows):
    """An objective whose loss is not finite on the given rows."""
    real = objective.targets

    def targets(batch):
        found = real(batch)
        bad = any(row in rows for row in batch.rows)
        return replace(found, log_probs=found.log_probs * float("nan")) if bad else found

    objective.targets = targets
    return objective


def test_a_bad_batch_can_be_skipped_and_the_rest_goes_on(
    distill_objective, distill_settings, stretch, trainer, tmp_path
):
    schedule = stretch(6).schedule
    bad = {row for step in (2, 4) for row in schedule.rows(step, 4)[:1]}
    # The head makes the loss, so it is the first module whose output is not finite.
    expected = (
        r"step 2: loss is nan, first at student.lm_head \(rows .* the last checkpoint is kept"
    )
    with pytest.raises(RunError, match=expected):
        objective = poisoned(distill_objective(), bad)
        trainer(objective, tmp_path / "stop", steps=6, optim=distill_settings()).run()
    objective = poisoned(distill_objective(), bad)
    optim = distill_settings(non_finite="skip")
    result = trainer(objective, tmp_path / "skip", steps=6, optim=optim).run()
    assert result.skipped_steps == 2
    log = read_log(tmp_path / "skip")
    assert [line["step"] for line in log if line.get("skipped")] == [2, 4]
    assert all(torch.isfinite(p).all() for p in objective.parameters())


def test_skipping_ends_where_nothing_is_finite_any_more(
    distill_objective, distill_settings, trainer, tmp_path
):
    objective = distill_objective()
    with torch.no_grad():
        objective.student.lm_head.weight[5, 0] = float("nan")
    optim = distill_settings(non_finite="skip")
    expected = r"step 10: .* 10 steps before it were skipped, so it is not these rows alone"
    with pytest.raises(RunError, match=expected):
        trainer(objective, tmp_path, steps=20, optim=optim).run()

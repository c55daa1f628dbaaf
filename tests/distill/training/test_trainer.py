"""Rows, targets, tasks and the loop: the same result however the work is cut."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from xlstm_distill import MixerConfig, convert
from xlstm_distill.artifacts import Artifact
from xlstm_distill.data.packing import pack
from xlstm_distill.data.rows import IGNORE_INDEX, DomainRows, load_batch, next_token_labels
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.data.shards import write_rows
from xlstm_distill.data.tokenization import Tokens
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.recipe import Align, Distill, Training, load_recipe
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.runtime.device import forget_peak, peak_bytes
from xlstm_distill.stages.distill import expert_request
from xlstm_distill.stages.workbench import align_request
from xlstm_distill.targets.providers import OnlineTargets, kept_logits
from xlstm_distill.training import validation
from xlstm_distill.training.log import TrainingLog, check_trackers, training_log
from xlstm_distill.training.objectives import AlignObjective, DistillObjective, Sums, TeacherObserver
from xlstm_distill.training.trainer import Plan, Stretch, Trainer
from xlstm_distill.training.validation import validate
from xlstm_kernels.testing import error_ratio

MIXER = MixerConfig(window=8, sinks=2)
EXPERTS = {"a": {"phases": [{"domain": "a", "tokens": 100}]}}


@pytest.fixture
def domains(tmp_path):
    """Two domains of 24 packed rows of 32 tokens."""
    made = {}
    for seed, name in enumerate(("a", "b")):
        rng = np.random.default_rng(seed)
        documents = []
        for _ in range(120):
            ids = rng.integers(3, 97, rng.integers(3, 20)).tolist()
            documents.append(Tokens.of(ids, [n > 1 for n in range(len(ids))]))
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder, list(pack(documents, 32, 0))[:24], context=32, vocabulary=97)
        made[name] = DomainRows(name, Artifact(folder, {}), validation=4)
    return made


def stretch(domains, steps, batch=4, weights=None, lr=1e-2):
    return Stretch(
        RowSchedule(domains, weights or {"a": 1.0, "b": 1.0}, 0, steps * batch), steps, lr
    )


def test_rows_keep_to_weights_cover_epochs_and_never_touch_validation(domains):
    schedule = RowSchedule(domains, {"a": 3.0, "b": 1.0}, 0, 160)
    rows = [row for step in range(20) for row in schedule.rows(step, 8)]
    assert Counter(name for name, _ in rows) == {"a": 120, "b": 40}
    for name, epochs in (("a", 6), ("b", 2)):
        assert Counter(index for n, index in rows if n == name) == dict.fromkeys(
            range(4, 24), epochs
        )
    for n in range(4, 160, 4):
        assert Counter(name for name, _ in rows[:n])["b"] == n // 4
    assert RowSchedule(domains, {"a": 3.0, "b": 1.0}, 0, 160).rows(7, 8) == rows[56:64]
    assert RowSchedule(domains, {"a": 3.0, "b": 1.0}, 1, 160).rows(7, 8) != rows[56:64]


def test_labels_stay_in_their_document():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    supervised = torch.tensor([[True, False, True, True, True]])
    segments = torch.tensor([[0, 0, 0, 1, 1]])
    none = IGNORE_INDEX
    assert next_token_labels(ids, supervised, segments).tolist() == [[none, 7, none, 9, none]]


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo3"])
def test_the_observer_sees_what_the_projection_gets(family, tiny_teacher, domains):
    teacher = tiny_teacher(family)
    batch = load_batch(domains, [("a", 4), ("b", 5)])
    exact = convert(teacher, MixerConfig(window=32, sinks=0, branches=("window",)))
    for mixer, seen in zip(exact.mixers(), TeacherObserver(teacher)(batch), strict=True):
        mixed = mixer.mix(
            seen.hidden_states, seen.position_embeddings, segment_ids=batch.segment_ids
        )
        assert error_ratio(mixed[batch.real], seen.heads[batch.real].double()) < 1e-6


def align_task(tiny_teacher):
    teacher = tiny_teacher()
    torch.manual_seed(0)
    return AlignObjective(convert(teacher, MIXER, share_weights=True), teacher)


def distill_task(tiny_teacher):
    teacher = tiny_teacher()
    torch.manual_seed(0)
    return DistillObjective(convert(teacher, MIXER), OnlineTargets(teacher, 16), 0.9, 0.1)


def start_far_off(mixers):
    """Mostly mLSTM, which forgets at once: far from the teacher."""
    with torch.no_grad():
        for mixer in mixers:
            mixer.output_gate.bias.fill_(3.0)
            mixer.forget_gate.bias.fill_(-3.0)


def trained(task, domains, directory, steps=4, micro_batch=4, optim=None, batch=4):
    optim = optim or Align(tokens=4096, batch=batch, warmup_steps=1)
    plan = Plan("test", (stretch(domains, steps, batch),), batch, micro_batch)
    return Trainer(task, optim, plan, domains, directory, Accelerator(cpu=True)).run()


def held_out(task, domains):
    return validate(task, task.count, domains, 4, Accelerator(cpu=True))


@pytest.mark.parametrize("make", [align_task, distill_task])
def test_micro_batches_do_not_change_the_training(make, tiny_teacher, domains, tmp_path):
    whole, parts = make(tiny_teacher), make(tiny_teacher)
    a = trained(whole, domains, tmp_path / "whole", micro_batch=4).last
    b = trained(parts, domains, tmp_path / "parts", micro_batch=1).last
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if p.requires_grad and not name.endswith(
            "input_gate.bias"
        ):  # its gradient is zero: Adam amplifies noise
            assert error_ratio(p.detach(), q.detach().double()) < 1e-3, name


def test_alignment_trains_the_new_parameters_only_and_lowers_the_error(
    tiny_teacher, domains, tmp_path
):
    task = align_task(tiny_teacher)
    start_far_off(task.mixers)
    before = {n: p.detach().clone() for n, p in task.mixers.named_parameters()}
    outcome = trained(task, domains, tmp_path, steps=30)
    assert outcome.after["mse"] < 0.8 * outcome.before["mse"]
    assert outcome.after == held_out(task, domains)
    changed = {n for n, p in task.mixers.named_parameters() if not torch.equal(before[n], p)}
    assert changed
    assert all(any(part in n for part in ("feature_map", "_gate")) for n in changed)


def test_distillation_lowers_the_kl(tiny_teacher, domains, tmp_path):
    task = distill_task(tiny_teacher)
    start_far_off(task.student.mixers())
    task.ce_weight, task.kl_weight = 0.0, 1.0
    outcome = trained(
        task, domains, tmp_path, steps=30, optim=Distill(experts=EXPERTS, batch=4, lr=1e-3)
    )
    assert outcome.after["kl"] < 0.8 * outcome.before["kl"]
    assert 0 < outcome.after["gate"] < outcome.before["gate"]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(log) == 30
    assert log[-1]["loss"] < log[0]["loss"]
    assert {
        "step",
        "loss",
        "ce",
        "kl",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "peak_memory_gib",
    } == set(log[0])


def test_the_loss_is_the_mean_over_supervised_tokens(tiny_teacher, domains):
    task = distill_task(tiny_teacher)
    batch = load_batch(domains, [("a", 6), ("b", 7)])
    sums = task(batch)
    logits = task.student(batch.input_ids, segment_ids=batch.segment_ids).logits
    labels = batch.labels[batch.labels != IGNORE_INDEX]
    kept = logits[batch.labels != IGNORE_INDEX]
    assert (
        error_ratio(kept_logits(task.student, batch, segment_ids=batch.segment_ids), kept.double())
        < 1e-6
    )
    expected = torch.nn.functional.cross_entropy(kept, labels)
    assert float(sums.parts["ce"]) / task.count(batch) == pytest.approx(
        float(expected.detach()), rel=1e-5
    )


def test_a_loss_that_is_not_finite_names_step_and_rows(tiny_teacher, domains, tmp_path):
    task = distill_task(tiny_teacher)
    with torch.no_grad():
        task.student.lm_head.weight[5, 0] = float("nan")
    expected = r"test: step 0: loss is nan, first at student.lm_head \(rows [ab]\[\d+\], .*nothing was published"
    with pytest.raises(RunError, match=expected):
        trained(task, domains, tmp_path)


class Mute(torch.nn.Module):
    """A task that finds nothing to train on in the batches of some steps."""

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


def test_rows_without_a_supervised_token_are_an_error(domains, tmp_path):
    expected = r"step 3: none of its rows a\[.* has a supervised token, nor has one of the 3 steps before it; check"
    with pytest.raises(RunError, match=expected):
        trained(Mute(range(4)), domains, tmp_path)
    with pytest.raises(RunError, match=r"step 13: .* nor has one of the 10 steps before it"):
        trained(Mute(range(3, 20)), domains, tmp_path / "later", steps=20)


def test_a_step_without_a_supervised_token_is_left_out_and_said(domains, tmp_path):
    console, task = QuietConsole(), Mute({2, 5})
    optim = Align(tokens=4096, batch=4)
    plan = Plan("test", (stretch(domains, 6),), 4, 4)
    outcome = Trainer(
        task, optim, plan, domains, tmp_path, Accelerator(cpu=True), console=console
    ).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line.get("skipped")] == [2, 5]
    assert (outcome.skipped_steps, outcome.last["skipped"]) == (2, 1.0)
    said = [line for line in console.lines if "has a supervised token; the step is skipped" in line]
    assert [line.split(": none")[0] for line in said] == ["test: step 2", "test: step 5"]


def test_a_resumed_training_trains_in_training_mode_and_keeps_its_last_figures(
    tiny_teacher, domains, tmp_path
):
    """What load_student gives is in eval mode, in which transformers checkpoints no activations."""
    modes, settings = [], Training(checkpoint_steps=2, validate_steps=None)
    optim = Distill(experts=EXPERTS, batch=4, lr=1e-3)

    def go_on(steps):
        task = distill_task(tiny_teacher)
        task.student.eval()
        task.student.model.register_forward_hook(
            lambda module, *_: modes.append(module.training) if torch.is_grad_enabled() else None
        )
        plan = Plan("test", (stretch(domains, steps),), 4, 4)
        return Trainer(
            task, optim, plan, domains, tmp_path, Accelerator(cpu=True), training=settings
        ).run()

    (tmp_path / ".step-00000001.partial").mkdir()
    go_on(2)
    assert [p.name for p in tmp_path.glob("*step-*")] == ["step-00000002"]
    outcome = go_on(4)
    assert modes == [True] * 4
    again = go_on(4)  # all steps are done
    assert modes == [True] * 4
    assert again.last == outcome.last
    assert again.last["loss"] > 0


def test_validation_runs_no_more_rows_at_a_time_than_training_and_shares_them_evenly(
    domains, tmp_path, monkeypatch
):
    given = {}
    monkeypatch.setattr(
        "xlstm_distill.training.trainer.validate",
        lambda *arguments: given.update(rows=arguments[3]) or {},
    )
    trainer = Trainer(Mute(()), Align(tokens=4096, batch=6), Plan("test", (stretch(domains, 1, 6),), 6, 6), domains,
                      tmp_path, Accelerator(cpu=True))  # fmt: skip
    trainer.accelerator = SimpleNamespace(num_processes=2)
    trainer.validate()
    assert given["rows"] == 3
    every = {(name, index) for name in domains for index in range(4)}
    for processes in (1, 2, 3, 5):
        places = [
            SimpleNamespace(num_processes=processes, process_index=n) for n in range(processes)
        ]
        shares = [list(validation._shares(domains, 3, place)) for place in places]
        assert len({len(share) for share in shares}) == 1
        for together in zip(*shares, strict=True):
            sizes = [len(rows) if counts else 0 for rows, counts in together]
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= 3
        counted = [row for share in shares for rows, counts in share if counts for row in rows]
        assert (len(counted), set(counted)) == (8, every)


def test_what_to_do_at_a_loss_that_is_not_finite_keeps_the_checkpoints_of_a_training(root):
    """The error's advice, `non_finite: skip`, must not start the training over."""
    paths = {}
    for value in ("stop", "skip"):
        sets = [f"align.non_finite={value}", f"distill.non_finite={value}"]
        recipe = load_recipe(root / "recipes" / "quickstart.yaml", sets)
        expert = next(iter(recipe.distill.experts))
        requests = align_request(recipe), expert_request(recipe, expert)
        paths[value] = [request.fingerprint for request in requests]
    assert paths["stop"] == paths["skip"]


def test_sparse_targets_survive_a_small_vocabulary():
    targets = SparseTargets.from_logits(torch.randn(3, 5), top_k=256)
    assert targets.ids.shape == (3, 5)


def poisoned(tiny_teacher, rows):
    """A task whose loss is not finite on the given rows."""
    task = distill_task(tiny_teacher)
    real = task.targets

    def targets(batch):
        found = real(batch)
        bad = any(row in rows for row in batch.rows)
        return replace(found, log_probs=found.log_probs * float("nan")) if bad else found

    task.targets = targets
    return task


def test_a_bad_batch_can_be_skipped_and_the_rest_goes_on(tiny_teacher, domains, tmp_path):
    steps = stretch(domains, 6)
    bad = {row for step in (2, 4) for row in steps.schedule.rows(step, 4)[:1]}
    optim = Distill(experts=EXPERTS, batch=4, lr=1e-3, non_finite="skip")
    expected = r"step 2: loss is nan, first at student.lm_head \(rows .* the last checkpoint is kept"  # it makes the loss
    with pytest.raises(RunError, match=expected):
        trained(
            poisoned(tiny_teacher, bad),
            domains,
            tmp_path / "stop",
            steps=6,
            optim=Distill(experts=EXPERTS, batch=4, lr=1e-3),
        )
    task = poisoned(tiny_teacher, bad)
    assert trained(task, domains, tmp_path / "skip", steps=6, optim=optim).skipped_steps == 2
    log = [json.loads(line) for line in (tmp_path / "skip" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line.get("skipped")] == [2, 4]
    assert all(torch.isfinite(p).all() for p in task.parameters())


def test_skipping_ends_where_nothing_is_finite_any_more(tiny_teacher, domains, tmp_path):
    task = distill_task(tiny_teacher)
    with torch.no_grad():
        task.student.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(
        RunError,
        match=r"step 10: .* 10 steps before it were skipped, so it is not these rows alone",
    ):
        trained(
            task,
            domains,
            tmp_path,
            steps=20,
            optim=Distill(experts=EXPERTS, batch=4, lr=1e-3, non_finite="skip"),
        )


def test_held_out_figures_go_to_the_log_and_to_trackers(
    tiny_teacher, domains, tmp_path, monkeypatch
):
    seen = []

    class Memory(GeneralTracker):
        name, requires_logging_directory, tracker, main_process_only = "memory", False, None, True

        def __init__(self, project, name):
            super().__init__()
            seen.append((project, name))

        def store_init_configuration(self, values):
            seen.append(values["steps"])

        def log(self, values, step):
            seen.append((step, values["loss"]))

        def finish(self):
            seen.append("finished")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", Memory)
    task, optim = distill_task(tiny_teacher), Distill(experts=EXPERTS, batch=4, lr=1e-3)
    plan = Plan("distill/a", (stretch(domains, 4),), 4, 4)
    settings = Training(validate_steps=2, trackers=("tensorboard",))
    directory = tmp_path / "run" / "training" / "distill-a-0123"
    Trainer(task, optim, plan, domains, directory, Accelerator(cpu=True), training=settings).run()
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "held_out_kl" in line] == [1]
    assert {"held_out_ce", "held_out_gate"} <= log[1].keys()
    assert seen == [
        ("xlstm-distill", "run-distill-a"),
        4,
        *((line["step"], line["loss"]) for line in log),
        "finished",
    ]


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("xlstm_distill.training.log.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"training.trackers\[0\]: 'wandb' is not installed; pip install"
    ):
        check_trackers(("wandb",))


def test_a_training_reports_its_own_peak_of_memory(tmp_path):
    forget_peak()  # of other tests
    before = peak_bytes(torch.device("cpu"))
    ballast = bytearray(os.urandom(2**20)) * 256
    assert peak_bytes(torch.device("cpu")) > before + 200 * 2**20
    del ballast
    with training_log(tmp_path, "align", {}, 0, ()):
        assert peak_bytes(torch.device("cpu")) < before + 100 * 2**20


def test_the_header_and_the_log_are_replaced_whole(tmp_path, monkeypatch):
    for name in ("training.json", "log.jsonl"):
        (tmp_path / name).write_text('{"step": 0}\n')

    def fail(*_):
        raise OSError

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError), training_log(tmp_path, "align", {}, 1, ()):
        pass
    with pytest.raises(OSError):
        TrainingLog(tmp_path / "log.jsonl", (), 1)
    assert {(tmp_path / name).read_text() for name in ("training.json", "log.jsonl")} == {
        '{"step": 0}\n'
    }

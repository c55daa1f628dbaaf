"""On-policy refinement: prompts, sampling, the loss on samples, and a training cut short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.data.rows import IGNORE_INDEX
from xlstm_distill.data.tokenization import Tokens
from xlstm_distill.losses.plain import tail_kl
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.loading import allocate, empty_student
from xlstm_distill.recipe import Refine, Training
from xlstm_distill.targets.providers import OnlineTargets
from xlstm_distill.training.on_policy.objective import RefineObjective
from xlstm_distill.training.on_policy.prompts import Cutter
from xlstm_distill.training.on_policy.sampler import (
    Sampler,
    SampleSettings,
    draw_tokens,
    row_draws,
)
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer

ENDS = tuple(range(5, 17))
NEW, PROMPT = 20, 10


def sample_settings(rows: int = 64, **changes: object) -> SampleSettings:
    values = {"new_tokens": NEW, "temperature": 1.0, "top_p": 1.0, "seed": 3, "ends": ENDS}
    return SampleSettings(**{**values, **changes}, rows=rows)


def conversation() -> PackedRow:
    """Two turns in tokens 0 to 11, then a document without a prompt, then padding."""
    row = PackedRow.empty(32, 0)
    flags = [False] * 3 + [True] * 3 + [False] * 2 + [True] * 4
    row.add(Tokens.of(list(range(100, 112)), flags))
    row.add(Tokens.of(list(range(200, 210)), [True] * 10))
    return row


def test_a_prompt_ends_where_a_response_begins_and_its_response_follows():
    cutter = Cutter(prompt_tokens=8, new_tokens=3, off_policy=0.25, seed=1)
    found = [cutter.cut(conversation(), number) for number in range(300)]
    texts = {(tuple(o.prompt), tuple(o.continuation)) for o in found}
    first, second = tuple(range(100, 103)), tuple(range(100, 108))
    plain = {(tuple(range(200, 200 + n)), tuple(range(200 + n, 203 + n))) for n in range(2, 6)}
    assert texts == {(first, (103, 104, 105)), (second, (108, 109, 110))} | plain
    own = sum(not opening.sampled for opening in found) / len(found)
    assert own == pytest.approx(0.25, abs=0.08)
    again = cutter.cut(conversation(), 7)
    assert (again.number, tuple(again.prompt)) == (7, tuple(found[7].prompt))
    # Too long for the prompt: the place that fits is taken, and without one the prompt's end.
    short = Cutter(prompt_tokens=3, new_tokens=3, off_policy=0.0, seed=1)
    assert {len(short.cut(conversation(), n).prompt) for n in range(40)} <= {1, 2, 3}
    row = PackedRow.empty(12, 0)
    row.add(Tokens.of(list(range(100, 110)), [False] * 6 + [True] * 4))
    assert tuple(short.cut(row, 0).prompt) == (103, 104, 105)
    # Nothing supervised: the document's beginning is the prompt.
    row.supervised[:] = False
    assert short.cut(row, 0).prompt[0] == 100


def test_tokens_are_drawn_by_their_mass():
    logits = torch.tensor([[0.5, 0.0, 0.2, 0.3]]).log().expand(4, 4)
    draws = torch.tensor([0.49, 0.51, 0.69, 0.999], dtype=torch.float64)
    assert draw_tokens(logits, draws, 1.0, 1.0).tolist() == [0, 2, 2, 3]
    # The smallest set that holds 0.6 is the first and the last; of 0.8 mass, .49 is 0.392.
    assert draw_tokens(logits, draws, 1.0, 0.6).tolist() == [0, 0, 3, 3]
    # A low temperature takes the most likely.
    assert draw_tokens(logits, draws, 0.05, 1.0).tolist() == [0, 0, 0, 0]


@pytest.fixture
def student(tiny_teacher: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return convert(tiny_teacher(), MixerConfig(window=8, sinks=2))


@torch.no_grad()
def test_samples_are_those_of_one_prompt_alone_without_a_cache(student, tmp_path):
    """A reference without cache, padding or batch draws the same tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(7, 97, length) for length in (3, 10, 6, 1)]
    numbers = [4, 9, 2, 30]
    expected = []
    for prompt, number in zip(prompts, numbers, strict=True):
        draws, own = row_draws(3, [number], NEW)[0], []
        for step in range(NEW):
            ids = torch.tensor([[*prompt.tolist(), *own]])
            logits = student(input_ids=ids, use_cache=False).logits[:, -1]
            own.append(int(draw_tokens(logits, draws[step : step + 1], 0.8, 0.9)))
            if own[-1] in ENDS:
                break
        expected.append(own)
    settings = {"temperature": 0.8, "top_p": 0.9}
    student.train()
    assert Sampler(student, sample_settings(**settings))(prompts, numbers) == expected
    assert Sampler(student, sample_settings(3, **settings))(prompts, numbers) == expected
    assert student.training
    # A copy gets the weights as they are now: it needs none of its own.
    student.save_pretrained(tmp_path)
    whole = empty_student(tmp_path, torch.float32)
    allocate(whole, torch.device("cpu"), tmp_path)
    for parameter in whole.parameters():
        parameter.fill_(torch.nan)
    for parameter in student.parameters():
        parameter.add_(0.01)
    moved = Sampler(student, sample_settings())(prompts, numbers)
    assert Sampler(student, sample_settings(), whole)(prompts, numbers) == moved
    assert moved != expected


@pytest.fixture
def refine_objective(
    tiny_teacher: Callable[..., torch.nn.Module],
) -> Callable[..., RefineObjective]:
    def make(off_policy: float = 0.25, **changes: object) -> RefineObjective:
        teacher = tiny_teacher()
        torch.manual_seed(0)
        student = convert(teacher, MixerConfig(window=8, sinks=2))
        with torch.no_grad():
            for mixer in student.mixers():
                # Mostly mLSTM, which forgets at once: far from the teacher.
                mixer.output_gate.bias.fill_(3.0)
                mixer.forget_gate.bias.fill_(-3.0)
        sampler = Sampler(student, sample_settings(**changes))
        cutter = Cutter(PROMPT, NEW, off_policy, 3)
        return RefineObjective(student, OnlineTargets(teacher, 16), sampler, cutter, kl_tail=True)

    return make


def test_the_loss_is_the_teachers_divergence_on_the_students_own_tokens(refine_objective, domains):
    objective = refine_objective(off_policy=0.0)
    rows, numbers = [("a", 5), ("b", 6), ("a", 7)], [8, 9, 10]
    read = objective.read(domains, rows, numbers)
    (batch,), sums = objective.renew(domains, [read], numbers)
    prompts = [objective.cutter.cut(domains[d].row(r), n).prompt for (d, r), n in zip(
        rows, numbers, strict=True)]  # fmt: skip
    samples = objective.sampler[0](prompts, numbers)
    student, teacher = objective.student, objective.targets.teacher
    expected = 0.0
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([[*prompt.tolist(), *sample]])
        kept = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            theirs = SparseTargets.from_logits(teacher(ids).logits[0, kept], 16)
            expected += tail_kl(student(ids, use_cache=False).logits[0, kept], theirs).sum()
    found = objective(batch)
    torch.testing.assert_close(found.loss, torch.as_tensor(expected), rtol=1e-4, atol=1e-5)
    assert objective.count(batch) == sum(map(len, samples)) == sums["tokens"]
    assert sums["ended"] == sum(sample[-1] in ENDS for sample in samples)
    labels = [row[row != IGNORE_INDEX].tolist() for row in batch.labels]
    assert sorted(labels) == sorted(samples)
    assert [len(row) for row in batch.real] == [64] * 3
    assert batch.real.sum(1).tolist() == sorted(batch.real.sum(1).tolist())
    found.loss.backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_off_policy_samples_are_the_texts_own(refine_objective, domains):
    objective = refine_objective(off_policy=1.0)
    read = objective.read(domains, [("a", 5), ("b", 6)], [0, 1])
    (batch,), sums = objective.renew(domains, [read], [0, 1])
    assert torch.equal(batch.labels, read.labels)
    assert (sums["sampled"], objective.count(batch)) == (0, objective.count(read))


class Broken(Exception):
    """Ends a training between two steps."""


def refine_training(
    objective: RefineObjective, domains, stretch: Callable[..., Stretch], folder: Path, **changes
) -> Trainer:
    from accelerate import Accelerator

    settings = Refine(**{
        "tokens": 1000, "batch": 4, "lr": 1e-3, "prompt_tokens": PROMPT, "new_tokens": NEW,
        **changes,
    })  # fmt: skip
    plan = TrainingPlan(
        "refine/x",
        (stretch(6),),
        settings,
        Training(checkpoint_steps=2),
        flops_per_token=1.0,
        row_tokens=settings.row_tokens,
    )
    return Trainer(objective, plan, domains, folder, Accelerator(cpu=True))


def test_a_refinement_goes_on_exactly_and_comes_closer_to_the_teacher(
    refine_objective, domains, stretch, tmp_path
):
    whole = refine_objective()
    result = refine_training(whole, domains, stretch, tmp_path / "whole").run()
    assert result.after["kl"] < 0.9 * result.before["kl"]
    assert {"sample_length", "samples_ended", "sampled_tokens_per_second"} <= set(result.last)
    broken = refine_objective()
    training = refine_training(broken, domains, stretch, tmp_path / "broken")
    renew = broken.renew

    def fail(domains, batches, numbers):
        if numbers[0] // 4 == 4:
            raise Broken
        return renew(domains, batches, numbers)

    broken.renew = fail
    with pytest.raises(Broken):
        training.run()
    again = refine_objective()
    assert (
        refine_training(again, domains, stretch, tmp_path / "broken").run().last["kl"]
        == (result.last["kl"])
    )
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_micro_batches_and_sampled_batches_do_not_change_it(
    refine_objective, domains, stretch, tmp_path
):
    whole, parts = refine_objective(), refine_objective(rows=3)
    training, renew, text = refine_training(whole, domains, stretch, tmp_path / "a"), whole.renew, 0

    def count(domains, batches, numbers):
        nonlocal text
        made, sums = renew(domains, batches, numbers)
        text = sum(batch.tokens for batch in made)
        return made, sums

    whole.renew, training.peak = count, (1.0, "a device of one operation a second")
    one = training.run()
    # Tokens that are not there take no operations: samples may be short.
    nominal = 4 * (PROMPT + NEW)
    assert text < nominal
    assert one.last["mfu"] / one.last["tokens_per_second"] == pytest.approx(text / nominal)
    other = refine_training(parts, domains, stretch, tmp_path / "b", micro_batch=1).run()
    assert one.last["sample_length"] == other.last["sample_length"]
    assert one.last["kl"] == pytest.approx(other.last["kl"], rel=1e-4)

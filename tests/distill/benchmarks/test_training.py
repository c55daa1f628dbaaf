"""The benchmark of training: what it runs, what it refuses, and what it prints."""

from __future__ import annotations

import functools
import time

import pytest
import torch

from xlstm_distill.benchmarks import training
from xlstm_distill.benchmarks.training import VARIANTS, check, measure, parse, useful_flops
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.planning.flops import MixerShape, token_flops
from xlstm_kernels.benchmarks.parts import UNFINISHED

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip
SIZES = {"context": 24, "top-k": 16, "window": 8, "warmup": 0, "steps": 2}
FLAGS = ["--device=cpu", *(f"--{name}={value}" for name, value in SIZES.items())]


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setitem(training.MODELS, "small", TINY)
    monkeypatch.setattr(training, "PRODUCT", 64)
    return parse(FLAGS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_and_plain_training_agree(options, checkpointing):
    options.checkpointing = checkpointing
    assert max(check(options).values()) < 1e-5


def test_the_check_sees_a_wrong_loss(options, monkeypatch):
    monkeypatch.setattr(
        training.PlainObjective, "forward", lambda self, batch: _without_kl(self, batch)
    )
    assert min(check(options).values()) > 1e-3


def _without_kl(task, batch):
    hidden = training.kept_logits(task.student, batch, segment_ids=batch.segment_ids)
    parts = training.distill_loss(hidden, batch.labels[batch.labels != -100], task.targets(batch))
    return training.Sums(task.weights.cross_entropy * parts.cross_entropy, {})


@pytest.mark.parametrize("number", range(len(VARIANTS)))
def test_every_variant_trains_and_is_timed(number, options):
    found = measure(VARIANTS[number], options)
    assert len(found["seconds"]) == 2
    assert found["tokens_per_second"] > 0
    assert found["mfu"] == pytest.approx(
        found["tokens_per_second"] * found["flops_per_token"] / found["peak_flops"]
    )
    assert found["peak_origin"] == "product of 64 x 64, float32"


def test_a_variant_without_room_says_so(options, monkeypatch):
    def measure(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(training, "measure", measure)
    assert training.measured(VARIANTS[1], options) == {
        "failed": "out of memory",
        "reason": "no room",
    }


def test_the_teacher_counts_where_it_is_online(options):
    stored, _, online, attention, _ = (useful_flops(v, options, 0.75) for v in VARIANTS)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 300,
    }
    architecture = read_architecture(config, "test")
    teacher = token_flops(architecture, 24)
    student = token_flops(architecture, 24, MixerShape(8, 4, 8))
    assert attention == 3 * teacher.forward(0.75)
    assert stored == 3 * student.forward(0.75)
    assert online == stored + teacher.forward(0.75)


def test_the_table_compares_with_the_first_variant(options):
    def run(rate):
        return {"tokens_per_second": rate, "mfu": 0.25, "flops_per_token": 2e6, "peak_flops": 1e12,
                "peak_origin": "given", "peak_bytes": 3 * 2**20, "device": "a device"}  # fmt: skip

    rounds = [[run(100 * (n + 1) + r) for n in range(len(VARIANTS))] for r in (0, 1, 2)]
    rounds[1][1] = {"failed": "out of memory", "reason": "no room"}
    lines = training.table(rounds, {"loss": 1e-8, "gradient": 2e-7}, options).splitlines()
    assert lines[0] == "a device; given: MFU is a share of 1 TFLOP/s."
    assert "loss 1.0e-08, gradient 2.0e-07" in lines[1]
    assert "| student, plain loss, targets stored | out of memory | | | | |" in lines
    assert (
        lines[-2]
        == "| attention, fused loss, targets stored | 401 (400 to 402) | 3.97 | 25.0% | 2.0 | 3 |"
    )


def test_nothing_is_timed_when_the_losses_disagree(monkeypatch, capsys):
    started = []

    def child(arguments, only):
        started.append(only)
        return {"loss": 0.5, "gradient": 0.0}

    monkeypatch.setattr(training, "child", child)
    assert training.main(FLAGS) == 1
    assert started == ["check"]
    assert "disagree, nothing is timed: {'loss': 0.5" in capsys.readouterr().err


def test_a_second_start_makes_the_runs_that_are_missing(monkeypatch, tmp_path, capsys):
    made = {"tokens_per_second": 9.0, "mfu": 0.25, "flops_per_token": 2e6, "peak_flops": 1e12,
            "peak_origin": "given", "peak_bytes": 2**20, "device": "a device"}  # fmt: skip
    started = []

    def child(arguments, only, slow=()):
        started.append(only)
        if only in slow:
            time.sleep(60)
        if only == "check":
            return {"loss": 1e-9, "gradient": 1e-9}
        return {"failed": "out of memory"} if only == "1" and slow else made

    flags = [*FLAGS, "--repeats", "1", "--out", str(tmp_path / "runs.jsonl")]
    monkeypatch.setattr(training, "child", functools.partial(child, slow=("3",)))
    assert training.main([*flags, "--budget-s", "1"]) == UNFINISHED
    assert started == ["check", "0", "1", "2", "3"]
    assert "student, plain loss, targets stored: out of memory" in capsys.readouterr().err
    started.clear()
    monkeypatch.setattr(training, "child", child)
    assert training.main(flags) == 0
    assert started == ["1", "3", "4"]
    assert capsys.readouterr().out.count("| 9 (9 to 9) |") == len(VARIANTS)


def test_sizes_follow_the_model_unless_given():
    assert (parse(["--model", "1b"]).context, parse(["--model", "1b"]).window) == (4096, 512)
    assert parse(["--model", "1b", "--context", "128"]).context == 128
    assert parse(["--device", "cuda"]).dtype == "bfloat16"

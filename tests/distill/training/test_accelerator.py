"""One training however it is spread over ranks.

DDP, FSDP2 and ZeRO on two CPU processes end in one process's weights.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import process_environment

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.launcher import Layout
from xlstm_distill.training.accelerator import choose_precision, refuse_difference
from xlstm_kernels.testing import error_ratio

SCRIPT = Path(__file__).parents[2] / "helpers" / "sharded_training.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
HSDP = FSDP2 | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
SETTINGS = {
    "ddp": {},
    "fsdp2": FSDP2,
    "hsdp": HSDP,
    **{f"zero{n}": DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(n)} for n in (1, 2, 3)},
}
has_peft = importlib.util.find_spec("peft") is not None
SLOW = [pytest.mark.deepspeed, pytest.mark.slow]
KINDS = [
    "ddp",
    # The quick suite trains under FSDP2 in test_resume.py, and compares it with one process there.
    pytest.param("fsdp2", marks=pytest.mark.slow),
    pytest.param("zero3", marks=pytest.mark.deepspeed),
    pytest.param("zero1", marks=SLOW),
    pytest.param("zero2", marks=SLOW),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {},
    "spared": {"shard_teacher": True, "checkpoint": True, "by_shards": "seed-spared"},
    "align": {"stage": "align"},
    "spared-align": {"stage": "align", "checkpoint": True},
    # Three experts, which two processes cannot share evenly.
    "experts": {
        "family": "mixtral",
        "own": {"num_local_experts": 3},
        "by_shards": "seed-experts",
    },
    "tied-mixer": {"tied": True, "trainable": "mixer", "by_shards": "seed-tied"},
    **({"lora": {"trainable": "lora", "by_shards": "seed-lora"}} if has_peft else {}),
}
KEPT = {"attention": {"layers": [1], "heads": {"0": [1]}}}
OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16}
SPARING = {"shard_teacher": True, "checkpoint": True, "resume_at": 2}
MORE: dict[str, dict[str, Any]] = {
    # One layer keeps its attention, the other one of its heads.
    "kept": {"mixer": KEPT},
    "spared-kept": {"mixer": KEPT, "by_shards": "seed-kept", **SPARING},
    "kept-align": {"mixer": KEPT, "stage": "align"},
    # Learned logits of the softmax are parameters of the mixers themselves.
    "gpt-oss": {"family": "gpt_oss", "own": OSS, "by_shards": "seed-oss"},
    "gpt-oss-align": {"family": "gpt_oss", "own": OSS, "stage": "align"},
}
"""Further trainings, which only the slow tests do."""
RESUMED = ("spared-kept",)
SPARED = {"spared": "distill", "spared-align": "align"}
"""Trainings that save memory, and those that do not and must end the same."""
REFUSED = {("zero3", "spared-align")}
"""The trainer refuses these (test_trainer.py)."""
Trained = dict[str, dict[str, Any]]


def allowed(kinds: Iterable[Any], names: Iterable[str]) -> list[Any]:
    """Pair kinds of sharding, which may have marks, with trainings that they allow."""
    pairs = itertools.product(kinds, names)
    return [
        pytest.param(value, name, marks=getattr(kind, "marks", ()))
        for kind, name in pairs
        if ((value := getattr(kind, "values", (kind,))[0]), name) not in REFUSED
    ]


def train(out: Path, kind: str, trainings: dict[str, dict[str, Any]]) -> Trained:
    """Train in one process (kind `alone`), or in two under the named kind of sharding."""
    variables = {"PYTHONFAULTHANDLER": "1", **SETTINGS.get(kind, {})}
    if any("dtype" in options for options in trainings.values()):
        variables["ACCELERATE_MIXED_PRECISION"] = "bf16"
    launcher = () if kind == "alone" else TORCHRUN
    if kind == "hsdp":
        launcher = (*TORCHRUN[:-1], "--nproc-per-node=4")
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(out), json.dumps(trainings)],
        capture_output=True,
        text=True,
        env=process_environment(shims=True, **variables),
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Trained]:
    """All trainings under a kind of sharding, in one start of its processes."""

    @functools.cache
    def make(kind: str) -> Trained:
        trainings = {name: v for name, v in OPTIONS.items() if (kind, name) not in REFUSED}
        return train(tmp_path_factory.mktemp(kind) / "trained.pt", kind, trainings)

    return make


@pytest.fixture(scope="module")
def trained_more(tmp_path_factory) -> Callable[[str], Trained]:
    """The further trainings, as `trained`."""

    @functools.cache
    def make(kind: str) -> Trained:
        # DeepSpeed's states are its own, and the trainer's to resume.
        left_out = RESUMED if kind == "zero3" else ()
        trainings = {name: v for name, v in MORE.items() if name not in left_out}
        return train(tmp_path_factory.mktemp(kind) / "more.pt", kind, trainings)

    return make


# Measured after four steps: 7e-7 (DDP, FSDP2, ZeRO-1 and -2), 2e-6 (ZeRO-3), 5e-6 (a tied head).
@pytest.mark.multi_process
@pytest.mark.parametrize(("kind", "name"), allowed(KINDS, OPTIONS))
def test_two_processes_train_as_one_does(kind, name, trained):
    one, two = trained("alone")[name], trained(kind)[name]
    assert two["kind"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(kind, "DEEPSPEED")
    assert one["weights"].keys() == two["weights"].keys()
    for key, weight in one["weights"].items():
        assert two["weights"][key].dtype == torch.float32
        if not key.endswith("input_gate.bias"):  # its gradient is zero: Adam amplifies rounding
            assert error_ratio(two["weights"][key], weight.double()) < 1e-5, key
    for mine, theirs in zip(one["figures"], two["figures"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.multi_process
@pytest.mark.parametrize(("kind", "name"), allowed(["alone", *KINDS], SPARED))
def test_a_sharded_teacher_and_recomputed_activations_change_no_bit(kind, name, trained):
    plain, spared = trained(kind)[SPARED[name]], trained(kind)[name]
    assert spared["figures"] == plain["figures"]
    assert all(
        torch.equal(spared["weights"][name], weight) for name, weight in plain["weights"].items()
    )


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed)])
def test_kept_attention_and_learned_logits_are_sharded_and_resumed(kind, trained_more):
    one, two = trained_more("alone"), trained_more(kind)
    for name, made in two.items():
        assert_same(one[name], made)
    for made in (one, two) if kind == "fsdp2" else (one,):
        assert made["spared-kept"]["figures"] == made["kept"]["figures"]
        for key, weight in made["kept"]["weights"].items():
            assert torch.equal(made["spared-kept"]["weights"][key], weight), key


# A rank of four has two rows of a step: in micro-batches of one there are some to wait for.
ON_FOUR: dict[str, dict[str, Any]] = {
    "distill": {"micro_batch": 1},
    "waiting": {"micro_batch": 1, "wait": True},
    "resumed": {"micro_batch": 1, "resume_at": 2, "shard_teacher": True, "checkpoint": True},
    "align": {"stage": "align", "micro_batch": 1},
}


@pytest.fixture(scope="module")
def on_four(tmp_path_factory) -> Trained:
    """Trainings on two replicas of two shards each."""
    return train(tmp_path_factory.mktemp("hsdp") / "trained.pt", "hsdp", ON_FOUR)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare weights and figures, up to the rounding of sums."""
    assert one["weights"].keys() == other["weights"].keys()
    for key, weight in one["weights"].items():
        if not key.endswith("input_gate.bias"):
            assert error_ratio(other["weights"][key], weight.double()) < 1e-5, key
    for mine, theirs in zip(one["figures"], other["figures"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_replicas_of_two_shards_train_as_one_process_does(trained, on_four):
    alone = trained("alone")
    for name in ("distill", "align"):
        assert (on_four[name]["kind"], on_four[name]["replicas"]) == ("FSDP", 2)
        assert_same(alone[name], on_four[name])
    # Gradients that wait for the last micro-batch add up in another order.
    assert_same(alone["distill"], on_four["waiting"])
    # Embedding and head are gathered by themselves, and not with the root for a whole pass.
    assert {"student.model.embed_tokens", "student.lm_head"} <= set(on_four["distill"]["units"])


@pytest.mark.slow
@pytest.mark.multi_process
def test_replicas_resume_and_save_memory_to_the_last_bit(on_four):
    plain, other = on_four["distill"], on_four["resumed"]
    assert other["figures"] == plain["figures"]
    assert all(
        torch.equal(other["weights"][key], weight) for key, weight in plain["weights"].items()
    )


@pytest.mark.slow
@pytest.mark.multi_process
def test_compiled_layers_train_as_plain_ones_under_fsdp2(trained, tmp_path):
    options = {"compiled": {"compile": True, "checkpoint": True}, "waiting": {"wait": True}}
    made = train(tmp_path / "compiled.pt", "fsdp2", options)
    assert_same(trained("fsdp2")["distill"], made["compiled"])
    assert_same(trained("fsdp2")["distill"], made["waiting"])


# Measured against fp32, figures of about 2.9 (loss) and 1.0 (norm): 0.006 at most; bf16 in one
# process: 0.005.
@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("kind", ["alone", *KINDS])
def test_bf16_compute_keeps_fp32_weights_and_reduction(kind, trained, tmp_path):
    made = train(tmp_path / "bf16.pt", kind, {"distill": {"dtype": "bfloat16"}})["distill"]
    assert all(weight.dtype == torch.float32 for weight in made["weights"].values())
    assert made["reduction"] == "torch.float32"
    exact = trained("alone")["distill"]
    assert made["figures"] != exact["figures"]
    for (loss, norm), (expected_loss, expected_norm) in zip(
        made["figures"], exact["figures"], strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=5e-3)
        assert norm == pytest.approx(expected_norm, rel=1.5e-2)


@pytest.mark.parametrize(
    ("asked", "running"),
    [
        (Layout("fsdp", 2, 2), Layout("ddp", 2)),
        (Layout("deepspeed", 2, 3), Layout("ddp", 2)),
        (Layout("deepspeed", 2, 3), Layout("deepspeed", 1, 3)),
        (Layout("deepspeed", 2, 3), Layout("deepspeed", 2, 2)),
        (Layout("fsdp", 2, 2), Layout("fsdp", 2, 1)),
        (Layout("ddp", 2), Layout("single", 1)),
        (Layout("fsdp", 4, 2, replicas=2), Layout("fsdp", 4, 2)),
    ],
    ids=str,
)
def test_what_runs_must_be_what_was_asked(asked, running):
    differs = r"asked for .* and accelerate runs .* check its configuration"
    with pytest.raises(UserError, match=differs):
        refuse_difference(asked, running, "no")
    in_fp32 = replace(running, precision="no")
    refuse_difference(running, in_fp32, "no")
    differs = "mixed_precision: 'bf16' is wanted, and accelerate runs 'no'"
    with pytest.raises(UserError, match=differs):
        refuse_difference(running, in_fp32, "bf16")


@pytest.mark.parametrize(
    ("dtype", "precision", "on_accelerator", "chosen"),
    [
        ("bfloat16", None, True, "bf16"),
        ("bfloat16", None, False, "no"),  # bf16 on a CPU only where the launcher asks for it
        ("bfloat16", "bf16", False, "bf16"),
        ("bfloat16", "no", False, "no"),
        ("float32", None, True, "no"),
        ("float32", "no", True, "no"),
    ],
)
def test_the_teacher_s_dtype_decides_the_precision(dtype, precision, on_accelerator, chosen):
    asked = Layout("ddp", 2, None, precision)
    assert choose_precision(dtype, asked, on_accelerator=on_accelerator) == chosen


def test_a_precision_that_contradicts_the_recipe_is_refused():
    asked = Layout("ddp", 2, None, "bf16")
    with pytest.raises(UserError, match=r"mixed_precision: 'bf16' beside teacher.dtype: 'float32'"):
        choose_precision("float32", asked, on_accelerator=False)
    asked = Layout("ddp", 2, None, "no")
    with pytest.raises(UserError, match=r"mixed_precision: 'no' beside teacher.dtype: 'bfloat16'"):
        choose_precision("bfloat16", asked, on_accelerator=True)

"""One training however it is spread: DDP, FSDP2 and ZeRO on two CPU processes end in one process's weights."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.launcher import Layout
from xlstm_distill.training.accelerator import make_accelerator, refuse_difference
from xlstm_kernels.testing import error_ratio

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tests/helpers/sharded_training.py"
SETTINGS = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    },
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
        for stage in (1, 2, 3)
    },
}  # fmt: skip
has_peft = importlib.util.find_spec("peft") is not None
KINDS = [
    "ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.deepspeed),
    *(pytest.param(kind, marks=[pytest.mark.deepspeed, pytest.mark.slow]) for kind in ("zero1", "zero2")),
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "distill": {},
    "spared": {"shard_teacher": True, "checkpoint": True},
    "align": {"stage": "align"},
    "tied-mixer": {"tied": True, "trainable": "mixer"},
    **({"lora": {"trainable": "lora"}} if has_peft else {}),
}
Trained = dict[str, dict[str, Any]]


def train(out: Path, kind: str, trainings: dict[str, dict[str, Any]]) -> Trained:
    """Train in one process (kind `alone`), or in two under the named kind of sharding."""
    launcher = (
        []
        if kind == "alone"
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    )
    bf16 = any("dtype" in options for options in trainings.values())
    path = os.pathsep.join([str(ROOT / "tests" / "shims"), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        **SETTINGS.get(kind, {}),
    }
    environment |= {
        "PYTHONFAULTHANDLER": "1",
        **({"ACCELERATE_MIXED_PRECISION": "bf16"} if bf16 else {}),
    }
    command = [sys.executable, *launcher, str(SCRIPT), str(out), json.dumps(trainings)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-9000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Trained]:
    """All trainings under a kind of sharding, in one start of its processes."""
    return functools.cache(
        lambda kind: train(tmp_path_factory.mktemp(kind) / "trained.pt", kind, OPTIONS)
    )


# Measured: 7e-7 (DDP, FSDP2, ZeRO-1 and -2) and 2e-6 (ZeRO-3) after four steps; with a tied head 5e-6.
@pytest.mark.multi_process
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
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
@pytest.mark.parametrize("kind", ["alone", *KINDS])
def test_a_sharded_teacher_and_recomputed_activations_change_no_bit(kind, trained):
    plain, spared = trained(kind)["distill"], trained(kind)["spared"]
    assert spared["figures"] == plain["figures"]
    assert all(
        torch.equal(spared["weights"][name], weight) for name, weight in plain["weights"].items()
    )


# Measured against fp32, figures of about 2.9 (loss) and 1.0 (norm): 0.006 at most, bf16 in one process 0.005.
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
    ],
    ids=str,
)
def test_what_runs_must_be_what_was_asked(asked, running):
    with pytest.raises(
        UserError, match=r"asked for .* and accelerate runs .* check its configuration"
    ):
        refuse_difference(asked, running, "no")
    refuse_difference(
        running, Layout(running.kind, running.processes, running.sharding, "no"), "no"
    )
    with pytest.raises(
        UserError, match="mixed_precision: 'bf16' is wanted, and accelerate runs 'no'"
    ):
        refuse_difference(
            running, Layout(running.kind, running.processes, running.sharding, "no"), "bf16"
        )


def test_a_precision_that_contradicts_the_recipe_is_refused(monkeypatch):
    recipe: Any = SimpleNamespace(teacher=SimpleNamespace(dtype="float32"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match=r"mixed_precision: 'bf16' beside teacher.dtype: 'float32'"):
        make_accelerator(recipe)
    recipe.teacher.dtype = "bfloat16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("xlstm_distill.training.accelerator.on_cpu", lambda: False)
    with pytest.raises(UserError, match=r"mixed_precision: 'no' beside teacher.dtype: 'bfloat16'"):
        make_accelerator(recipe)

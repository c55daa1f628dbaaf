"""The kernels of a stage: what the recipe says, or what is right on every machine of the job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.recipe.model import Student
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import kernels
from xlstm_distill.stages.kernels import choose_kernels, questions
from xlstm_kernels import dispatch, verdicts
from xlstm_kernels.verdicts import Question, Verdict

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FACTS = {"device": "some GPU", "capability": "9.0", "torch": "2", "triton": "3.9", "ptxas": "13.4"}


def recipe(backend: str) -> Any:
    return SimpleNamespace(student=Student(backend=backend))


@pytest.fixture
def student(tiny_teacher) -> CausalLM:
    return convert(tiny_teacher(), MixerConfig(window=8))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a GPU that nobody has asked yet."""
    monkeypatch.setattr(verdicts, "machine", lambda index: FACTS)
    monkeypatch.setattr(dispatch, "installed", lambda package: True)
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "verdicts"))
    monkeypatch.delenv("XLSTM_KERNELS_BACKEND", raising=False)


def answers(right: bool) -> verdicts.Runner:
    def run(asked: Sequence[Question], index: int) -> list[Verdict]:
        return [Verdict(right, "" if right else "RMS ratio 2.1e-02", final=False) for _ in asked]

    return run


def nobody(asked: Sequence[Question], index: int) -> list[Verdict]:
    raise AssertionError(f"was asked {asked}")


def test_every_mixer_gets_the_recipe_s_kernels(student: CausalLM, tmp_path: Path) -> None:
    assert choose_kernels(student, recipe("torch"), GPU, tmp_path, runner=nobody) == "torch"
    assert {mixer.backend for mixer in student.mixers()} == {"torch"}
    assert not list(tmp_path.iterdir())


def test_auto_on_a_cpu_is_torch(student: CausalLM, tmp_path: Path) -> None:
    console = QuietConsole()
    assert choose_kernels(student, recipe("auto"), CPU, tmp_path, console, runner=nobody) == "torch"
    assert {mixer.backend for mixer in student.mixers()} == {"torch"}
    assert console.lines == []


@pytest.mark.parametrize("right", [True, False])
def test_auto_on_a_gpu_is_what_the_check_says_and_stays_so(
    right: bool, student: CausalLM, tmp_path: Path
) -> None:
    console, work = QuietConsole(), tmp_path / "new" / "work"
    chosen = "triton" if right else "torch"
    first = choose_kernels(student, recipe("auto"), GPU, work, console, runner=answers(right))
    assert first == chosen
    assert {mixer.backend for mixer in student.mixers()} == {chosen}
    assert len(console.lines) == (0 if right else 1)
    assert all("RMS ratio 2.1e-02 (some GPU, torch 2" in line for line in console.lines)
    # A restart, which would now be told the contrary.
    again = choose_kernels(student, recipe("auto"), GPU, work, console, runner=answers(not right))
    assert again == chosen
    assert json.loads((work / "kernels.json").read_text()) == {"backend": chosen}
    assert kernels.kernels_of(recipe("auto"), work) == chosen


def test_one_machine_with_wrong_kernels_decides_for_all_ranks(
    student: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = kernels.Opinion("torch", "wrong over there")
    monkeypatch.setattr(kernels, "gathered", lambda mine: [mine, None, other])
    console = QuietConsole()
    chosen = choose_kernels(student, recipe("auto"), GPU, tmp_path, console, runner=answers(True))
    assert chosen == "torch"
    assert console.lines == ["kernels: plain torch, wrong over there"]


def test_the_other_ranks_of_a_machine_check_nothing(
    student: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    first = kernels.Opinion("triton")
    monkeypatch.setattr(kernels, "gathered", lambda mine: [first, mine])
    assert choose_kernels(student, recipe("auto"), GPU, tmp_path, runner=nobody) == "triton"


def test_the_environment_outweighs_check_and_earlier_choice(
    student: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_kernels(student, recipe("auto"), GPU, tmp_path, runner=answers(True))
    monkeypatch.setenv("XLSTM_KERNELS_BACKEND", "torch")
    assert choose_kernels(student, recipe("auto"), GPU, tmp_path, runner=nobody) == "torch"
    monkeypatch.setenv("XLSTM_KERNELS_BACKEND", "fast")
    with pytest.raises(UserError, match="XLSTM_KERNELS_BACKEND='fast' is not allowed"):
        choose_kernels(student, recipe("auto"), GPU, tmp_path, runner=nobody)


def test_auto_runs_torch_where_triton_has_no_kernel(tiny_teacher, tmp_path: Path) -> None:
    student, console = (
        convert(tiny_teacher(), MixerConfig(window=8, feature_dim=24)),
        QuietConsole(),
    )
    assert choose_kernels(student, recipe("auto"), GPU, tmp_path, console, runner=nobody) == "torch"
    assert "has no kernel for Dk=24" in console.lines[0]


def test_the_check_is_of_what_the_mixers_will_run(student: CausalLM) -> None:
    asked = {each.words() for each in questions(student, "no", decodes=False)}
    assert asked == {"mlstm float32 Dk=16 Dv=16", "sliding_window_attention float32 D=16"}
    asked = {each.words() for each in questions(student.to(torch.float16), "bf16", decodes=True)}
    assert asked == {
        "mlstm bfloat16 Dk=16 Dv=16",
        "sliding_window_attention bfloat16 D=16",
        "hybrid_step bfloat16 D=16 Dk=16 Dv=16",
    }


@pytest.mark.parametrize(
    ("interpreted", "mixer", "reason"),
    [
        ("0", {}, "needs CUDA tensors"),
        ("1", {"feature_dim": 24}, "has no kernel for Dk=24"),
        ("1", {"sinks": 65, "window": 128}, "has no kernel for sinks=65"),
    ],
)
def test_kernels_that_cannot_run_are_refused_before_training(
    interpreted: str, mixer: dict[str, int], reason: str, tiny_teacher, tmp_path: Path, monkeypatch
) -> None:
    student = convert(tiny_teacher(), MixerConfig(**{"window": 8, **mixer}))
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(UserError, match=f"student.backend: 'triton' {reason}"):
        choose_kernels(student, recipe("triton"), CPU, tmp_path)

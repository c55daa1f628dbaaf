"""The self-check: it passes right kernels, finds planted faults, and is asked once a machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from xlstm_kernels import verdicts
from xlstm_kernels.doctor import examine
from xlstm_kernels.verdicts import Question, Verdict

pytest.importorskip("triton")
from xlstm_kernels import selfcheck, toolchain
from xlstm_kernels.triton import window_kernels

CPU = torch.device("cpu")
FACTS = {
    "device": "some GPU", "capability": "9.0", "torch": "2.11.0", "triton": "3.6.0",
    "ptxas": "12.8.93", "source": "0",
}  # fmt: skip
WINDOW = Question("sliding_window_attention", "float32", (("D", 16),))
RIGHT = Verdict(True, ratios={"h": 1e-7}, bound=1e-5)
TOKENS = 37  # more than a chunk of the table


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Facts of a machine with a GPU, which a test may change."""
    facts = dict(FACTS)
    monkeypatch.setattr(verdicts, "machine", lambda index: facts)
    monkeypatch.setenv("XLSTM_KERNELS_CACHE", str(tmp_path / "verdicts"))
    verdicts.forget()
    return facts


class Answering:
    """A runner that counts what it is asked."""

    def __init__(self, answer: Callable[[Question], Verdict]) -> None:
        self.answer = answer
        self.asked: list[Question] = []

    def __call__(self, asked: Sequence[Question], index: int) -> list[Verdict]:
        self.asked += asked
        return [self.answer(each) for each in asked]


checked = Answering(lambda asked: selfcheck.check(asked, CPU, TOKENS))

EXTRAS = "+softcap+sink_logits"
DIMS = {
    "mlstm": {"Dk": 32, "Dv": 16},
    "sliding_window_attention": {"D": 16},
    "mlstm_step": {"Dk": 16, "Dv": 32},
    "hybrid_step": {"D": 16, "Dk": 32, "Dv": 16},
}


@pytest.mark.parametrize(
    "operator", [*DIMS, f"sliding_window_attention{EXTRAS}", f"hybrid_step{EXTRAS}"]
)
def test_right_kernels_pass(operator: str) -> None:
    asked = verdicts.question(operator, torch.float32, DIMS[operator.removesuffix(EXTRAS)])
    verdict = selfcheck.check(asked, CPU, TOKENS)
    assert verdict.right, verdict
    if operator == "mlstm":
        names = ["h0", "h1", "h2", "dq", "dk", "dv", "di", "df", "dC", "dn"]
        assert verdict.ratios.keys() == {*names, *(f"cut {name}" for name in names)}
    assert ("dsink_logits" in verdict.ratios) == (operator == f"sliding_window_attention{EXTRAS}")
    assert all(0 < ratio < 1e-5 for ratio in verdict.ratios.values())


@pytest.mark.slow
@pytest.mark.usefixtures("gpu_arithmetic")
@pytest.mark.parametrize("operator", ["mlstm", "sliding_window_attention"])
def test_bfloat16_stays_below_one_percent_at_the_tokens_of_the_check(operator: str) -> None:
    asked = verdicts.question(operator, torch.bfloat16, dict.fromkeys(DIMS[operator], 64))
    verdict = selfcheck.check(asked, CPU)
    assert verdict.right, verdict
    assert verdict.bound < 1e-2


class Planted:
    """A kernel with a fault, which the interpreter runs in place of the right one."""

    def __init__(self, kernel: Any, fault: Callable[[dict[str, Any]], None]) -> None:
        self.kernel, self.fault = kernel, fault

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            self.kernel[grid](**arguments)
            self.fault(arguments)

        return launch


def wrong_by_one_percent(arguments: dict[str, Any]) -> None:
    arguments["out_ptr"].mul_(1.01)


def raising(_: dict[str, Any]) -> None:
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered\nmore")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (wrong_by_one_percent, r"RMS ratio to float64 over 1e-05: h 1\.0e-02"),
        (raising, r"RuntimeError: Triton Error \[CUDA\]: an illegal memory access was encount"),
    ],
)
def test_a_planted_fault_is_found_and_torch_runs(
    fault: Callable[[dict[str, Any]], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Planted(window_kernels.window_kernel, fault)
    monkeypatch.setattr(window_kernels, "window_kernel", kernel)
    with pytest.warns(UserWarning, match=reason) as warned:
        assert not verdicts.is_right(WINDOW, 0, checked)
    assert len(warned) == 1
    said = str(warned[0].message)
    assert "some GPU, torch 2.11.0, triton 3.6.0, ptxas 12.8.93" in said
    assert "set TRITON_PTXAS_PATH to a ptxas 13.3 or newer" in said


def test_a_machine_is_asked_once(machine: dict[str, str]) -> None:
    runner = Answering(lambda asked: RIGHT)
    for _ in range(2):
        assert verdicts.is_right(WINDOW, 0, runner)
        verdicts.forget()  # as in another process
    assert runner.asked == [WINDOW]
    for name in FACTS:  # any of these can make kernels wrong
        machine[name] = "another"
        assert verdicts.ask([WINDOW], 0, runner) == [RIGHT]
    assert len(runner.asked) == 1 + len(FACTS)


def test_only_what_nobody_asked_is_checked() -> None:
    runner, other = Answering(lambda asked: RIGHT), WINDOW._replace(dtype="bfloat16")
    verdicts.ask([WINDOW], 0, runner)
    assert len(verdicts.ask([WINDOW, other, WINDOW], 0, runner)) == 3
    assert runner.asked == [WINDOW, other]


def test_a_check_that_could_not_run_is_not_kept() -> None:
    runner = Answering(lambda asked: Verdict(False, "no memory", final=False))
    for _ in range(2):
        assert not verdicts.ask([WINDOW], 0, runner)[0].right
    assert len(runner.asked) == 2


def test_a_damaged_answer_is_asked_again() -> None:
    runner = Answering(lambda asked: RIGHT)
    verdicts.ask([WINDOW], 0, runner)
    verdicts.file_of(WINDOW, FACTS).write_text('{"verdict": ')
    assert verdicts.ask([WINDOW], 0, runner) == [RIGHT]
    assert len(runner.asked) == 2


def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Let this shell script be the child; $questions is what it is asked."""
    program = tmp_path / "child"
    program.write_text(f"#!/bin/sh\nfor questions; do :; done\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_kernel_that_ends_the_child_is_wrong_and_the_next_ones_are_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps(RIGHT._asdict())
    dies = "echo begun; echo 'CUDA error: misaligned address' >&2; kill -SEGV $$"
    lives = f"echo begun; echo '{answer}'"
    child(tmp_path, monkeypatch, f'case "$questions" in *first*) {dies};; esac; {lives}')
    asked = [WINDOW._replace(operator=name) for name in ("first", "second")]
    found = verdicts.in_a_child(asked, 0)
    assert [verdict.right for verdict in found] == [False, True]
    assert found[0].final
    assert "CUDA error: misaligned address" in found[0].reason


def test_an_option_of_one_process_is_not_in_an_answer_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps(RIGHT._asdict())
    refuses = 'if [ -n "$XLSTM_KERNELS_KEEP_STATES" ]; then exit 1; fi'
    child(tmp_path, monkeypatch, f"echo begun; {refuses}; echo '{answer}'")
    monkeypatch.setenv("XLSTM_KERNELS_KEEP_STATES", "yes")
    assert verdicts.in_a_child([WINDOW], 0) == [RIGHT]


def test_a_device_that_is_taken_leaves_the_question_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(tmp_path, monkeypatch, "echo 'CUDA-capable device(s) is/are busy' >&2; exit 1")
    (verdict,) = verdicts.in_a_child([WINDOW], 0)
    assert (verdict.right, verdict.final) == (False, False)
    assert "CUDA-capable device(s) is/are busy" in verdict.reason


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_real_child_says_that_there_is_no_device() -> None:
    (verdict,) = verdicts.in_a_child([WINDOW], 0)
    assert (verdict.right, verdict.final) == (False, False)


def test_known_faults_are_those_of_hopper_and_old_assemblers() -> None:
    assert len(toolchain.known_faults(90, "3.6.0", "12.8.93")) == 2
    assert toolchain.known_faults(90, "3.9.0", "13.4.59") == []
    assert toolchain.known_faults(80, "3.6.0", "12.8.93") == []


def test_the_assembler_says_its_version() -> None:
    tool = toolchain.assembler(90)
    assert tool is not None
    assert toolchain.numbers(tool.version) > (12, 0)


def test_the_doctor_shows_verdicts_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    wrong = Verdict(False, "RMS ratio to float64 over 8e-03: dk 2.1e-02")
    runner = Answering(lambda asked: wrong if asked.operator == "mlstm" else RIGHT)
    found = examine([64], ["bfloat16"], runner)
    assert not found.healthy
    assert found.auto == "triton, but torch for: mlstm bfloat16 Dk=64 Dv=64"
    assert "TRITON_PTXAS_PATH" in found.advice[0]
    runner = Answering(lambda asked: RIGHT)
    verdicts.clear()
    found = examine([64], ["bfloat16"], runner)
    assert (found.healthy, found.auto, found.advice) == (True, "triton", [])

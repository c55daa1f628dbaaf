"""The self-check: it passes right kernels, finds planted faults, and is asked once a machine."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xlstm_kernels import verdicts
from xlstm_kernels.dispatch import choose
from xlstm_kernels.doctor import examine
from xlstm_kernels.verdicts import Question, Verdict

pytest.importorskip("triton")
from xlstm_kernels import selfcheck, toolchain
from xlstm_kernels.triton import mlstm_backward, mlstm_forward, window_kernels
from xlstm_kernels.triton.configs import mlstm_config

REAL_MACHINE = verdicts.machine
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
        cut = [f"cut {name}" for name in names if name != "dv"]
        names += cut + [f"no gradients h{n}" for n in range(3)]
        alone = [f"one document {name}".replace("t cut", "t, cut") for name in names]
        alone = [name.replace("t no grad", "t, no grad") for name in alone]
        assert verdict.ratios.keys() == {*names, *alone}
    assert ("dsink_logits" in verdict.ratios) == (operator == f"sliding_window_attention{EXTRAS}")
    assert all(0 < ratio < 1e-5 for ratio in verdict.ratios.values())


def test_the_check_runs_every_kind_of_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[object, ...]] = set()
    settings = {
        mlstm_forward: {"output_kernel": ("SEGMENTED", "h_centred_ptr")},
        mlstm_backward: {"token_grad_kernel": ("SEGMENTED", "VALUES")},
        window_kernels: {"query_grad_kernel": ("SEGMENTED",)},
    }
    for module, kernels in settings.items():
        for name, watched in kernels.items():

            def note(
                given: dict[str, Any], name: str = name, watched: tuple[str, ...] = watched
            ) -> None:
                # Of a pointer only whether there is one: Triton compiles None in.
                values = (given[setting] for setting in watched)
                seen.add((name, *(x if isinstance(x, bool) else x is not None for x in values)))

            monkeypatch.setattr(module, name, Planted(getattr(module, name), note))
    for operator in ("mlstm", "sliding_window_attention"):
        asked = verdicts.question(operator, torch.float32, dict.fromkeys(DIMS[operator], 16))
        assert selfcheck.check(asked, CPU, TOKENS).right
    both = (True, False)
    token_kernels = ("output_kernel", "token_grad_kernel")
    assert seen == {*itertools.product(token_kernels, both, both)} | {
        ("query_grad_kernel", segmented) for segmented in both
    }


def test_super_chunks_of_the_check_have_more_than_one_chunk() -> None:
    for dtype in ("bfloat16", "float16", "float32"):
        for features in (16, 128, 256):
            chunk = mlstm_config(getattr(torch, dtype), features, 128).chunk
            chunks = -(-selfcheck.TOKENS // chunk)
            assert chunks >= 2 * selfcheck.SUPER_CHUNKS >= 4


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


def scaled(name: str, by: float, first: int = 0) -> Callable[[dict[str, Any]], None]:
    """Scale the chunks of a result from one on."""
    return lambda arguments: arguments[name][:, first:].mul_(by)


@pytest.mark.usefixtures("gpu_arithmetic")
@pytest.mark.parametrize(
    ("module", "kernel", "fault"),
    [
        (mlstm_forward, "state_kernel", scaled("C_ptr", 0.9, first=2)),
        (mlstm_backward, "state_grad_kernel", scaled("dC_ptr", 1.01)),
    ],
    ids=["states from the third chunk on", "dC by 1 %"],
)
def test_states_that_are_off_in_bfloat16_are_found(
    module: Any, kernel: str, fault: Callable[[dict[str, Any]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(selfcheck, "HEADS", 2)
    monkeypatch.setattr(selfcheck, "GROUPS", 1)
    run, draw, ways = selfcheck.CASES["mlstm"]
    one = {"one document": ways["one document"]}
    monkeypatch.setitem(selfcheck.CASES, "mlstm", (run, draw, one))  # of six, which take longer
    asked = verdicts.question("mlstm", torch.bfloat16, {"Dk": 16, "Dv": 16})
    right = selfcheck.check(asked, CPU)
    assert right.right, right
    assert max(right.ratios.values()) < 0.5 * right.bound
    monkeypatch.setattr(module, kernel, Planted(getattr(module, kernel), fault))
    assert "RMS ratio to float64 over 8e-03" in selfcheck.check(asked, CPU).reason


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


def test_each_answer_is_kept_and_told_as_it_comes() -> None:
    def killed(asked: Sequence[Question], index: int) -> Iterator[Verdict]:
        yield RIGHT
        raise KeyboardInterrupt

    other, heard = WINDOW._replace(dtype="bfloat16"), []
    with pytest.raises(KeyboardInterrupt):
        verdicts.ask([WINDOW, other], 0, killed, lambda *told: heard.append(told))
    assert heard == [(WINDOW, RIGHT)]
    assert verdicts.read(WINDOW, FACTS) == RIGHT
    runner = Answering(lambda asked: RIGHT)
    verdicts.ask([WINDOW, other], 0, runner)
    assert runner.asked == [other]


def test_asking_again_removes_no_file_of_others() -> None:
    verdicts.ask([WINDOW], 0, Answering(lambda asked: RIGHT))
    notes = verdicts.folder() / "my-notes.json"
    notes.write_text("{}")
    verdicts.clear()
    assert list(verdicts.folder().iterdir()) == [notes]


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
    found = list(verdicts.in_a_child(asked, 0))
    assert [verdict.right for verdict in found] == [False, True]
    assert found[0].final
    assert "CUDA error: misaligned address" in found[0].reason


def test_after_a_broken_device_a_new_child_answers_the_rest(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = Verdict(False, "AcceleratorError: an illegal memory access was encountered")
    asked = [WINDOW._replace(operator=name) for name in ("first", "second")]
    # The child itself: it goes no further than the question that broke its device.
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)
    monkeypatch.setattr(selfcheck, "check", lambda *_: wrong)
    monkeypatch.setattr(selfcheck, "device_is_broken", lambda device: True)
    selfcheck.main(["--questions", json.dumps(asked)])
    said = capsys.readouterr().out
    assert said == f"begun\n{json.dumps(wrong._asdict())}\n"
    # Its parent.
    (tmp_path / "said").write_text(said)
    broken = f"cat {tmp_path}/said; exit 0"
    lives = f"echo begun; echo '{json.dumps(RIGHT._asdict())}'"
    child(tmp_path, monkeypatch, f'case "$questions" in *first*) {broken};; esac; {lives}')
    assert list(verdicts.in_a_child(asked, 0)) == [wrong, RIGHT]


@pytest.mark.parametrize("stays", ["exec sleep 30", "kill -KILL $$"])
def test_a_question_that_was_not_left_to_its_end_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stays: str
) -> None:
    monkeypatch.setattr(verdicts, "LONGEST_CHECK", 1)
    lives = f"echo begun; echo '{json.dumps(RIGHT._asdict())}'"
    script = f'case "$questions" in *first*) {lives};; esac; '
    script += f'case "$questions" in *second*) echo begun; {stays};; esac; {lives}'
    child(tmp_path, monkeypatch, script)
    asked = [WINDOW._replace(operator=name) for name in ("first", "second", "third")]
    first, second, third = verdicts.in_a_child(asked, 0)
    assert first == third == RIGHT
    assert (second.right, second.final) == (False, False)
    expected = "signal 9 ended it" if "KILL" in stays else "it took more than 1 s"
    assert expected in second.reason


@pytest.mark.parametrize("broken", ["ptxas", "triton"])
def test_a_compiler_that_is_missing_means_torch_and_one_warning(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Any:
        raise RuntimeError("Cannot find ptxas")

    def imported(name: str) -> Any:
        if name == "triton":
            raise ImportError("libcuda.so.1: cannot open shared object file")
        return sys.modules[name]

    if broken == "ptxas":
        monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", gone)
    else:
        monkeypatch.setattr(toolchain.importlib, "import_module", imported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain, "assembler", toolchain.assembler.__wrapped__)
    facts = REAL_MACHINE.__wrapped__(0)
    monkeypatch.setattr(verdicts, "machine", lambda index: facts)
    answer = Verdict(False, f"RuntimeError: no {broken}")._asdict()
    child(tmp_path, monkeypatch, f"echo begun; echo '{json.dumps(answer)}'")
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=f"RuntimeError: no {broken}") as warned:
        chosen = [choose("mlstm", "auto", x, x, x, dims={"Dk": 64, "Dv": 64}) for _ in range(2)]
    assert (chosen, len(warned)) == (["torch", "torch"], 1)
    assert facts["ptxas"] == "none"
    assert ("set TRITON_PTXAS_PATH to one" in str(warned[0].message)) == (broken == "ptxas")
    assert "can make wrong code" not in str(warned[0].message)


def test_an_option_of_one_process_is_not_in_an_answer_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = json.dumps(RIGHT._asdict())
    refuses = 'if [ -n "$XLSTM_KERNELS_KEEP_STATES" ]; then exit 1; fi'
    child(tmp_path, monkeypatch, f"echo begun; {refuses}; echo '{answer}'")
    monkeypatch.setenv("XLSTM_KERNELS_KEEP_STATES", "yes")
    assert list(verdicts.in_a_child([WINDOW], 0)) == [RIGHT]


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
    wrong_ones = "mlstm bfloat16 Dk=64 Dv=64; mlstm bfloat16 Dk=128 Dv=64"
    assert found.auto == f"triton, but torch for: {wrong_ones}"
    assert "TRITON_PTXAS_PATH" in found.advice[0]
    runner = Answering(lambda asked: RIGHT)
    verdicts.clear()
    found = examine([64], ["bfloat16"], runner)
    assert (found.healthy, found.auto, found.advice) == (True, "triton", [])
    asked = {(each.operator, each.dims) for each in runner.asked}
    step = (("D", 64), ("Dk", 128), ("Dv", 64))  # hedgehog's features are twice as many
    assert ("hybrid_step+sink_logits", step) in asked
    assert ("sliding_window_attention+softcap", (("D", 64),)) in asked
    assert len(asked) == 13

"""Training that is cut short: checkpoints, signals, other numbers of processes, damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from xlstm_distill.checkpoints import INDEX, Checkpoints, exclusive
from xlstm_distill.errors import RunError
from xlstm_kernels.testing import error_ratio

SCRIPT = Path(__file__).parent / "train_in_processes.py"
STEPS = 10


def start(processes: int, out: Path, directory: Path) -> subprocess.Popen[str]:
    """Start the training."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if processes == 1:
        command = [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(SCRIPT), str(out), str(directory), str(STEPS)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(training: subprocess.Popen[str]) -> str:
    output, _ = training.communicate(timeout=120)
    assert training.returncode == 0, output[-3000:]
    return output


def kill_at(training: subprocess.Popen[str], directory: Path, step: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to all processes of a training as soon as it has logged a step."""
    log = directory / "log.jsonl"
    while training.poll() is None and not (log.is_file() and log.read_text().count("\n") > step):
        time.sleep(0.005)
    assert training.poll() is None, training.communicate()[0][-3000:]
    for process in psutil.Process(training.pid).children(recursive=True):  # the launcher's workers first
        process.send_signal(number)
    training.send_signal(number)
    training.communicate(timeout=60)


def steps_logged(directory: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights of uninterrupted trainings, by number of processes."""
    folder = tmp_path_factory.mktemp("whole")
    weights = {}
    for processes in (1, 2):
        finish(start(processes, folder / f"{processes}.safetensors", folder / str(processes)))
        weights[processes] = load_file(folder / f"{processes}.safetensors")
    return weights


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.multi_process
def test_two_processes_equal_one(whole):
    for name, one in whole[1].items():
        if not name.endswith("input_gate.bias"):
            assert error_ratio(whole[2][name], one.double()) < 1e-3, name


@pytest.mark.multi_process
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_ends_in_the_same_weights(processes, whole, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out.safetensors"
    for step in (1, 7):  # before the first checkpoint, and after the second
        kill_at(start(processes, out, work), work, step)
    assert len(list(work.glob("step-*"))) == 2
    assert not out.exists()
    finish(start(processes, out, work))
    assert same(load_file(out), whole[processes])
    assert steps_logged(work) == list(range(STEPS))


@pytest.mark.multi_process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint_and_the_code_to_start_again(number, whole, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out.safetensors"
    training = start(1, out, work)
    kill_at(training, work, 4, number)
    assert training.returncode == 75
    newest = max(work.glob("step-*"))
    assert json.loads((newest / INDEX).read_text())["step"] == len(steps_logged(work))
    finish(start(1, out, work))
    assert same(load_file(out), whole[1])


@pytest.mark.multi_process
def test_another_number_of_processes_goes_on_nearly_as_well(whole, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out.safetensors"
    kill_at(start(2, out, work), work, 4)
    finish(start(1, out, work))
    loaded = load_file(out)
    for name, expected in whole[1].items():
        if not name.endswith("input_gate.bias"):
            assert error_ratio(loaded[name], expected.double()) < 1e-3, name


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weight/a": torch.full((64,), float(step)), "generator/cpu": torch.arange(8, dtype=torch.uint8)}


def test_the_newest_whole_checkpoint_is_used_and_damage_is_named(tmp_path):
    checkpoints, said = Checkpoints(tmp_path, keep=2), []
    for step in (1, 2, 3):
        checkpoints.save(step, tensors(step), {"note": step})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    file = tmp_path / "step-00000003" / "process-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    found = checkpoints.latest(said.append)
    assert (found.step, found.facts["note"]) == (2, 2)
    assert torch.equal(found.tensors(0)["weight/a"], tensors(2)["weight/a"])
    assert said == [f"checkpoint refused: {file}: {file.stat().st_size} bytes, it was written with "
                    f"{file.stat().st_size + 4}"]  # fmt: skip
    other = tmp_path / "step-00000002" / "process-00000.safetensors"
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    with pytest.raises(RunError, match=r"no checkpoint can be used: .*step-00000003.* Delete .* to start over"):
        checkpoints.latest(said.append)
    assert "its checksum is not the one it was written with" in said[-1]


def test_a_training_belongs_to_one_run_at_a_time(tmp_path):
    with exclusive(tmp_path), pytest.raises(RunError, match="another process is at this training"), exclusive(tmp_path):
        pass
    with exclusive(tmp_path):
        pass


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, tensors(5), {})
    partial = tmp_path / ".step-00000009.partial"
    partial.mkdir()
    (partial / "process-00000.safetensors").write_bytes(b"half")
    assert checkpoints.latest(print).step == 5
    checkpoints.save(9, tensors(9), {})
    assert checkpoints.latest(print).step == 9
    assert not partial.exists()

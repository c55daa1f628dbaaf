"""Training that is cut short: checkpoints, signals, other numbers of processes, damage."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xlstm_distill.checkpoints import INDEX, Checkpoints, exclusive
from xlstm_distill.errors import RunError
from xlstm_kernels.testing import error_ratio

STEPS = 10
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


@pytest.fixture(scope="module")
def train():
    """Run a training in so many processes; with a signal and a step, send it to all once the step is in the log."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "training_server.py")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(processes, folder, number=None, step=0, delay=0.0, steps=STEPS, settings=None):
        kill = None if number is None else {"step": step, "signal": int(number), "delay": delay}
        paths = {"out": str(folder / "out.safetensors"), "directory": str(folder / "work")}
        request = {"processes": processes, "steps": steps, "kill": kill, "settings": settings, **paths}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(timeout=30)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out.safetensors")


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "work" / "log.jsonl").read_text().splitlines()]


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted((folder / "work").glob("step-*"))


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Weights of uninterrupted trainings, by number of processes."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole{processes}")
        assert train(processes, folder) == [0] * processes
        found[processes] = weights(folder)
    return found


def assert_near(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The input gate's bias has no true gradient: Adam amplifies what rounding makes of it."""
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        if not name.endswith("input_gate.bias"):
            assert error_ratio(weights[name], tensor.double()) < 1e-3, name


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.multi_process
def test_two_processes_equal_one(whole):
    assert_near(whole[2], whole[1])


@pytest.mark.multi_process
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_ends_in_the_same_weights(processes, train, whole, tmp_path):
    for step in (1, 6):  # before the first checkpoint, and after the second
        assert train(processes, tmp_path, signal.SIGKILL, step) == [-signal.SIGKILL] * processes
    assert len(checkpoints_in(tmp_path)) == 2
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])
    assert steps_logged(tmp_path) == list(range(STEPS))


@pytest.mark.multi_process
def test_sharded_training_goes_on_to_the_last_bit_and_on_one_process_nearly(train, whole, tmp_path):
    """FSDP2 on two processes: killed twice, then to the end; and killed, then to the end in one process."""
    reference, broken, alone = (tmp_path / name for name in ("reference", "broken", "alone"))
    for folder in (reference, broken, alone):
        folder.mkdir()
    assert train(2, reference, settings=FSDP2) == [0, 0]
    for step in (4, 6):
        assert train(2, broken, signal.SIGKILL, step, settings=FSDP2) == [-signal.SIGKILL] * 2
    tensors = load_file(checkpoints_in(broken)[-1] / "process-00001.safetensors")
    assert any(name.startswith("weight/") for name in tensors)  # each process wrote its shards
    assert train(2, broken, settings=FSDP2) == [0, 0]
    assert same(weights(broken), weights(reference))
    train(2, alone, signal.SIGKILL, 4, settings=FSDP2)
    assert train(1, alone) == [0]
    for folder in (reference, alone):
        assert_near(weights(folder), whole[1])


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_at_random_moments_change_nothing(processes, train, tmp_path):
    random.seed(processes)
    reference, broken, steps = tmp_path / "reference", tmp_path / "broken", 66
    reference.mkdir()
    broken.mkdir()
    assert train(processes, reference, steps=steps) == [0] * processes
    for kill in range(20):
        step, delay = 3 * kill + random.randrange(3), random.uniform(0, 0.1)
        codes = train(processes, broken, signal.SIGKILL, step, delay, steps=steps)
        assert set(codes) <= {-signal.SIGKILL, 0}, f"kill {kill} after step {step} + {delay:.3f} s: {codes}"
    assert train(processes, broken, steps=steps) == [0] * processes
    assert same(weights(broken), weights(reference))


@pytest.mark.multi_process
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_leaves_a_checkpoint_and_the_code_to_start_again(number, processes, train, whole, tmp_path):
    assert train(processes, tmp_path, number, step=4) == [75] * processes
    newest = checkpoints_in(tmp_path)[-1]
    assert json.loads((newest / INDEX).read_text())["step"] == len(steps_logged(tmp_path))
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])


@pytest.mark.multi_process
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_nearly_as_well(before, after, train, whole, tmp_path):
    train(before, tmp_path, signal.SIGKILL, step=4)
    assert train(after, tmp_path) == [0] * after
    assert_near(weights(tmp_path), whole[1])


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

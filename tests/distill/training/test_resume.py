"""Training that is cut short: checkpoints, signals, other numbers of processes, damage."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xlstm_distill.artifacts.locks import exclusive
from xlstm_distill.errors import RunError
from xlstm_distill.runtime import signals as stopping
from xlstm_distill.training.checkpoints import INDEX, Checkpoints
from xlstm_kernels.testing import error_ratio

STEPS = 10
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


@pytest.fixture(scope="module")
def train():
    """Run a training in so many processes; with a signal and a step, send it to all once the step is in the log."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[2] / "helpers" / "training_server.py")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def run(
        processes, folder, number=None, step=0, delay=0.0, steps=STEPS, settings=None, fault=None
    ):
        kill = None if number is None else {"step": step, "signal": int(number), "delay": delay}
        paths = {"out": str(folder / "out.safetensors"), "directory": str(folder / "work")}
        request = {
            "processes": processes,
            "steps": steps,
            "kill": kill,
            "settings": settings,
            "fault": fault,
        }
        server.stdin.write(json.dumps(request | paths) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(timeout=30)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out.safetensors")


def steps_logged(folder: Path) -> list[int]:
    return [
        json.loads(line)["step"]
        for line in (folder / "work" / "log.jsonl").read_text().splitlines()
    ]


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
        assert set(codes) <= {-signal.SIGKILL, 0}, (
            f"kill {kill} after step {step} + {delay:.3f} s: {codes}"
        )
    assert train(processes, broken, steps=steps) == [0] * processes
    assert same(weights(broken), weights(reference))


@pytest.mark.multi_process
@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_a_signal_leaves_a_checkpoint_and_the_code_to_start_again(
    number, processes, train, whole, tmp_path
):
    assert train(processes, tmp_path, number, step=4) == [75] * processes
    newest = checkpoints_in(tmp_path)[-1]
    assert json.loads((newest / INDEX).read_text())["step"] == len(steps_logged(tmp_path))
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])


@pytest.mark.multi_process
@pytest.mark.parametrize(("asked", "processes"), [(0, 1), (1, 2)])
def test_a_signal_in_the_last_validation_is_heard_and_nothing_is_lost(
    asked, processes, train, whole, tmp_path
):
    assert train(processes, tmp_path, fault={"stop_at_end": asked}) == [75] * processes
    assert checkpoints_in(tmp_path)[-1].name == f"step-{STEPS:08d}"
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])
    assert steps_logged(tmp_path) == list(range(STEPS))


def test_a_signal_that_comes_after_the_last_look_is_heard(monkeypatch):
    request = stopping._Request()
    monkeypatch.setattr(stopping, "_request", request)
    with (
        pytest.raises(stopping.Stopped, match="stopped by SIGUSR1 after the last step"),
        stopping.deferred(),
    ):
        request.receive(signal.SIGUSR1, None)
    with pytest.raises(ValueError, match="own"), stopping.deferred():  # another end goes first
        raise ValueError("own")


@pytest.mark.multi_process
def test_a_loss_that_is_not_finite_is_blamed_on_its_own_micro_batch_by_all_processes(
    train, tmp_path
):
    """Row 7 of step 2 is in the second micro-batch, rows 5 and 7, of the second of two processes."""
    assert train(2, tmp_path, fault={"bad_row": 2 * 8 + 7}) == [1, 1]
    one, two = ((tmp_path / "work" / f"error-{rank}").read_text() for rank in (0, 1))
    assert one == two
    alone = tmp_path / "alone"
    alone.mkdir()
    assert train(1, alone, fault={"bad_row": 2 * 8 + 7}) == [
        1
    ]  # there rows 6 and 7 are a micro-batch
    told = (alone / "work" / "error-0").read_text()
    names = [
        re.fullmatch(r"test: step 2: loss is nan, .*\(rows (\S+), (\S+)\); .*", text)
        for text in (one, told)
    ]
    assert names[0][2] == names[1][2]
    assert names[0][1] != names[1][1]


@pytest.mark.multi_process
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_nearly_as_well(before, after, train, whole, tmp_path):
    train(before, tmp_path, signal.SIGKILL, step=4)
    assert train(after, tmp_path) == [0] * after
    assert_near(weights(tmp_path), whole[1])


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight/a": torch.full((64,), float(step)),
        "generator/cpu": torch.arange(8, dtype=torch.uint8),
    }


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
    with pytest.raises(
        RunError, match=r"no checkpoint can be used: .*step-00000003.* Delete .* to start over"
    ):
        checkpoints.latest(said.append)
    assert "its checksum is not the one it was written with" in said[-1]


@pytest.mark.parametrize(
    "content", ["", '{"step": 3, "proc', "[]", "{}", '{"format": 1, "step": "3", "processes": 1}']
)
def test_a_damaged_index_is_named_and_the_checkpoint_before_it_is_used(content, tmp_path):
    checkpoints, said = Checkpoints(tmp_path, keep=2), []
    for step in (2, 3):
        checkpoints.save(step, tensors(step), {})
    (tmp_path / "step-00000003" / INDEX).write_text(content)
    assert checkpoints.latest(said.append).step == 2
    assert said == [
        f"checkpoint refused: {tmp_path / 'step-00000003' / INDEX}: not the index of a checkpoint"
    ]
    (tmp_path / "step-00000002" / INDEX).write_text(content)
    with pytest.raises(
        RunError, match=r"no checkpoint can be used: .*step-00000003.* Delete .* to start over"
    ):
        checkpoints.latest(said.append)


def test_a_checkpoint_and_its_name_are_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    done, fsync = [], os.fsync

    def watched(descriptor):
        there = sorted(p.name for p in tmp_path.iterdir())
        done.append(
            (
                Path(os.readlink(f"/proc/self/fd/{descriptor}"))
                .relative_to(tmp_path.resolve())
                .as_posix(),
                there,
            )
        )
        fsync(descriptor)

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(1), {})
    monkeypatch.setattr(os, "fsync", watched)
    checkpoints.save(2, tensors(2), {})
    partial = ".step-00000002.partial"
    assert [name for name, _ in done] == [
        f"{partial}/process-00000.safetensors",
        f"{partial}/{INDEX}",
        partial,
        ".",
    ]
    assert done[-1][1] == ["step-00000001", "step-00000002"]


def test_a_training_belongs_to_one_run_at_a_time(tmp_path):
    lock, said = tmp_path / ".lock", []

    def held():
        return exclusive(lock, tmp_path, said.append)

    with held(), pytest.raises(RunError, match="another process is at this training"), held():
        pass
    with held():
        pass
    assert not said


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_does_not_stop_a_training(
    number, tmp_path, monkeypatch
):
    def flock(stream, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with exclusive(tmp_path / ".lock", tmp_path, said.append):
        pass
    assert len(said) == 1
    assert f"{tmp_path / '.lock'}: cannot be locked" in said[0]


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, tensors(5), {})
    partial = tmp_path / ".step-00000009.partial"
    partial.mkdir()
    (partial / "process-00000.safetensors").write_bytes(b"half")
    assert checkpoints.latest(print).step == 5
    checkpoints.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    checkpoints.save(9, tensors(9), {})
    assert checkpoints.latest(print).step == 9

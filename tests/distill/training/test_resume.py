"""Training that is cut short: kills, signals, Ctrl-C, another number of processes."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import process_environment
from safetensors.torch import load_file

from xlstm_distill.runtime.signals import EXIT_CODE, INTERRUPTED
from xlstm_distill.training.checkpoints import INDEX
from xlstm_kernels.testing import error_ratio

pytestmark = pytest.mark.multi_process

SERVER = Path(__file__).parents[2] / "helpers" / "training_server.py"
STEPS = 10
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


def at(number: signal.Signals, step: int | None, delay: float = 0.0) -> dict[str, Any]:
    """A signal for all processes, sent once a step is in the log (None: once they sleep)."""
    return {"signal": int(number), "step": step, "delay": delay}


@pytest.fixture(scope="module")
def train():
    """Run a training in so many processes; returns their exit codes."""
    server = subprocess.Popen(
        [sys.executable, str(SERVER)],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=process_environment(),
    )

    def run(
        processes, folder, *signals, steps=STEPS, settings=None, fault=None, kind="distill"
    ) -> list[int]:
        request = {
            "kind": kind,
            "processes": processes,
            "steps": steps,
            "signals": signals,
            "settings": settings,
            "fault": fault,
            "out": str(folder / "out.safetensors"),
            "directory": str(folder / "work"),
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(timeout=30)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out.safetensors")


def steps_logged(folder: Path) -> list[int]:
    lines = (folder / "work" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted((folder / "work").glob("step-*"))


def next_step(folder: Path) -> int:
    """The step that the newest checkpoint goes on with."""
    return json.loads((checkpoints_in(folder)[-1] / INDEX).read_text())["step"]


def messages(folder: Path, processes: int) -> list[str]:
    return [(folder / "work" / f"message-{rank}").read_text() for rank in range(processes)]


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
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        # The input gate's bias has no true gradient: Adam amplifies what rounding makes of it.
        if not name.endswith("input_gate.bias"):
            assert error_ratio(weights[name], tensor.double()) < 1e-3, name


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_processes_equal_one(whole):
    assert_near(whole[2], whole[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_ends_in_the_same_weights(processes, train, whole, tmp_path):
    for step in (1, 6):  # before the first checkpoint, and after the second
        killed = train(processes, tmp_path, at(signal.SIGKILL, step))
        assert killed == [-signal.SIGKILL] * processes
    assert len(checkpoints_in(tmp_path)) == 2
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])
    assert steps_logged(tmp_path) == list(range(STEPS))


def test_sharded_training_goes_on_exactly_and_on_one_process_nearly(train, whole, tmp_path):
    """FSDP2 on two processes: killed twice, then to the end; killed, then to the end in one."""
    reference, broken, alone = (tmp_path / name for name in ("reference", "broken", "alone"))
    for folder in (reference, broken, alone):
        folder.mkdir()
    assert train(2, reference, settings=FSDP2) == [0, 0]
    for step in (4, 6):
        killed = train(2, broken, at(signal.SIGKILL, step), settings=FSDP2)
        assert killed == [-signal.SIGKILL] * 2
    tensors = load_file(checkpoints_in(broken)[-1] / "process-00001.safetensors")
    assert any(name.startswith("weight/") for name in tensors)  # each process wrote its shards
    assert train(2, broken, settings=FSDP2) == [0, 0]
    assert same(weights(broken), weights(reference))
    train(2, alone, at(signal.SIGKILL, 4), settings=FSDP2)
    assert train(1, alone) == [0]
    for folder in (reference, alone):
        assert_near(weights(folder), whole[1])


@pytest.mark.slow
def test_on_policy_training_is_the_same_however_it_is_cut(train, tmp_path):
    """One process, two, two of which both are killed, and two that each hold a part of the weights.

    The last ones sample with a whole copy, which gets the weights in every step.
    """
    one, two, broken, sharded = (tmp_path / name for name in ("one", "two", "broken", "sharded"))
    for folder in (one, two, broken, sharded):
        folder.mkdir()
    options = {"steps": 6, "kind": "refine"}
    assert train(1, one, **options) == [0]
    assert train(2, two, **options) == [0, 0]
    killed = train(2, broken, at(signal.SIGKILL, 3), **options)
    assert killed == [-signal.SIGKILL] * 2
    assert train(2, broken, **options) == [0, 0]
    assert same(weights(broken), weights(two))
    assert train(2, sharded, settings=FSDP2, **options) == [0, 0]
    for folder in (two, sharded):
        assert_near(weights(folder), weights(one))
        lengths = [sample_lengths(place) for place in (folder, one)]
        assert lengths[0] == lengths[1]


def sample_lengths(folder: Path) -> list[float]:
    """Mean length of the samples of every step: equal where all ends are at the same places."""
    lines = (folder / "work" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["sample_length"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_at_random_moments_change_nothing(processes, train, tmp_path):
    random.seed(processes)
    reference, broken, steps = tmp_path / "reference", tmp_path / "broken", 66
    reference.mkdir()
    broken.mkdir()
    assert train(processes, reference, steps=steps) == [0] * processes
    for kill in range(20):
        step, delay = 3 * kill + random.randrange(3), random.uniform(0, 0.1)
        codes = train(processes, broken, at(signal.SIGKILL, step, delay), steps=steps)
        moment = f"kill {kill} after step {step} + {delay:.3f} s: {codes}"
        assert set(codes) <= {-signal.SIGKILL, 0}, moment
    assert train(processes, broken, steps=steps) == [0] * processes
    assert same(weights(broken), weights(reference))


@pytest.mark.parametrize(
    ("number", "processes", "code"),
    [
        (signal.SIGTERM, 1, EXIT_CODE),
        (signal.SIGUSR1, 2, EXIT_CODE),
        (signal.SIGINT, 1, INTERRUPTED),
        (signal.SIGINT, 2, INTERRUPTED),
    ],
)
def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(
    number, processes, code, train, whole, tmp_path
):
    assert train(processes, tmp_path, at(number, step=4)) == [code] * processes
    step = next_step(tmp_path)
    assert step == len(steps_logged(tmp_path))
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    expected = (
        f"stopped by {name} after {step} of {STEPS} steps of test, with a checkpoint; "
        f"run the same command again to go on at step {step} of {STEPS}."
    )
    assert messages(tmp_path, processes) == [expected] * processes
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_ctrl_c_ends_at_once_and_the_checkpoint_before_counts(
    processes, train, whole, tmp_path
):
    """All processes sleep a minute in step 4: the first Ctrl-C waits for the end of the step."""
    started = time.monotonic()
    twice = at(signal.SIGINT, None), at(signal.SIGINT, None, delay=0.3)
    codes = train(processes, tmp_path, *twice, fault={"sleep_at": 4})
    assert codes == [INTERRUPTED] * processes
    assert time.monotonic() - started < 40
    assert next_step(tmp_path) == 3
    expected = f"Run the same command again: test goes on at step 3 of {STEPS}."
    assert messages(tmp_path, processes) == [expected] * processes
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])


@pytest.mark.parametrize(("asked", "processes"), [(0, 1), (1, 2)])
def test_a_signal_in_the_last_validation_is_heard_and_nothing_is_lost(
    asked, processes, train, whole, tmp_path
):
    stopped = train(processes, tmp_path, fault={"stop_at_end": asked})
    assert stopped == [EXIT_CODE] * processes
    assert checkpoints_in(tmp_path)[-1].name == f"step-{STEPS:08d}"
    assert train(processes, tmp_path) == [0] * processes
    assert same(weights(tmp_path), whole[processes])
    assert steps_logged(tmp_path) == list(range(STEPS))


def test_all_processes_name_the_micro_batch_whose_loss_is_not_finite(train, tmp_path):
    """Row 7 of step 2 is in the second micro-batch (rows 5 and 7) of the second of two ranks."""
    fault = {"bad_row": 2 * 8 + 7}
    assert train(2, tmp_path, fault=fault) == [1, 1]
    one, two = messages(tmp_path, 2)
    assert one == two
    alone = tmp_path / "alone"
    alone.mkdir()
    assert train(1, alone, fault=fault) == [1]  # there rows 6 and 7 are a micro-batch
    told = [one, *messages(alone, 1)]
    pattern = r"test: step 2: loss is nan, .*\(rows (\S+), (\S+)\); .*"
    names = [re.fullmatch(pattern, text) for text in told]
    assert names[0][2] == names[1][2]
    assert names[0][1] != names[1][1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_nearly_as_well(before, after, train, whole, tmp_path):
    train(before, tmp_path, at(signal.SIGKILL, 4))
    assert train(after, tmp_path) == [0] * after
    assert_near(weights(tmp_path), whole[1])

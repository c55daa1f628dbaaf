"""A rank ends when its launcher is gone or another rank has failed, and one of them speaks."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
import time

import psutil
import pytest
from processes import process_environment

from xlstm_distill.artifacts.locks import exclusive
from xlstm_distill.errors import RunError
from xlstm_distill.runtime.signals import EXIT_CODE
from xlstm_distill.runtime.watch import GRACE_SECONDS, LAUNCHER, Watch, _launcher


class Store:
    """A store in this process; `gone` makes it fail as torch's does."""

    def __init__(self):
        self.values, self.gone, self.asked = {}, False, 0

    def add(self, key, amount):
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def check(self, keys):
        self.asked += 1
        if self.gone:
            raise RuntimeError("Broken pipe")
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key].encode()

    def set(self, key, value):
        self.values[key] = value


@pytest.fixture
def ranks():
    """Two ranks on one store and one clock; `now` is the clock, `ended` their exit codes."""
    store, now, ended = Store(), [0.0], {}

    def make(rank):
        def end(code):
            ended.setdefault(rank, code)

        return Watch(None, lambda: store, end, lambda: now[0])

    return make(0), make(1), store, now, ended


def test_the_first_to_fail_speaks_and_the_others_end_with_its_code(ranks):
    one, two, _, now, ended = ranks
    one.look()
    two.look()
    assert two.fail(2) == (True, 2)
    assert one.fail(1) == (False, 2)
    one.look()
    now[0] = GRACE_SECONDS - 0.1
    one.look()
    assert not ended
    now[0] = GRACE_SECONDS
    one.look()
    assert ended == {0: 2}


def test_a_rank_that_hangs_ends_with_the_code_of_the_one_that_failed(ranks):
    one, two, _, now, ended = ranks
    one.fail(75)
    two.look()
    now[0] = GRACE_SECONDS
    two.look()
    assert ended == {1: 75}


def test_a_store_that_is_gone_does_not_end_a_healthy_rank(ranks):
    one, _, store, now, ended = ranks
    one.look()
    store.gone = True
    for second in range(100):
        now[0] = float(second)
        one.look()
    assert not ended
    assert store.asked == 2  # torch prints a page for each question that fails
    assert one.fail(2) == (True, 2)  # nobody else can have told


def test_only_a_process_that_a_launcher_started_looks_after_it():
    assert _launcher({}) is None
    assert _launcher({"RANK": "0", "WORLD_SIZE": "2"}) is None  # by hand, or by srun
    assert _launcher({"TORCHELASTIC_RUN_ID": "none"}) == os.getppid()
    assert _launcher({"TORCHELASTIC_RUN_ID": "none", LAUNCHER: "17"}) == 17


RANKS = """
import os, time
from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.runtime import ranks, signals

with one_line_errors(debug=False):
    ranks.wait_for_everyone()
    if ranks.process_index() == 0:
        raise OSError(5, "Input/output error", "model.safetensors")
    if ranks.process_index() == 1:
        ranks.wait_for_everyone()
    # As in a collective on GPUs, which does not notice that a rank is gone.
    with signals.deferred():
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_rank_that_fails_alone_ends_all_within_seconds_with_one_line(tmp_path):
    """Three ranks without a launcher that would end them, as under srun: 0 fails, 2 hangs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(3):
        environment = process_environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
        words = [sys.executable, "-c", RANKS]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(words, env=environment, stderr=pipe, text=True))
    try:
        errors = [started[0].communicate(timeout=200)[1]]
        failed = time.monotonic()
        errors += [process.communicate(timeout=60)[1] for process in started[1:]]
        assert time.monotonic() - failed < 4 * GRACE_SECONDS
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [1, 1, 1], errors
    said = "error: model.safetensors: Input/output error"
    lines = [line for text in errors for line in text.splitlines() if line.startswith("error")]
    assert lines == [said], errors


HOLDS_A_LOCK = """
import os, sys, time
from pathlib import Path
from xlstm_distill.artifacts.locks import exclusive
from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.runtime import signals

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
# As in a collective on GPUs, which neither ends nor hears of signals.
with one_line_errors(debug=False), signals.deferred():
    with exclusive(folder / f"lock-{rank}", "align", print):
        (folder / f"ready-{rank}").write_text(str(os.getpid()))
        time.sleep(600)
"""


@pytest.mark.multi_process
@pytest.mark.slow
def test_ranks_of_a_killed_launcher_end_and_free_their_locks(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    process = subprocess.Popen(
        [sys.executable, *launcher, sys.executable, "-c", HOLDS_A_LOCK, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(),
    )
    ready = [tmp_path / f"ready-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 200
    while not all(path.exists() and path.read_text() for path in ready):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = [psutil.Process(int(path.read_text())) for path in ready]
    lock = tmp_path / "lock-0"
    holder = re.escape(f"(pid {ranks[0].pid} on {platform.node()})")
    with pytest.raises(RunError, match=holder), exclusive(lock, "align", print):
        pass
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for rank in alive:
        rank.kill()
    assert not alive
    with exclusive(lock, "align", print):
        pass
    errors = process.communicate(timeout=10)[1]
    assert errors.count("is gone, so this run ends; run the same command again") == 1, errors


def test_a_rank_whose_launcher_was_gone_before_it_looked_ends_too(tmp_path):
    """`--launch` tells its ranks its process id; here it is that of another process."""
    command = "from xlstm_distill.runtime import watch; import time; watch.start(); time.sleep(60)"
    environment = process_environment(**{LAUNCHER: "1"})
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == EXIT_CODE
    assert done.stderr.startswith("error: the launcher (process 1) is gone")

"""Worker processes: one that dies is an error, and all end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xlstm_distill.data.tokenization import Chunk, ChunkTokenizer, DocumentTokenizer
from xlstm_distill.data.workers import tokenizing
from xlstm_distill.errors import RunError

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"


@pytest.mark.multi_process
def test_a_worker_that_dies_is_an_error_not_a_wait():
    tokenizer = ChunkTokenizer(
        DocumentTokenizer(AutoTokenizer.from_pretrained(TEACHER)), 256, "split"
    )
    chunk = Chunk([{"text": "sun"}], "f", "o", 0)
    before = multiprocessing.active_children()

    def workers():
        return [child for child in multiprocessing.active_children() if child not in before]

    with (
        pytest.raises(RunError, match=r"a process that tokenises has died.*fewer data.workers"),
        tokenizing(tokenizer, 2) as (submit, _),
    ):
        assert len(submit(chunk).result()) == 1
        # Both must be there: the one that is left must be ended too. A pool starts its second
        # worker for a chunk that comes while the first has one.
        while len(started := workers()) < 2:
            wait([submit(chunk) for _ in range(10)])
        os.kill(started[0].pid, signal.SIGKILL)
        while True:
            submit(chunk).result()
    assert not workers()


@pytest.mark.multi_process
def test_workers_end_with_a_killed_parent():
    code = f"""
        import multiprocessing, time
        from transformers import AutoTokenizer
        from xlstm_distill.data.workers import tokenizing
        from xlstm_distill.data.tokenization import Chunk, ChunkTokenizer, DocumentTokenizer
        tokenizer = DocumentTokenizer(AutoTokenizer.from_pretrained({str(TEACHER)!r}))
        tokenizer = ChunkTokenizer(tokenizer, 256, "split")
        with tokenizing(tokenizer, 1) as (submit, _):
            submit(Chunk([{{"text": "sun"}}], "f", "o", 0)).result()
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 1
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

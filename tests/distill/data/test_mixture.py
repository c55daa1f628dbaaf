"""Mixtures keep to their weights, and neither workers nor interruptions change them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xlstm_distill.data.mixture import Mixture, SourceProgress
from xlstm_distill.data.tokenization import ChunkTokenizer, DocumentTokenizer
from xlstm_distill.data.workers import tokenizing
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Domain, Source

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"


@pytest.fixture(scope="module")
def tokenizer():
    return ChunkTokenizer(DocumentTokenizer(AutoTokenizer.from_pretrained(TEACHER)), 256, "split")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def domain(tmp_path):
    """Short documents, long ones and chats."""
    short = write(tmp_path / "a.jsonl", [f"sun {n}" for n in range(1500)])
    long = write(tmp_path / "b.jsonl", [f"fog {n} " * 30 for n in range(300)])
    chats = Source(generator="chat", documents=300, weight=1.0)
    return Domain(sources=(Source(path=short, weight=3.0), Source(path=long, weight=2.0), chats))


def mixed(domain, tokenizer, workers=0, progress=None, count=None):
    with tokenizing(tokenizer, workers) as (submit, ahead):
        mixture = Mixture(domain, "data.domains.x", 0, submit, ahead, progress)
        return [tokens.ids.tolist() for tokens in islice(mixture, count)], mixture.progress


def test_tokens_keep_to_the_weights_at_every_point(domain, tokenizer):
    for count in (50, 400, 1200):
        _, progress = mixed(domain, tokenizer, count=count)
        total = sum(p.tokens for p in progress)
        longest = 30 * 8
        for weight, p in zip((3, 2, 1), progress, strict=True):
            assert abs(p.tokens - total * weight / 6) < 2 * longest


def test_a_source_that_runs_out_leaves_the_others_going(domain, tokenizer):
    found, progress = mixed(domain, tokenizer)
    assert all(p.dry for p in progress)
    assert [sum(p.outcomes.values()) for p in progress] == [1500, 300, 300]
    assert sum(len(ids) for ids in found) == sum(p.tokens for p in progress)


@pytest.mark.multi_process
def test_workers_change_nothing(domain, tokenizer):
    alone, progress = mixed(domain, tokenizer, count=1000)
    found, others = mixed(domain, tokenizer, 3, count=1000)
    assert found == alone
    assert others == progress


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 700, 1999])
def test_a_mixture_goes_on_exactly_from_its_progress(cut, domain, tokenizer):
    whole, _ = mixed(domain, tokenizer)
    found, progress = mixed(domain, tokenizer, count=cut)
    saved = [SourceProgress(**json.loads(json.dumps(asdict(p)))) for p in progress]
    rest, _ = mixed(domain, tokenizer, progress=saved)
    assert found + rest == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_ahead_waits_for_its_turn(workers, tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "sun", "n": n}) + "\n" for n in range(300)))
    numbers = Domain(
        sources=(Source(generator="math", documents=200), Source(path=str(path), text="n"))
    )
    with tokenizing(tokenizer, workers) as (submit, ahead):
        mixture = iter(Mixture(numbers, "data.domains.x", 0, submit, ahead))
        assert len(next(mixture))
        with pytest.raises(
            UserError, match=r"data.domains.x.sources\[1\]: record 1 of .*d.jsonl: its text is int"
        ):
            next(mixture)


def test_a_source_of_which_nothing_can_be_used_is_refused(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "tool", "content": "x"}] * 2}) + "\n"
            for _ in range(1100)
        )
    )
    message = (
        r"data.domains.x.sources\[0\]: of 1000 documents 1000 refused by the chat template left out "
        r"\(the first: Role tool is unknown.*\); nothing of it can be used"
    )
    with pytest.raises(UserError, match=message):
        mixed(Domain(sources=(Source(path=str(path)),)), tokenizer)


@pytest.mark.multi_process
def test_a_worker_that_dies_is_an_error_not_a_wait(domain, tokenizer):
    import multiprocessing

    with (
        pytest.raises(RunError, match=r"a process that tokenises has died.*fewer data.workers"),
        tokenizing(tokenizer, 2) as (submit, ahead),
    ):
        mixture = iter(Mixture(domain, "x", 0, submit, ahead))
        assert len(list(islice(mixture, 400))) == 400
        while len(multiprocessing.active_children()) < 2:  # the one that is left must be ended too
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        for _ in mixture:
            pass


@pytest.mark.multi_process
def test_workers_end_with_a_killed_parent():
    code = f"""
        import multiprocessing, time
        from transformers import AutoTokenizer
        from xlstm_distill.data.workers import tokenizing
        from xlstm_distill.data.tokenization import Chunk, ChunkTokenizer, DocumentTokenizer
        tokenizer = ChunkTokenizer(DocumentTokenizer(AutoTokenizer.from_pretrained({str(TEACHER)!r})), 256, "split")
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

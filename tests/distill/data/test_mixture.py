"""Mixtures keep to their weights; neither workers nor interruptions change them."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xlstm_distill.data.mixture import Mixture, SourceProgress
from xlstm_distill.data.tokenization import ChunkTokenizer, DocumentTokenizer
from xlstm_distill.data.workers import tokenizing
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Domain, Source

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"


@pytest.fixture(scope="module")
def tokenizer():
    return ChunkTokenizer(DocumentTokenizer(AutoTokenizer.from_pretrained(TEACHER)), 256, "split")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_places_that_another_version_wrote_are_refused():
    with pytest.raises(ValueError, match="another version of this package"):
        SourceProgress.restored({"position": {"visit": 1, "record": 3, "read": 9, "state": None}})


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    """Short documents, long ones and chats."""
    folder = tmp_path_factory.mktemp("texts")
    short = write(folder / "a.jsonl", [f"sun {n}" for n in range(1500)])
    long = write(folder / "b.jsonl", [f"fog {n} " * 30 for n in range(300)])
    chats = Source(generator="chat", documents=300, weight=1.0)
    return Domain(sources=(Source(path=short, weight=3.0), Source(path=long, weight=2.0), chats))


@pytest.fixture(scope="module")
def two_workers(tokenizer):
    """One pool for all tests here: its processes take seconds to start."""
    with tokenizing(tokenizer, 2) as pool:
        yield pool


def taken(domain, pool, progress=None, count=None):
    """Return the ids of the first documents of a mixture, and its progress after them."""
    mixture = Mixture(domain, "data.domains.x", 0, *pool, progress)
    return [tokens.ids.tolist() for tokens in islice(mixture, count)], mixture.progress


def mixed(domain, tokenizer, progress=None, count=None):
    with tokenizing(tokenizer, 0) as pool:
        return taken(domain, pool, progress, count)


@pytest.fixture(scope="module")
def whole(domain, tokenizer):
    """All documents and the progress at the end."""
    return mixed(domain, tokenizer)


def test_tokens_keep_to_the_weights_at_every_point(domain, tokenizer):
    for count in (50, 400, 1200):
        _, progress = mixed(domain, tokenizer, count=count)
        total = sum(p.tokens for p in progress)
        longest = 30 * 8
        for weight, p in zip((3, 2, 1), progress, strict=True):
            assert abs(p.tokens - total * weight / 6) < 2 * longest


def test_a_source_that_runs_out_leaves_the_others_going(whole):
    found, progress = whole
    assert all(p.dry for p in progress)
    assert [sum(p.outcomes.values()) for p in progress] == [1500, 300, 300]
    assert sum(len(ids) for ids in found) == sum(p.tokens for p in progress)


@pytest.mark.multi_process
def test_workers_change_nothing(domain, tokenizer, two_workers):
    alone, progress = mixed(domain, tokenizer, count=1000)
    found, others = taken(domain, two_workers, count=1000)
    assert found == alone
    assert others == progress


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 700, 1999])
def test_a_mixture_goes_on_exactly_from_its_progress(cut, domain, tokenizer, whole):
    found, progress = mixed(domain, tokenizer, count=cut)
    saved = [SourceProgress.restored(json.loads(json.dumps(asdict(p)))) for p in progress]
    rest, _ = mixed(domain, tokenizer, progress=saved)
    assert found + rest == whole[0]


@pytest.mark.parametrize("workers", ["none", pytest.param("two", marks=pytest.mark.multi_process)])
def test_an_error_ahead_waits_for_its_turn(workers, tokenizer, tmp_path, request):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": "sun", "n": n}) + "\n" for n in range(300)))
    numbers = Domain(
        sources=(Source(generator="math", documents=200), Source(path=str(path), text="n"))
    )

    def check(pool):
        mixture = iter(Mixture(numbers, "data.domains.x", 0, *pool))
        assert len(next(mixture))
        message = r"data.domains.x.sources\[1\]: record 1 of .*d.jsonl: its text is int"
        with pytest.raises(UserError, match=message):
            next(mixture)

    if workers == "two":
        check(request.getfixturevalue("two_workers"))
    else:
        with tokenizing(tokenizer, 0) as pool:
            check(pool)


def test_a_source_of_which_nothing_can_be_used_is_refused(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    refused = {"messages": [{"role": "tool", "content": "x"}] * 2}
    path.write_text((json.dumps(refused) + "\n") * 1100)
    message = (
        r"data.domains.x.sources\[0\]: of 1000 documents 1000 refused by the chat template left "
        r"out \(the first: Role tool is unknown.*\); nothing of it can be used"
    )
    with pytest.raises(UserError, match=message):
        mixed(Domain(sources=(Source(path=str(path)),)), tokenizer)

"""Domains: sources of each kind, mixed by tokens, and errors that name the field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlstm_distill.data import tokenizer_hash
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Domain, Source
from xlstm_distill.sources import identity, mixed_documents

TEACHER = Path(__file__).parents[2] / "recipes" / "quickstart" / "teacher"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEACHER)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def documents(tokenizer, *sources):
    return list(mixed_documents(Domain(sources=sources), tokenizer, field="data.domains.x", seed=0))


def test_using_a_tokenizer_does_not_change_its_hash(tokenizer):
    before = tokenizer_hash(tokenizer)
    documents(tokenizer, Source(generator="math", documents=3))
    tokenizer("one two three", padding="max_length", truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before


def test_marked_turns_equal_those_found_by_prefix(tokenizer):
    from xlstm_distill.embedded import documents as conversations
    from xlstm_distill.packing import DocumentTokenizer

    marked, by_prefix = DocumentTokenizer(tokenizer), DocumentTokenizer(tokenizer)
    assert marked.marks_turns
    by_prefix.marks_turns = False
    for conversation in conversations("chat", 50, 3):
        assert marked(conversation) == by_prefix(conversation)


def test_generators_are_seeded(tokenizer):
    source = Source(generator="stem", documents=20)
    first = documents(tokenizer, source)
    assert first == documents(tokenizer, source)
    assert len(first) == 20
    other = list(mixed_documents(Domain(sources=(source,)), tokenizer, field="x", seed=1))
    assert other != first


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"text": "sun fog"}, {}),
        ({"prompt": "Repeat: sun", "response": "sun"}, {}),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "sun"}]}, {}),
        ({"question": "hi", "answer": "sun"}, {"prompt": "question", "response": "answer"}),
    ],
    ids=["text", "prompt", "messages", "named"],
)
def test_each_style_of_a_local_file_is_read(record, columns, tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", [record] * 3)
    found = documents(tokenizer, Source(path=path, **columns))
    assert len(found) == 3
    supervised = tokenizer.decode([i for i, s in zip(found[0].ids, found[0].supervised, strict=True) if s])
    assert "sun" in supervised


def test_sources_keep_to_their_weights_in_tokens(tokenizer, tmp_path):
    short = write(tmp_path / "a.jsonl", [{"text": "sun"}] * 3000)
    long = write(tmp_path / "b.jsonl", [{"text": "fog " * 40}] * 3000)
    sources = Source(path=short, weight=3.0), Source(path=long, weight=1.0)
    found = documents(tokenizer, *sources)[:2000]
    lengths = [len(d.ids) for d in found]
    small = min(lengths)
    share = sum(n for n in lengths if n == small) / sum(lengths)
    assert share == pytest.approx(0.75, abs=0.02)


def test_a_local_file_is_identified_by_its_content(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "one"}])
    before = identity(Source(path=path))
    write(tmp_path / "d.jsonl", [{"text": "two"}])
    assert identity(Source(path=path)) != before


@pytest.mark.parametrize(
    ("records", "columns", "message"),
    [
        ([{"body": "x"}], {}, r"data.domains.x.sources\[0\]: .* none of the columns .*; it has body\."),
        ([{"text": "x"}], {"text": "body"}, r"data.domains.x.sources\[0\]: .* no column 'body'; it has text\."),
        ([], {}, r"data.domains.x.sources\[0\]: .* has no documents"),
    ],
    ids=["no known column", "missing column", "empty"],
)
def test_bad_sources_are_one_line(records, columns, message, tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", records)
    with pytest.raises(UserError, match=message) as caught:
        documents(tokenizer, Source(path=path, **columns))
    assert "\n" not in str(caught.value)


def test_a_folder_without_data_is_one_line(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"sources\[0\].path: .* holds no file that ends in \.json"):
        documents(tokenizer, Source(path=str(tmp_path)))

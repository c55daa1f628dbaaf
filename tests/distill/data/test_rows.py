"""What training reads: rows by index, their order, and how many of them a recipe needs."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_distill.artifacts import Artifact
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.data.budget import rows_needed
from xlstm_distill.data.packing import pack
from xlstm_distill.data.prepare import tokenizer_hash
from xlstm_distill.data.rows import DomainRows, load_batch
from xlstm_distill.data.schedule import BLOCK, RowSchedule
from xlstm_distill.data.shards import write_rows
from xlstm_distill.data.tokenization import Chunk, ChunkTokenizer, DocumentTokenizer, Tokens
from xlstm_distill.recipe import load_recipe

ROOT = Path(__file__).parents[3]
TEACHER = ROOT / "recipes" / "quickstart" / "teacher"


class Rows:
    """Stands for a domain of any number of rows."""

    def __init__(self, train_rows, validation=4):
        self.train_rows, self.validation = train_rows, validation


def names_of(schedule, total, batch=1):
    return [name for step in range(total // batch) for name, _ in schedule.rows(step, batch)]


MIXTURES = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(MIXTURES, st.integers(1, 3000))
def test_every_domain_keeps_to_its_weight_at_every_point(weights, total):
    mixture = {str(n): weight for n, weight in enumerate(weights)}
    schedule = RowSchedule({name: Rows(7) for name in mixture}, mixture, 0, total)
    order = np.array([int(name) for name in names_of(schedule, total)])
    drawn = np.cumsum(order[:, None] == np.arange(len(weights)), axis=0)
    share = np.array(weights) / sum(weights)
    # Rounding to the nearest gives half a row; when the n-th row is due is known to half a row per domain.
    bound = 0.5 + share * (len(weights) / 2 + 1)
    assert (np.abs(drawn - share * np.arange(1, total + 1)[:, None]) <= bound + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(MIXTURES, st.integers(0, 10**7), st.integers(0, 3))
def test_any_stretch_is_the_same_read_alone_or_in_passing(weights, start, seed):
    mixture = {str(n): weight for n, weight in enumerate(weights)}
    domains = {name: Rows(50) for name in mixture}
    passing = RowSchedule(domains, mixture, seed, start + 4 * int(BLOCK))
    first = start // 8
    rows = [passing.rows(step, 8) for step in range(first, first + 300)]
    for n in (299, 0, 150):
        assert (
            RowSchedule(domains, mixture, seed, start + 4 * int(BLOCK)).rows(first + n, 8)
            == rows[n]
        )
    assert [row for step in rows for row in step] == [
        row for step in range(2 * first, 2 * first + 600) for row in passing.rows(step, 4)
    ]


def test_an_epoch_reads_every_training_row_once_across_blocks():
    rows = int(1.5 * BLOCK)
    domains = {"a": Rows(rows), "b": Rows(1000)}
    schedule = RowSchedule(domains, {"a": 2.0, "b": 1.0, "none": 0.0}, 5, 6 * rows)
    read = [row for step in range(6 * rows // 8) for row in schedule.rows(step, 8)]
    of_a = [index for name, index in read if name == "a"]
    for epoch in range(len(of_a) // rows):
        assert sorted(of_a[epoch * rows : (epoch + 1) * rows]) == list(range(4, 4 + rows))
    assert of_a[:rows] != of_a[rows : 2 * rows]
    assert min(Counter(index for name, index in read if name == "b").values()) >= 3
    with pytest.raises(IndexError, match="beyond the schedule's"):
        schedule.rows(6 * rows // 8, 8)


@settings(max_examples=40, deadline=None)
@given(MIXTURES, st.lists(st.integers(1, int(1.5 * BLOCK)), min_size=1, max_size=3))
def test_schedules_in_turn_read_what_the_ones_before_did_not(weights, totals):
    mixture = {str(n): weight for n, weight in enumerate(weights)}
    domains = {name: Rows(sum(totals) + 3 * len(weights)) for name in [*mixture, "other"]}
    read, drawn = [], {"other": 3}
    for total in totals:
        schedule = RowSchedule(domains, mixture, 0, total, drawn)
        read += [row for step in range(total) for row in schedule.rows(step, 1)]
        drawn = schedule.drawn()
    assert len(set(read)) == len(read)
    counts = Counter(name for name, _ in read)
    assert drawn == {"other": 3} | {
        name: counts[name] for name, weight in mixture.items() if weight > 0
    }


def test_twenty_billion_tokens_cost_no_time_and_little_memory():
    total = 20_000_000_000 // 4096
    tracemalloc.start()
    started = time.process_time()
    schedule = RowSchedule(
        {n: Rows(total // 4) for n in "abcd"}, dict.fromkeys("abcd", 1.0), 0, total
    )
    made = time.process_time() - started
    schedule.rows(0, 64)
    schedule.rows(total // 64 - 1, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made < 0.1
    assert peak < 64 * 2**20


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    documents = [
        Tokens.of(rng.integers(3, 97, n).tolist(), [m > 1 for m in range(n)])
        for n in rng.integers(3, 40, 90)
    ]
    write_rows(tmp_path, pack(documents, 32, 0), context=32, vocabulary=97)
    return lambda *settings: DomainRows("a", Artifact(tmp_path, {}), *settings)


@pytest.mark.parametrize("validation", [1, 2, 5, 7, 16, 30])
def test_validation_rows_lie_evenly_over_the_domain(validation, rows):
    on_disk = rows(1)
    order = {on_disk.row(n).ids.tobytes(): n for n in range(len(on_disk))}
    found = rows(validation)
    places = [order[found.row(n).ids.tobytes()] for n in range(len(found))]
    assert sorted(places) == list(range(len(found)))  # every row once
    held_out = sorted(places[:validation])
    assert held_out == [n * len(found) // validation for n in range(validation)]
    assert found.train_rows == len(found) - validation


@pytest.mark.parametrize(
    ("validation", "span", "limit"),
    [(3, 20, 12), (3, 20, 40), (5, 5, 6), (4, 9, 999), (4, 999, 30)],
)
def test_fewer_rows_are_the_first_of_more(validation, span, limit, rows):
    every, some = rows(validation, span), rows(validation, span, limit)
    stored = len(rows(0))
    assert (len(every), len(some)) == (stored, min(limit, stored))
    assert some.train_rows == len(some) - validation
    for n in range(len(some)):
        assert (some.row(n).ids == every.row(n).ids).all()
    on_disk = rows(0)
    places = [
        next(n for n in range(stored) if (on_disk.row(n).ids == some.row(i).ids).all())
        for i in range(validation)
    ]
    assert sorted(places) == [n * min(span, stored) // validation for n in range(validation)]


def test_batches_are_rows_with_positions_per_document(rows):
    domain = rows(4)
    batch = load_batch({"a": domain}, [("a", 9), ("a", 0)])
    for row, (_, index) in enumerate(batch.rows):
        packed = domain.row(index)
        assert batch.input_ids[row].tolist() == packed.ids.tolist()
        positions = [n for length in [*packed.lengths, 32 - packed.used] for n in range(length)]
        assert batch.position_ids[row].tolist() == positions
        assert int(batch.real[row].sum()) == packed.used
        for t in range(31):
            same = packed.segment_ids[t] == packed.segment_ids[t + 1]
            label = int(packed.ids[t + 1]) if same and packed.supervised[t + 1] else -100
            assert int(batch.labels[row, t]) == label
    assert batch.labels[:, -1].tolist() == [-100, -100]


def needed(domain, *overrides):
    settings = [
        "data.validation_rows=5",
        "align.batch=16",
        "distill.batch=16",
        "distill.warmup_steps=0",
        *overrides,
    ]
    return rows_needed(load_recipe(ROOT / "recipes" / "quickstart.yaml", settings), domain)


def test_rows_are_needed_for_the_longest_use_in_whole_steps():
    math = "distill.experts={e: {phases: [{domain: math, tokens: 600_000}]}}"
    assert (
        needed("math", "align.tokens=60_000", math) == 147 * 16 + 5
    )  # 600,000 tokens are 146.5 steps of 16 x 256
    both = "distill.experts={e: {phases: [{domain: math, tokens: 600_000}, {domain: math, tokens: 4096}]}}"
    assert needed("math", "align.tokens=60_000", both) == 148 * 16 + 5
    chat = ["align.tokens=409_600", "align.domains={math: 3.0, chat: 1.0}"]
    chat.append("distill.experts={e: {phases: [{domain: chat, tokens: 8192}]}}")
    assert [needed(domain, *chat) for domain in ("math", "chat", "stem")] == [1205, 405, 5]


def test_using_a_tokenizer_does_not_change_its_hash():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    before = tokenizer_hash(tokenizer)
    tokenizer("one two three", padding="max_length", truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.chat_template += " "
    assert tokenizer_hash(tokenizer) != before


@pytest.mark.parametrize("setting", [{"bos_token": "sun"}, {"split_special_tokens": True}])
def test_settings_that_change_the_tokens_change_the_tokenizers_hash(setting):
    from transformers import AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(TEACHER) for _ in range(2)]
    assert len({tokenizer_hash(tokenizer) for tokenizer in tokenizers}) == 1
    for name, value in setting.items():
        setattr(tokenizers[0], name, value)
    assert len({tokenizer_hash(tokenizer) for tokenizer in tokenizers}) == 2


ASKED = [{"role": "user", "content": "Sort: fog sun"}, {"role": "assistant", "content": "fog sun"}]
GOLDEN = {
    "text": (
        [{"text": "one two"}, {"text": "three " * 30}, {"text": "Größe: 42 €"}],
        "cd19ad96c86532a8600848a5fcbcc290",
    ),
    "prompt and response": (
        [
            {"prompt": "Sort: fog sun", "response": "fog sun"},
            {"prompt": ASKED + ASKED[:1], "response": "sun"},
        ],
        "10a1ac50a227808ab6119f8d2060e33c",
    ),
    "messages": (
        [{"messages": ASKED}, {"messages": ASKED * 2}],
        "98318231f1a994fe001eee790fd50314",
    ),
}


@pytest.mark.parametrize("style", GOLDEN)
def test_rows_keep_their_meaning_or_their_format_is_raised(style):
    """The same documents make the same rows as when ROWS_FORMAT was last raised, by the embedded teacher's tokenizer.

    Where that tokenizer was trained anew, the hashes alone are to be renewed.
    """
    from transformers import AutoTokenizer

    documents, expected = GOLDEN[style]
    tokenizer = DocumentTokenizer(AutoTokenizer.from_pretrained(TEACHER))
    tokens = ChunkTokenizer(tokenizer, 32, "split")(Chunk(documents, "data", "golden", 0))
    rows = pack([piece for document in tokens for piece in document.pieces(32)], 32, 0)
    content = [
        [row.ids.tolist(), row.supervised.tolist(), row.segment_ids.tolist()] for row in rows
    ]
    assert digest(content) == expected, (
        f"{style}: rows have changed; raise data.ROWS_FORMAT and take the new hash."
    )


def test_the_measurement_measures(capsys):
    from xlstm_distill.benchmarks.data import main

    assert main([str(TEACHER), "--tokens", "100_000", "--workers", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["workers", "reading:", "order"]
    assert "89 rows" in lines[0]  # 25 to train on and 64 held out

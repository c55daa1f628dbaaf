"""The order of rows: domains keep to their weights, and an epoch reads every row once."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_distill.data.rows import IGNORE_INDEX, next_token_labels
from xlstm_distill.data.schedule import BLOCK, RowSchedule


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
    # Rounding to the nearest gives half a row. When the n-th row is due is known to half a row per
    # domain.
    bound = 0.5 + share * (len(weights) / 2 + 1)
    due = share * np.arange(1, total + 1)[:, None]
    assert (np.abs(drawn - due) <= bound + 1e-9).all()


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
        own = of_a[epoch * rows : (epoch + 1) * rows]
        assert sorted(own) == list(range(4, 4 + rows))
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


def test_rows_keep_to_weights_cover_epochs_and_never_touch_validation():
    rows_of_one = SimpleNamespace(train_rows=20, validation=4)
    domains = {"a": rows_of_one, "b": rows_of_one}

    def schedule(seed=0):
        return RowSchedule(domains, {"a": 3.0, "b": 1.0}, seed, 160)

    drawn = schedule()
    rows = [row for step in range(20) for row in drawn.rows(step, 8)]
    assert Counter(name for name, _ in rows) == {"a": 120, "b": 40}
    for name, epochs in (("a", 6), ("b", 2)):
        times = Counter(index for domain, index in rows if domain == name)
        assert times == dict.fromkeys(range(4, 24), epochs)
    for n in range(4, 160, 4):
        assert Counter(name for name, _ in rows[:n])["b"] == n // 4
    assert schedule().rows(7, 8) == rows[56:64]
    assert schedule(seed=1).rows(7, 8) != rows[56:64]


def test_labels_stay_in_their_document():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    supervised = torch.tensor([[True, False, True, True, True]])
    segments = torch.tensor([[0, 0, 0, 1, 1]])
    none = IGNORE_INDEX
    assert next_token_labels(ids, supervised, segments).tolist() == [[none, 7, none, 9, none]]

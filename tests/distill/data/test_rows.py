"""Rows of a domain by index, those that are held out, and batches of rows."""

from __future__ import annotations

import numpy as np
import pytest

from xlstm_distill.artifacts import Artifact
from xlstm_distill.data.packing import pack
from xlstm_distill.data.rows import DomainRows, load_batch
from xlstm_distill.data.shards import write_rows
from xlstm_distill.data.tokenization import Tokens


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    documents = []
    for length in rng.integers(3, 40, 90):
        supervised = [n > 1 for n in range(length)]
        documents.append(Tokens.of(rng.integers(3, 97, length).tolist(), supervised))
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
    order = {on_disk.row(n).ids.tobytes(): n for n in range(stored)}
    places = [order[some.row(n).ids.tobytes()] for n in range(validation)]
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

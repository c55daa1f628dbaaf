"""The order of rows: it keeps to the mixture's weights and never touches validation rows."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import torch

from xlstm_distill.data.rows import IGNORE_INDEX, next_token_labels
from xlstm_distill.data.schedule import RowSchedule


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

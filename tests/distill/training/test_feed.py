"""What a step reads: this rank's rows with their targets, read once and ahead of the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xlstm_distill.data.rows import load_batch
from xlstm_distill.errors import RunError
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.targets.codec import TargetRow
from xlstm_distill.targets.providers import StoredTargets, text_checksums
from xlstm_distill.training.feed import Feed
from xlstm_distill.training.objectives import DistillObjective
from xlstm_distill.training.plan import TrainingPlan


class KeptRows:
    """A store in memory: each token's target is its label; one row may be damaged."""

    def __init__(self, domain, damaged=None):
        self.domain, self.damaged, self.read = domain, damaged, []

    def row(self, row):
        self.read.append(row)
        if row == self.damaged:
            raise RunError(f"row {row} is damaged")
        batch = load_batch({"x": self.domain}, [("x", row)])
        labels = batch.labels[batch.labels != -100].numpy().astype(np.uint32)
        ones = np.ones(len(labels), np.int64)
        row = TargetRow(ones, labels, np.zeros(len(labels), np.float32), 0 * ones)
        return row, text_checksums(batch)[0]


@pytest.fixture
def feed_of(domains, stretch, distill_settings, distill_objective):
    def make(stores, rank=0, ranks=1):
        objective = DistillObjective(
            distill_objective().student, StoredTargets(stores), LossWeights(0.9, 0.1)
        )
        settings = distill_settings(micro_batch=1)
        plan = TrainingPlan("test", (stretch(3),), settings, None)
        return Feed(plan, objective, domains, rank, ranks, torch.device("cpu"))

    return make


def test_a_step_holds_the_targets_of_its_rows_and_every_row_is_read_once(feed_of, domains):
    stores = {name: KeptRows(rows) for name, rows in domains.items()}
    feeds = [feed_of(stores, rank, 2) for rank in range(2)]
    for step in range(3):
        parts = [feed.step(step) for feed in feeds]
        assert parts[0].rows == parts[1].rows
        read = [row for part in parts for batch in part.batches for row in batch.rows]
        assert sorted(read) == sorted(parts[0].rows)
        for part in parts:
            for batch in part.batches:
                labels = batch.labels[batch.labels != -100]
                assert torch.equal(batch.targets.ids[:, 0], labels)
                assert batch.to(torch.device("cpu")).targets is not None
            assert part.tokens == sum(len(batch.targets.tail) for batch in part.batches)
    schedule = feeds[0].plan.stretches[0].schedule
    planned = sorted(row for step in range(3) for row in schedule.rows(step, 4))
    assert sorted((name, row) for name in stores for row in stores[name].read) == planned


def test_the_training_reads_no_targets_by_itself(feed_of, domains):
    """The loss of a batch that carries its targets is that of the same batch without them."""
    stores = {name: KeptRows(rows) for name, rows in domains.items()}
    feed = feed_of(stores)
    batch = feed.step(0).batches[0]
    for store in stores.values():
        store.read.clear()
    carried = feed.objective(batch)
    assert not any(store.read for store in stores.values())
    read = feed.objective(load_batch(domains, batch.rows))
    assert torch.equal(carried.loss, read.loss)


def test_a_damaged_row_is_named_in_the_step_that_reads_it(feed_of, domains):
    whole = {name: KeptRows(rows) for name, rows in domains.items()}
    name, row = feed_of(whole).step(1).rows[0]
    stores = {**whole, name: KeptRows(domains[name], damaged=row)}
    with feed_of(stores).ahead(0) as steps:
        steps.take(0)
        with pytest.raises(RunError, match=f"row {row} is damaged"):
            steps.take(1)

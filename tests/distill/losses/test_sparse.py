"""The teacher's sparse targets."""

from __future__ import annotations

import torch

from xlstm_distill.losses.sparse import SparseTargets


def logits(seed, rows=5, vocabulary=11):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_targets_keep_the_top_of_the_distribution_and_the_rest_as_tail():
    full = logits(0).double().softmax(-1)
    targets = SparseTargets.from_logits(logits(0), 4)
    top = full.topk(4)
    assert torch.equal(targets.ids, top.indices)
    torch.testing.assert_close(targets.log_probs.double(), top.values.log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(targets.tail.double(), 1 - top.values.sum(-1), rtol=1e-4, atol=1e-6)


def test_targets_of_some_tokens_are_rows_of_all():
    targets = SparseTargets.from_logits(logits(0), 4)
    part = targets.rows(slice(1, 3))
    assert torch.equal(part.ids, targets.ids[1:3])
    assert torch.equal(part.log_probs, targets.log_probs[1:3])
    assert torch.equal(part.tail, targets.tail[1:3])


def test_sparse_targets_survive_a_small_vocabulary():
    targets = SparseTargets.from_logits(torch.randn(3, 5), top_k=256)
    assert targets.ids.shape == (3, 5)

"""Sparse targets."""

from __future__ import annotations

import torch

from xlstm_distill.losses.sparse import SparseTargets


def test_sparse_targets_survive_a_small_vocabulary():
    targets = SparseTargets.from_logits(torch.randn(3, 5), top_k=256)
    assert targets.ids.shape == (3, 5)

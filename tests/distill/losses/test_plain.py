"""Losses against formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill.losses.plain import alignment_error, distill_loss, sparse_kl
from xlstm_distill.losses.sparse import SparseTargets


def logits(seed, rows=5, vocabulary=11):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("top_k", [1, 3, 11, 50])
def test_sparse_kl_is_the_kl_of_the_restricted_distributions(top_k):
    teacher, student = logits(0), logits(1)
    k = min(top_k, 11)
    ids = teacher.topk(k).indices
    p, q = (x.double().softmax(-1).gather(-1, ids) for x in (teacher, student))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    expected = (p * (p / q).log()).sum(-1)
    actual = sparse_kl(student, SparseTargets.from_logits(teacher, top_k))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_kl_to_itself_is_zero_and_its_gradient_too():
    student = logits(0).requires_grad_()
    kl = sparse_kl(student, SparseTargets.from_logits(student.detach(), 11)).sum()
    kl.backward()
    assert kl.abs() < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_distill_loss_sums_both_parts():
    labels = torch.tensor([1, 2, 3, 4, 5])
    targets = SparseTargets.from_logits(logits(0), 4)
    parts = distill_loss(logits(1), labels, targets)
    expected = -logits(1).double().log_softmax(-1)[torch.arange(5), labels].sum()
    torch.testing.assert_close(parts.cross_entropy.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.kl, sparse_kl(logits(1), targets).sum())


def test_alignment_ignores_padding():
    student, teacher = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
    teacher[0, 2] = torch.nan_to_num(torch.tensor(1e6))
    error, power = alignment_error(student, teacher, torch.tensor([[True, True, False]]))
    assert (float(error), float(power)) == (8.0, 0.0)

"""The fused loss against the plain formula in float64: values and gradients, in any chunks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from xlstm_distill.losses import fused as fused_loss
from xlstm_distill.losses.fused import (
    chunk_rows,
    linear_distill_loss,
    targets_from_hidden,
)
from xlstm_distill.losses.plain import LossWeights, distill_loss, sparse_kl
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_kernels.testing import error_ratio

CE, KL = 0.9, 0.1
WEIGHTS = LossWeights(CE, KL)
WITH_TAIL = LossWeights(CE, KL, kl_tail=True)
LEAVES = ("hidden", "weight", "bias")


def problem(tokens=50, vocabulary=301, width=16, top_k=24, bias=True, padded=False):
    """Draw inputs, labels and targets; `padded` blanks entries of each row, never its first."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.5
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    targets = SparseTargets.from_logits(
        3 * torch.randn(tokens, vocabulary, generator=generator), top_k
    )
    if padded:
        blank = torch.rand(targets.ids.shape, generator=generator) < 0.5
        blank[:, 0] = False
        targets = blanked(targets, blank)
    return (
        [hidden, weight, torch.randn(vocabulary, generator=generator) if bias else None],
        labels,
        targets,
    )


def blanked(targets, blank):
    return SparseTargets(
        targets.ids.masked_fill(blank, 0),
        targets.log_probs.masked_fill(blank, -math.inf),
        targets.tail,
    )


def formula(hidden, weight, bias, labels, targets):
    """Sum cross-entropy and sparse KL row by row, over the entries that are no padding."""
    log_q = (hidden @ weight.T + (0 if bias is None else bias)).log_softmax(-1)
    cross_entropy, kl = hidden.sum() * 0, hidden.sum() * 0
    for row, label in enumerate(labels):
        there = targets.log_probs[row] > -math.inf
        p = targets.log_probs[row][there].to(hidden).log_softmax(-1)
        q = log_q[row][targets.ids[row][there]].log_softmax(-1)
        cross_entropy = cross_entropy - log_q[row, label]
        kl = kl + (p.exp() * (p - q)).sum()
    return CE * cross_entropy + KL * kl, cross_entropy, kl


def fused(hidden, weight, bias, labels, targets, chunk=None):
    total, parts = linear_distill_loss(
        hidden, weight, bias, labels, targets, WEIGHTS, chunk=chunk
    )  # fmt: skip
    return total, parts.cross_entropy, parts.kl


def results(loss, leaves, *rest, dtype=torch.float32, scale=1.0):
    """Values and gradients by name; the loss is multiplied by `scale` before its backward pass."""
    copies = [
        None if x is None else x.detach().to(dtype, copy=True).requires_grad_() for x in leaves
    ]
    total, cross_entropy, kl = loss(*copies, *rest)
    (total * scale).backward()
    found = {"total": total, "cross_entropy": cross_entropy, "kl": kl}
    return {k: v.detach() for k, v in found.items()} | {
        f"d{name}": x.grad for name, x in zip(LEAVES, copies, strict=True) if x is not None
    }


def assert_close(actual, expected, bound):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert error_ratio(actual[name], value) < bound, name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 7, 49, 50, 64])
def test_values_and_gradients_equal_the_formula(chunk, padded, bias):
    leaves, labels, targets = problem(bias=bias, padded=padded)
    expected = results(formula, leaves, labels, targets, dtype=torch.float64)
    assert_close(results(fused, leaves, labels, targets, chunk), expected, 1e-6)


def test_the_plain_loss_equals_the_formula_with_padded_targets():
    leaves, labels, targets = problem(padded=True)

    def plain(hidden, weight, bias, labels, targets):
        parts = distill_loss(F.linear(hidden, weight, bias), labels, targets)
        return CE * parts.cross_entropy + KL * parts.kl, parts.cross_entropy, parts.kl

    expected = results(formula, leaves, labels, targets, dtype=torch.float64)
    assert_close(results(plain, leaves, labels, targets), expected, 1e-6)


def tail_formula(hidden, weight, bias, labels, targets):
    """Sum cross-entropy and KL row by row; all tokens outside of the targets are one outcome."""
    log_q = (hidden @ weight.T + (0 if bias is None else bias)).log_softmax(-1)
    cross_entropy, kl = hidden.sum() * 0, hidden.sum() * 0
    for row, label in enumerate(labels):
        there = targets.log_probs[row] > -math.inf
        kept = targets.ids[row][there]
        outside = torch.ones(len(weight), dtype=torch.bool)
        outside[kept] = False
        mine = torch.cat([log_q[row][kept], log_q[row][outside].logsumexp(0)[None]])
        teacher = torch.cat(
            [targets.log_probs[row][there].to(hidden).exp(), targets.tail[row].to(hidden)[None]]
        )
        teacher = teacher / teacher.sum()
        cross_entropy = cross_entropy - log_q[row, label]
        kl = kl + (teacher * (teacher.log() - mine)).sum()
    return CE * cross_entropy + KL * kl, cross_entropy, kl


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 7, 64])
def test_the_tail_as_one_outcome_equals_its_formula(chunk, padded):
    leaves, labels, targets = problem(padded=padded)
    if padded:  # what was blanked belongs to the tail
        mass = targets.log_probs.double().exp().sum(-1)
        targets = SparseTargets(targets.ids, targets.log_probs, (1 - mass).float())

    def plain(hidden, weight, bias, labels, targets):
        parts = distill_loss(F.linear(hidden, weight, bias), labels, targets, kl_tail=True)
        return CE * parts.cross_entropy + KL * parts.kl, parts.cross_entropy, parts.kl

    def in_chunks(hidden, weight, bias, labels, targets):
        total, parts = linear_distill_loss(
            hidden,
            weight,
            bias,
            labels,
            targets,
            WITH_TAIL,
            chunk=chunk,
        )
        return total, parts.cross_entropy, parts.kl

    expected = results(tail_formula, leaves, labels, targets, dtype=torch.float64)
    assert_close(results(in_chunks, leaves, labels, targets), expected, 1e-6)
    assert_close(results(plain, leaves, labels, targets), expected, 1e-6)


def test_few_tokens_and_the_tail_see_what_renormalised_ones_do_not():
    """With few tokens kept, only the KL with the tail has nearly the full KL's gradient."""
    generator = torch.Generator().manual_seed(0)
    teacher = 4 * torch.randn(64, 500, generator=generator)
    student = (teacher + torch.randn(64, 500, generator=generator)).requires_grad_()
    full = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    )
    exact = torch.autograd.grad(full, student)[0].flatten()
    targets = SparseTargets.from_logits(teacher, 256).keep_mass(0.9)
    cosine = {}
    for tail in (False, True):
        kl = distill_loss(student, torch.zeros(64, dtype=torch.long), targets, kl_tail=tail).kl
        gradient = torch.autograd.grad(kl, student)[0].flatten()
        cosine[tail] = float(F.cosine_similarity(exact, gradient, dim=0))
    assert cosine[False] < 0.97 < cosine[True]


def test_a_vocabulary_that_is_kept_whole_has_no_tail():
    leaves, labels, targets = problem(vocabulary=20, top_k=64)
    _, parts = linear_distill_loss(*leaves, labels, targets, WITH_TAIL)
    restricted = results(fused, leaves, labels, targets)
    assert float(parts.kl) == pytest.approx(float(restricted["kl"]), rel=1e-5)
    copies = [x.clone().requires_grad_() for x in leaves]
    linear_distill_loss(*copies, labels, targets, WITH_TAIL)[0].backward()
    for name, leaf in zip(LEAVES, copies, strict=True):
        assert error_ratio(leaf.grad, restricted[f"d{name}"].double()) < 1e-5, name


def test_padded_entries_are_as_if_they_were_not_there():
    leaves, labels, targets = problem(top_k=8)
    wide = SparseTargets(
        F.pad(targets.ids, (0, 5)), F.pad(targets.log_probs, (0, 5), value=-math.inf), targets.tail
    )  # fmt: skip
    logits = F.linear(*leaves)
    torch.testing.assert_close(
        sparse_kl(logits, wide), sparse_kl(logits, targets), rtol=1e-6, atol=1e-7
    )
    assert_close(
        results(fused, leaves, labels, wide), results(fused, leaves, labels, targets), 1e-6
    )


def test_large_logits_and_a_teacher_sure_of_its_token_stay_finite():
    leaves, labels, targets = problem(padded=True)
    leaves[1] *= 200
    blank = torch.ones_like(targets.ids, dtype=torch.bool)
    blank[:, 0] = False
    sure = blanked(targets, blank)  # one token kept: renormalised, its KL is 0
    expected = results(formula, leaves, labels, sure, dtype=torch.float64)
    actual = results(fused, leaves, labels, sure)
    assert actual["kl"] == 0
    for name in ("total", "dhidden", "dweight", "dbias"):
        assert error_ratio(actual[name], expected[name]) < 1e-5, (
            name
        )  # rounding of logits of about 1000


@pytest.mark.parametrize("mass", [None, 0.9])
def test_a_student_sure_of_other_tokens_has_a_finite_loss_with_the_tail(mass):
    """fp32 cannot hold its probability of the teacher's tokens, or of all others."""
    leaves, labels, targets = problem(bias=False)
    leaves[1] *= 60
    targets = targets.keep_mass(mass)
    labels[:10] = targets.ids[:10, 0]
    leaves[1][targets.ids[1]] += 1000 * leaves[0][1] / leaves[0][1].norm()

    def tail(*inputs):
        total, parts = linear_distill_loss(*inputs, WITH_TAIL)
        return total, parts.cross_entropy, parts.kl

    expected = results(tail_formula, leaves, labels, targets, dtype=torch.float64)
    assert_close(
        results(tail, leaves, labels, targets), expected, 1e-5
    )  # rounding of logits of about 1000


def test_no_tokens_give_zero_and_zero_gradients():
    leaves, labels, targets = problem(tokens=0)
    for name, value in results(fused, leaves, labels, targets).items():
        assert torch.equal(value, torch.zeros_like(value)), name


@pytest.mark.parametrize("scale", [0.0, 8 / 12345, 1024.0])
def test_a_factor_on_the_loss_is_one_on_its_gradients(scale):
    leaves, labels, targets = problem()
    once, scaled = (results(fused, leaves, labels, targets, 16, scale=s) for s in (1.0, scale))
    for name in ("dhidden", "dweight", "dbias"):
        torch.testing.assert_close(scaled[name], once[name] * scale, rtol=1e-6, atol=0.0)


def test_micro_batches_add_up_to_the_batch():
    leaves, labels, targets = problem()
    whole = results(fused, leaves, labels, targets)
    copies = [x.clone().requires_grad_() for x in leaves]
    for piece in (slice(0, 13), slice(13, 13), slice(13, 50)):
        part = SparseTargets(targets.ids[piece], targets.log_probs[piece], targets.tail[piece])
        fused(copies[0][piece], *copies[1:], labels[piece], part, 5)[0].backward()
    for name, x in zip(LEAVES, copies, strict=True):
        assert error_ratio(x.grad, whole[f"d{name}"].double()) < 1e-6, name


def test_only_what_is_trained_gets_a_gradient_and_no_gradient_mode_makes_none():
    (hidden, weight, bias), labels, targets = problem()
    full = results(fused, (hidden, weight, bias), labels, targets)
    hidden.requires_grad_()
    total = fused(hidden, weight, bias, labels, targets)[0]
    total.backward()
    assert torch.equal(hidden.grad, full["dhidden"])
    assert weight.grad is None
    with torch.no_grad():
        total = fused(hidden, weight.requires_grad_(), bias, labels, targets)[0]
    assert not total.requires_grad
    assert torch.equal(total, full["total"])
    assert not any(part.requires_grad for part in fused(hidden, weight, bias, labels, targets)[1:])


def test_a_second_backward_pass_and_a_second_derivative_are_refused():
    (hidden, weight, bias), labels, targets = problem()
    total = fused(hidden.requires_grad_(), weight, bias, labels, targets)[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used its gradients up already; compute the loss again"):
        total.backward()
    total = fused(hidden, weight, bias, labels, targets)[0]
    with pytest.raises(RuntimeError, match="first derivatives only; leave create_graph=True out"):
        torch.autograd.grad(total, hidden, create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_products_are_added_up_in_fp32(autocast, monkeypatch):
    """Many chunks must lose no more digits than one: only products are rounded."""
    monkeypatch.setattr(fused_loss, "WEIGHT_BLOCK", 100)
    leaves, labels, targets = problem(tokens=512, padded=True)
    leaves = [x.bfloat16().float() for x in leaves]
    dtype = torch.float32 if autocast else torch.bfloat16
    expected = results(formula, leaves, labels, targets, dtype=torch.float64)
    for chunk in (2, 512):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            actual = results(fused, leaves, labels, targets, chunk, dtype=dtype)
        assert actual["total"].dtype == torch.float32
        assert actual["dweight"].dtype == actual["dhidden"].dtype == dtype
        assert error_ratio(actual["total"], expected["total"]) < 1e-4
        for name in ("dhidden", "dweight", "dbias"):
            assert error_ratio(actual[name], expected[name]) < 5e-3, (chunk, name)


@pytest.mark.parametrize(("tokens", "rows"), [(0, 1), (1, 1), (7, 7), (10, 10), (11, 6), (31, 8)])
def test_chunks_are_of_about_equal_size_within_the_memory(tokens, rows):
    assert chunk_rows(tokens, vocabulary=100, memory=4 * 100 * 10 + 399) == rows


def test_a_vocabulary_beyond_the_memory_goes_token_by_token():
    assert chunk_rows(5, vocabulary=100, memory=10) == 1


def test_shapes_that_do_not_fit_are_named():
    (hidden, weight, bias), labels, targets = problem()
    with pytest.raises(ValueError, match=r"weight \(0,\): must be .*use FusedHead"):
        fused(hidden, torch.empty(0), bias, labels, targets)
    with pytest.raises(
        ValueError, match=r"labels \(49,\), targets \(50, 24\): must be \(50,\) and \(50, k\)"
    ):
        fused(hidden, weight, bias, labels[1:], targets)


@pytest.mark.parametrize("chunk", [None, 7, 64])
@pytest.mark.parametrize("top_k", [24, 400])
def test_targets_from_hidden_states_equal_those_from_logits(top_k, chunk):
    leaves, _, _ = problem()
    expected = SparseTargets.from_logits(F.linear(*(x.double() for x in leaves)), top_k)
    actual = targets_from_hidden(*leaves, top_k, chunk=chunk)
    assert torch.equal(actual.ids, expected.ids)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.tail, expected.tail, rtol=1e-4, atol=1e-6)
    assert targets_from_hidden(leaves[0][:0], *leaves[1:], top_k).ids.shape == (0, min(top_k, 301))

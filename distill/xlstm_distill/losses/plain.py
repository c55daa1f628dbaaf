"""The losses of both training stages, written on logits and heads as the paper states them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_distill.losses.sparse import SparseTargets


@dataclass(frozen=True)
class LossWeights:
    """How stage II weighs its two losses, and which KL it takes (paper, Eq. 13).

    cross_entropy, kl: the factors γ and β. kl_tail: take `tail_kl` instead of `sparse_kl`.
    """

    cross_entropy: float
    kl: float
    kl_tail: bool = False


@dataclass(frozen=True)
class LossParts:
    """Sums over kept tokens of cross-entropy and KL, in nats, not weighted."""

    cross_entropy: Tensor
    kl: Tensor


def sparse_kl(logits: Tensor, targets: SparseTargets) -> Tensor:
    """KL(teacher || student), both restricted to the teacher's top k and renormalised (Eq. 13).

    logits (K, V); returns (K,) in nats. Padded entries of the targets give neither value nor
    gradient.
    """
    padding = targets.log_probs == -math.inf
    # A log-softmax over kept log-probabilities subtracts the logarithm of their mass.
    teacher = targets.log_probs.float().log_softmax(dim=-1)
    kept = logits.float().gather(-1, targets.ids)
    student = kept.masked_fill(padding, -math.inf).log_softmax(dim=-1)
    # At padding both are -inf, and their difference is not a number.
    difference = (teacher - student).masked_fill(padding, 0.0)
    return (teacher.exp() * difference).sum(dim=-1)


def tail_kl(logits: Tensor, targets: SparseTargets) -> Tensor:
    """KL(teacher || student) where all tokens outside of the targets are one outcome.

    That outcome has the mass of the targets' tail. Where few tokens hold almost all of the
    teacher's mass, `sparse_kl` sees next to nothing of the student: renormalised, a single token
    is certain in both. This KL sees what the student gives to the rest.

    logits (K, V); returns (K,) in nats.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    padding = targets.log_probs == -math.inf
    # Padding has id 0, which is a token like any other. A row's first entry is never padding.
    ids = torch.where(padding, targets.ids[:, :1], targets.ids)
    rest = log_probs.scatter(-1, ids, -math.inf).logsumexp(dim=-1, keepdim=True)
    log_tail = targets.tail[:, None].float().log()
    teacher = torch.cat([targets.log_probs.float(), log_tail], dim=-1).log_softmax(dim=-1)
    student = torch.cat([log_probs.gather(-1, ids), rest], dim=-1)
    # Padding, no tail in the teacher, or no token outside of the targets in the student.
    nothing = (teacher == -math.inf) | (student == -math.inf)
    return (teacher.exp() * (teacher - student).masked_fill(nothing, 0.0)).sum(dim=-1)


def distill_loss(
    logits: Tensor, labels: Tensor, targets: SparseTargets, *, kl_tail: bool = False
) -> LossParts:
    """Sum cross-entropy and `sparse_kl` (or `tail_kl`) over the kept tokens (paper, Eq. 13).

    logits (K, V) at the kept tokens, labels (K,), targets of the same K tokens. The caller weighs
    the two sums and divides them by the kept tokens of the whole optimiser step.
    """
    cross_entropy = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    kl = tail_kl(logits, targets) if kl_tail else sparse_kl(logits, targets)
    return LossParts(cross_entropy, kl.sum())


def alignment_error(student: Tensor, teacher: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the squared error between heads' outputs, and the teacher's squared norm (Eq. 12).

    student, teacher (B, T, H * D) before the output projection; real (B, T) bool, False at
    padding, which counts in neither sum. Returns two scalars, fp32 whatever the inputs' dtype.
    Their ratio is the share of the teacher's output that the student misses.
    """
    # In fp32 from the difference on: in bf16 a sum over B * T * H * D squares would stop growing.
    weight = real[..., None].float()
    error = ((student.float() - teacher.float()).square() * weight).sum()
    return error, (teacher.float().square() * weight).sum()

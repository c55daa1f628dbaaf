"""Losses of both training stages, as pure functions of tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xlstm_distill.losses.sparse import SparseTargets


@dataclass(frozen=True)
class LossParts:
    """Sums over kept tokens of cross-entropy and sparse KL, in nats."""

    cross_entropy: Tensor
    kl: Tensor


def sparse_kl(logits: Tensor, targets: SparseTargets) -> Tensor:
    """KL(teacher || student) of the distributions restricted to the teacher's top k and renormalised (paper, Eq. 13).

    logits (K, V); returns (K,) in nats. Padded entries of the targets give neither value nor gradient.
    """
    padding = targets.log_probs == -math.inf
    teacher = targets.log_probs.float().log_softmax(
        dim=-1
    )  # restricting is renormalising: subtract log of the mass
    student = (
        logits.float().gather(-1, targets.ids).masked_fill(padding, -math.inf).log_softmax(dim=-1)
    )
    return (teacher.exp() * (teacher - student).masked_fill(padding, 0.0)).sum(dim=-1)


def tail_kl(logits: Tensor, targets: SparseTargets) -> Tensor:
    """KL(teacher || student) in which all tokens that the targets leave out are one outcome, with the tail's mass.

    Where few tokens hold almost all of the teacher's mass, `sparse_kl` sees next to nothing of the student:
    renormalised, a single token is certain in both. This sees what the student gives to the rest. logits (K, V);
    returns (K,) in nats.
    """
    log_probs = logits.float().log_softmax(dim=-1)
    padding = targets.log_probs == -math.inf
    ids = torch.where(
        padding, targets.ids[:, :1], targets.ids
    )  # a row's first entry is never padding
    rest = log_probs.scatter(-1, ids, -math.inf).logsumexp(dim=-1, keepdim=True)
    teacher = torch.cat(
        [targets.log_probs.float(), targets.tail[:, None].float().log()], dim=-1
    ).log_softmax(dim=-1)
    student = torch.cat([log_probs.gather(-1, ids), rest], dim=-1)
    nothing = (teacher == -math.inf) | (
        student == -math.inf
    )  # padding, no tail, or no token outside
    return (teacher.exp() * (teacher - student).masked_fill(nothing, 0.0)).sum(dim=-1)


def distill_loss(
    logits: Tensor, labels: Tensor, targets: SparseTargets, *, kl_tail: bool = False
) -> LossParts:
    """Cross-entropy with the labels and sparse KL (or `tail_kl`), summed over kept tokens (paper, Eq. 13).

    logits (K, V) at the kept tokens, labels (K,), targets of the same K tokens. The caller weighs the two and divides
    by the number of kept tokens of the whole optimiser step.
    """
    cross_entropy = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    kl = tail_kl(logits, targets) if kl_tail else sparse_kl(logits, targets)
    return LossParts(cross_entropy, kl.sum())


def alignment_error(student: Tensor, teacher: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error between heads' outputs, and the teacher's squared norm, summed over real tokens (paper, Eq. 12).

    student, teacher (B, T, H * D) before the output projection; real (B, T) bool. Returns two scalars, fp32; their
    ratio is the share of the teacher's output that the student misses.
    """
    weight = real[..., None].float()
    error = ((student.float() - teacher.float()).square() * weight).sum()
    return error, (teacher.float().square() * weight).sum()

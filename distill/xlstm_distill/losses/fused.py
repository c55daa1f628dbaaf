"""The distillation loss, and the teacher's targets, straight from hidden states: no (N, V) tensor of logits.

Tokens are taken in chunks. The logits of one chunk exist at a time and are turned into their own gradient in place; the
gradients of hidden states and head are gathered on the way (docs/losses.md: what that saves, and what it costs).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from xlstm_distill.errors import UserError
from xlstm_distill.losses.plain import LossParts
from xlstm_distill.losses.sparse import SparseTargets

CHUNK_BYTES = 256 * 2**20
"""Memory for the fp32 logits of a chunk."""
WEIGHT_BLOCK = 16384
"""Rows of the head whose gradient is computed at once in low precision, before it is added up in fp32."""

Reduced = TypeVar("Reduced")


def chunk_rows(tokens: int, vocabulary: int, memory: int = CHUNK_BYTES) -> int:
    """Tokens of a chunk: as many as `memory` bytes hold fp32 logits of, in chunks of about the same size."""
    most = max(1, memory // (4 * vocabulary))
    return math.ceil(tokens / math.ceil(tokens / most)) if tokens else 1


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    targets: SparseTargets,
    *,
    ce_weight: float,
    kl_weight: float,
    kl_tail: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, LossParts]:
    """ce_weight · cross-entropy + kl_weight · sparse KL of the logits `hidden @ weight.T + bias` (paper, Eq. 13).

    hidden (N, d) of the kept tokens, weight (V, d), bias (V,), labels (N,) in 0..V-1, targets of the same N tokens;
    `chunk` tokens at a time (default: `chunk_rows`). Returns the weighted sum over tokens, to differentiate, and its
    two parts, which carry no gradient. Equal to `distill_loss`, `kl_tail` too; products are computed in autocast's
    dtype where it is on, softmax and the sum of the head's gradient in fp32. The gradients are computed with the loss,
    so one backward pass is all it has.

    Raises:
        ValueError: shapes do not fit (a sharded weight is read outside of its module's call).
    """
    _check_shapes(hidden, weight, labels, targets)
    rows = chunk or chunk_rows(len(hidden), len(weight))
    needs = tuple(
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    )
    total, cross_entropy, kl = _LinearDistillLoss.apply(
        hidden, weight, bias, labels, targets, _Weights(ce_weight, kl_weight, kl_tail), rows, needs
    )
    return total, LossParts(cross_entropy, kl)


@torch.no_grad()
def targets_from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, *, chunk: int | None = None
) -> SparseTargets:
    """The teacher's sparse targets, `SparseTargets.from_logits(hidden @ weight.T + bias)`, a chunk at a time.

    hidden (N, d), weight (V, d), bias (V,).
    """
    pieces = hidden.split(chunk or chunk_rows(len(hidden), len(weight)))
    parts = [
        SparseTargets.from_logits(nn.functional.linear(piece, weight, bias), top_k)
        for piece in pieces
    ]
    ids, log_probs, tail = zip(*((p.ids, p.log_probs, p.tail) for p in parts), strict=True)
    return SparseTargets(torch.cat(ids), torch.cat(log_probs), torch.cat(tail))


class FusedHead(nn.Linear):
    """A language model's head whose call can end in a reduction of the logits instead of the logits.

    The reduction runs inside the module's call, so that the hooks by which FSDP and ZeRO-3 gather sharded weights act
    for it as they do for logits. Its parameters are those of the head it takes the place of, tied or not.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(
            head.in_features, head.out_features, bias=head.bias is not None, device="meta"
        )
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)

    def forward(
        self, hidden: Tensor, reduce: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None
    ) -> Any:
        """Logits (..., V) of hidden (..., d), or `reduce(hidden, weight, bias)`, which returns tensors."""
        return super().forward(hidden) if reduce is None else reduce(hidden, self.weight, self.bias)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        targets: SparseTargets,
        ce_weight: float,
        kl_weight: float,
        kl_tail: bool = False,
    ) -> tuple[Tensor, LossParts]:
        """`linear_distill_loss` with this head."""

        def reduce(
            hidden: Tensor, weight: Tensor, bias: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            total, parts = linear_distill_loss(
                hidden,
                weight,
                bias,
                labels,
                targets,
                ce_weight=ce_weight,
                kl_weight=kl_weight,
                kl_tail=kl_tail,
            )
            return (
                total,
                parts.cross_entropy,
                parts.kl,
            )  # hooks look for tensors in tuples, not in dataclasses

        total, cross_entropy, kl = self(hidden, reduce)
        return total, LossParts(cross_entropy, kl)

    def targets(self, hidden: Tensor, top_k: int) -> SparseTargets:
        """`targets_from_hidden` with this head."""
        return self(hidden, functools.partial(targets_from_hidden, top_k=top_k))


def fuse_head(model: Any) -> FusedHead:
    """Put a `FusedHead` in the place of a causal language model's `lm_head`, once, and return it.

    Raises:
        UserError: the head is not a plain linear layer.
    """
    head = model.lm_head
    if type(head) is nn.Linear:
        head = model.lm_head = FusedHead(head)
    if not isinstance(head, FusedHead):
        raise UserError(
            f"lm_head: a {type(head).__module__}.{type(head).__name__}, the loss needs a plain torch.nn.Linear; leave "
            "the head out of adapters and quantisation, and build the task before the model is wrapped."
        )
    return head


class _Weights(NamedTuple):
    """Weights of the two losses, and whether the tokens outside of the targets are an outcome of the KL."""

    ce: float
    kl: float
    tail: bool


class _LinearDistillLoss(torch.autograd.Function):
    """The loss with its gradients computed in the forward pass, one chunk of tokens after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        targets: SparseTargets,
        weights: _Weights,
        rows: int,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _Work(hidden, weight, bias, needs)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                piece = slice(start, start + rows)
                part = SparseTargets(
                    targets.ids[piece], targets.log_probs[piece], targets.tail[piece]
                )
                work.add(piece, labels[piece], part, weights)
        ctx.gradients = (work.hidden_grad, work.weight_grad, work.bias_grad)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        ctx.mark_non_differentiable(work.cross_entropy, work.kl)
        return weights.ce * work.cross_entropy + weights.kl * work.kl, work.cross_entropy, work.kl

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_distill_loss: has first derivatives only; leave create_graph=True out."
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_distill_loss: a backward pass has used its gradients up already; compute the loss again."
            )
        gradients, ctx.gradients = (
            ctx.gradients,
            None,
        )  # scaled in place: a second (V, d) would double their memory
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None, None


class _Work:
    """Sums and gradients over the chunks so far."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        self.dtype = _compute_dtype(hidden, weight)
        self.fp = torch.promote_types(self.dtype, torch.float32)  # of statistics and sums
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.needs = any(needs)
        self.hidden_grad = torch.empty_like(hidden) if needs[0] else None
        self.weight_grad = torch.zeros_like(weight, dtype=self.fp) if needs[1] else None
        self.bias_grad = (
            torch.zeros_like(bias, dtype=self.fp) if bias is not None and needs[2] else None
        )
        self.cross_entropy, self.kl = hidden.new_zeros(2, dtype=self.fp).unbind()

    def add(self, piece: slice, labels: Tensor, targets: SparseTargets, weights: _Weights) -> None:
        """Add a chunk of n tokens: labels (n,) and their targets."""
        hidden = self.hidden[piece].to(self.dtype)
        logits = nn.functional.linear(hidden, self.weight, self.bias).to(
            self.fp
        )  # (n, V), in place from here on
        at_label = logits.gather(1, labels[:, None])
        chunk = _Split.of(logits, targets)
        self.cross_entropy = self.cross_entropy + (chunk.highest - at_label + chunk.log_mass).sum()
        kl, outside_slope, kept_slope = (_tail_kl if weights.tail else _sparse_kl)(chunk, targets)
        self.kl = self.kl + kl.sum()
        if self.needs:
            share = (chunk.highest_outside - chunk.highest - chunk.log_mass).exp()
            slope = chunk.powers.mul_(weights.ce * share + weights.kl * outside_slope)
            slope.scatter_add_(
                1, chunk.ids, weights.ce * chunk.log_p.exp() + weights.kl * kept_slope
            )
            slope.scatter_add_(1, labels[:, None], torch.full_like(at_label, -weights.ce))
            self._add_gradients(piece, hidden, slope)

    def _add_gradients(self, piece: slice, hidden: Tensor, slope: Tensor) -> None:
        """Carry the gradient (n, V) with respect to a chunk's logits on to hidden states, weight and bias."""
        if self.bias_grad is not None:
            self.bias_grad += slope.sum(dim=0)
        slope = slope.to(self.dtype)
        if self.hidden_grad is not None:
            self.hidden_grad[piece] = slope @ self.weight
        if self.weight_grad is None:
            return
        if self.weight_grad.dtype == self.dtype:
            self.weight_grad.addmm_(slope.T, hidden)
            return
        for block, columns in zip(
            self.weight_grad.split(WEIGHT_BLOCK), slope.split(WEIGHT_BLOCK, dim=1), strict=True
        ):
            block += columns.T @ hidden


class _Split(NamedTuple):
    """Logits of n tokens, taken apart at the targets' ids, so that nothing that matters under- or overflows.

    powers (n, V): in the logits' memory, their exponentials over that of the highest outside of the targets, 0 at the
    ids; outside (n, 1): their sum, at least 1, or 0 where the ids are the whole vocabulary; log_p (n, k): the
    student's log-probabilities at the ids, -inf at padding; the softmax's normaliser is exp(highest + log_mass).
    """

    powers: Tensor
    outside: Tensor
    highest_outside: Tensor
    highest: Tensor
    log_mass: Tensor
    ids: Tensor
    log_p: Tensor
    padding: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: SparseTargets) -> _Split:
        """Take the logits (n, V) apart in place."""
        padding = targets.log_probs == -math.inf
        ids = torch.where(
            padding, targets.ids[:, :1], targets.ids
        )  # a row's first entry is never padding
        kept = logits.gather(1, ids).masked_fill_(padding, -math.inf)
        top = kept.amax(dim=1, keepdim=True)
        rest = logits.scatter_(1, ids, -math.inf)
        highest_outside = rest.amax(dim=1, keepdim=True)
        highest_outside = torch.where(highest_outside == -math.inf, top, highest_outside)
        highest = torch.maximum(top, highest_outside)
        powers = rest.sub_(highest_outside).exp_()
        outside = powers.sum(dim=1, keepdim=True)
        kept = kept - highest
        log_mass = (
            outside * (highest_outside - highest).exp() + kept.exp().sum(dim=1, keepdim=True)
        ).log()
        return cls(
            powers, outside, highest_outside, highest, log_mass, ids, kept - log_mass, padding
        )


_KlParts = tuple[Tensor, Tensor | float, Tensor]
"""A KL (n,) and its gradient: a multiple (n, 1) of `powers` outside of the targets, and (n, k) at their ids."""


def _sparse_kl(chunk: _Split, targets: SparseTargets) -> _KlParts:
    """`losses.sparse_kl` and its gradient: q - p at the ids, both renormalised there."""
    teacher = targets.log_probs.to(chunk.log_p.dtype).log_softmax(dim=1)
    student = chunk.log_p.log_softmax(dim=1)
    p = teacher.exp()
    kl = (p * (teacher - student).masked_fill_(chunk.padding, 0.0)).sum(dim=1)
    return kl, 0.0, student.exp_().sub_(p)


def _tail_kl(chunk: _Split, targets: SparseTargets) -> _KlParts:
    """`losses.tail_kl` and its gradient.

    With q the student's softmax, r its mass outside of the targets and t the teacher's, the gradient is q - p at a
    token of the targets and q - t q / r at every other, where q / r is `powers / outside`.
    """
    all_log = torch.cat([targets.log_probs, targets.tail[:, None].log()], dim=1).to(
        chunk.log_p.dtype
    )
    teacher, log_tail = all_log.log_softmax(dim=1).tensor_split([all_log.shape[1] - 1], dim=1)
    p, tail = teacher.exp(), log_tail.exp().masked_fill(chunk.outside == 0, 0.0)
    shift = chunk.highest_outside - chunk.highest - chunk.log_mass
    log_rest = shift + chunk.outside.log()
    inside = (p * (teacher - chunk.log_p).masked_fill(chunk.padding, 0.0)).sum(dim=1)
    beyond = (tail * (log_tail - log_rest)).masked_fill(tail == 0, 0.0)
    slope = shift.exp() - (tail / chunk.outside).masked_fill(tail == 0, 0.0)
    return inside + beyond[:, 0], slope, chunk.log_p.exp().sub_(p)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on, as for a linear layer."""
    own = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind) and own != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else own


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> None:
    if weight.ndim != 2 or hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: must be (N, d) and (V, d). Sharded weights "
            "are whole only inside their module's call: use FusedHead."
        )
    if labels.shape != hidden.shape[:1] or targets.ids.shape[:1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)}, targets {tuple(targets.ids.shape)}: must be ({len(hidden)},) and "
            f"({len(hidden)}, k), one row for each row of hidden."
        )

"""The distillation loss, and the teacher's targets, straight from hidden states.

No (N, V) tensor of logits is made. Tokens are taken in chunks: the logits of one chunk exist at a
time and are turned into their own gradient in place, and the gradients of hidden states and head
are added up over the chunks. docs/losses.md derives the gradients and says what this saves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlstm_distill.losses.plain import LossParts, LossWeights
from xlstm_distill.losses.sparse import SparseTargets

CHUNK_BYTES = 256 * 2**20
"""Memory for the fp32 logits of a chunk."""
WEIGHT_BLOCK = 16384
"""Rows of the head whose gradient is computed at once in low precision, then added in fp32."""


def chunk_rows(tokens: int, vocabulary: int, memory: int | None = None) -> int:
    """Count the tokens of a chunk: as many as `memory` bytes hold fp32 logits of, at least 1.

    The default is `CHUNK_BYTES`. Chunks are of about the same size, so that the last one is not a
    small and slow product.
    """
    if tokens == 0:
        return 1
    most = max(1, (memory or CHUNK_BYTES) // (4 * vocabulary))
    chunks = math.ceil(tokens / most)
    return math.ceil(tokens / chunks)


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    targets: SparseTargets,
    weights: LossWeights,
    *,
    cap: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, LossParts]:
    """Weigh cross-entropy and sparse KL of the logits `hidden @ weight.T + bias` (paper, Eq. 13).

    hidden (N, d) of the kept tokens, weight (V, d), bias (V,), labels (N,) in 0..V-1, targets of
    the same N tokens; `chunk` tokens at a time (default: `chunk_rows`). Equal to `distill_loss`.
    With a `cap` c the logits are c tanh(x / c) of these.
    Products are computed in autocast's dtype where it is on; softmax and the sum of the head's
    gradient in fp32.

    Returns the weighted sum over tokens, to differentiate, and its two parts, which carry no
    gradient. The gradients are computed with the loss, so it has one backward pass and no second
    derivative.

    Raises:
        ValueError: shapes do not fit (a sharded weight is read outside of its module's call).
    """
    _check_shapes(hidden, weight, labels, targets)
    # Bounded logits are kept beside their own gradient, so chunks are half as long.
    memory = CHUNK_BYTES if cap is None else CHUNK_BYTES // 2
    rows = chunk or chunk_rows(len(hidden), len(weight), memory)
    # Inside the autograd function gradients are always off, so what is trained is asked here.
    needs = tuple(
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    )
    total, cross_entropy, kl = _LinearDistillLoss.apply(
        hidden, weight, bias, labels, targets, weights, cap, rows, needs
    )
    return total, LossParts(cross_entropy, kl)


@torch.no_grad()
def targets_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    cap: float | None = None,
    chunk: int | None = None,
) -> SparseTargets:
    """Take the teacher's targets from hidden states, a chunk of tokens at a time.

    hidden (N, d), weight (V, d), bias (V,). Equal to `SparseTargets.from_logits` of the logits
    `hidden @ weight.T + bias`, or of c tanh(x / c) of these with a `cap` c.
    """
    parts = []
    for piece in hidden.split(chunk or chunk_rows(len(hidden), len(weight))):
        logits = bounded(nn.functional.linear(piece, weight, bias), cap)
        parts.append(SparseTargets.from_logits(logits, top_k))
    return SparseTargets(
        ids=torch.cat([part.ids for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        tail=torch.cat([part.tail for part in parts]),
    )


def bounded(logits: Tensor, cap: float | None) -> Tensor:
    """Return c tanh(x / c) of logits for a cap c, as transformers' models compute it."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _LinearDistillLoss(torch.autograd.Function):
    """The loss; its forward pass computes the gradients too, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        targets: SparseTargets,
        weights: LossWeights,
        cap: float | None,
        rows: int,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        work = _Work(hidden, weight, bias, cap, needs)
        # _Work converts to autocast's dtype itself, once; statistics must stay in fp32.
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                piece = slice(start, start + rows)
                work.add(piece, labels[piece], targets.rows(piece), weights)
        ctx.gradients = (work.hidden_grad, work.weight_grad, work.bias_grad)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        ctx.mark_non_differentiable(work.cross_entropy, work.kl)
        total = weights.cross_entropy * work.cross_entropy + weights.kl * work.kl
        return total, work.cross_entropy, work.kl

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_distill_loss: has first derivatives only; leave create_graph=True out."
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_distill_loss: a backward pass has used its gradients up already;"
                " compute the loss again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        # Scaled in place: a second (V, d) would double the memory of the head's gradient.
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        not_differentiable = [None] * 6  # labels, targets, weights, cap, rows, needs
        return *scaled, *not_differentiable


class _Work:
    """Sums and gradients over the chunks so far.

    needs: whether hidden, weight and bias need gradients; one that needs none is None here.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.dtype, self.cap = _compute_dtype(hidden, weight), cap
        # Statistics and sums are at least fp32: many bf16 chunks would lose digits.
        self.sum_dtype = torch.promote_types(self.dtype, torch.float32)
        self.hidden, self.weight = hidden, weight.to(self.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        needs_hidden, needs_weight, needs_bias = needs
        self.needs_gradients = any(needs)
        self.hidden_grad: Tensor | None = None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        if needs_hidden:
            self.hidden_grad = torch.empty_like(hidden)
        if needs_weight:
            self.weight_grad = torch.zeros_like(weight, dtype=self.sum_dtype)
        if bias is not None and needs_bias:
            self.bias_grad = torch.zeros_like(bias, dtype=self.sum_dtype)
        self.cross_entropy, self.kl = hidden.new_zeros(2, dtype=self.sum_dtype).unbind()

    def add(
        self, piece: slice, labels: Tensor, targets: SparseTargets, weights: LossWeights
    ) -> None:
        """Add a chunk of n tokens: labels (n,) and their targets."""
        hidden = self.hidden[piece].to(self.dtype)
        logits = nn.functional.linear(hidden, self.weight, self.bias)  # (n, V)
        logits = bounded(logits, self.cap).to(self.sum_dtype)
        # The bound's own gradient, 1 - tanh^2, needs the logits once more.
        kept = logits.clone() if self.cap is not None and self.needs_gradients else None
        # From here on the logits change in place, so the label's are read first.
        at_label = logits.gather(1, labels[:, None])
        chunk = _Split.of(logits, targets)
        cross_entropy = chunk.highest - at_label + chunk.log_mass
        self.cross_entropy = self.cross_entropy + cross_entropy.sum()
        kl, outside_slope, kept_slope = (_tail_kl if weights.kl_tail else _sparse_kl)(
            chunk, targets
        )
        self.kl = self.kl + kl.sum()
        if not self.needs_gradients:
            return
        # The cross-entropy's gradient is the softmax, less 1 at the label. Outside of the targets
        # both losses' gradients are multiples of `powers`; the targets' ids, 0 there, come after.
        share = (chunk.highest_outside - chunk.highest - chunk.log_mass).exp()
        slope = chunk.powers.mul_(weights.cross_entropy * share + weights.kl * outside_slope)
        at_ids = weights.cross_entropy * chunk.log_p.exp() + weights.kl * kept_slope
        slope.scatter_add_(1, chunk.ids, at_ids)
        slope.scatter_add_(1, labels[:, None], torch.full_like(at_label, -weights.cross_entropy))
        if kept is not None:
            assert self.cap is not None
            slope.mul_(kept.div_(self.cap).square_().neg_().add_(1.0))
        self._add_gradients(piece, hidden, slope)

    def _add_gradients(self, piece: slice, hidden: Tensor, slope: Tensor) -> None:
        """Propagate the gradient (n, V) of a chunk's logits to hidden states, weight and bias."""
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
        # In blocks: a product of all rows in low precision would be a second tensor (V, d).
        blocks = self.weight_grad.split(WEIGHT_BLOCK)
        for block, columns in zip(blocks, slope.split(WEIGHT_BLOCK, dim=1), strict=True):
            block += columns.T @ hidden


class _Split(NamedTuple):
    """Logits of n tokens, split into those at the targets' ids and all others.

    Each side is divided by its own highest power, so that nothing that matters under- or
    overflows: a student sure of other tokens still has a finite loss and the right gradient.

    powers (n, V): in the logits' memory, exp(logit - highest_outside), and 0 at the ids.
    outside (n, 1): their sum, at least 1; 0 where the ids are the whole vocabulary.
    highest_outside, highest (n, 1): the highest logit outside of the targets, and of all.
    log_mass (n, 1): the softmax's normaliser is exp(highest + log_mass).
    ids (n, k): the targets', with padding replaced by the row's first id.
    log_p (n, k): the student's log-probabilities at the ids, -inf at padding.
    padding (n, k) bool: padded entries.
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
        """Split logits (n, V) in place."""
        padding = targets.log_probs == -math.inf
        # Padding has id 0, which is a token like any other. A row's first entry is never padding.
        ids = torch.where(padding, targets.ids[:, :1], targets.ids)
        kept = logits.gather(1, ids).masked_fill_(padding, -math.inf)
        top = kept.amax(dim=1, keepdim=True)
        rest = logits.scatter_(1, ids, -math.inf)
        highest_outside = rest.amax(dim=1, keepdim=True)
        # Nothing is outside where the ids are the whole vocabulary; any finite number does then.
        highest_outside = torch.where(highest_outside == -math.inf, top, highest_outside)
        highest = torch.maximum(top, highest_outside)
        powers = rest.sub_(highest_outside).exp_()
        outside = powers.sum(dim=1, keepdim=True)
        kept = kept - highest
        mass_outside = outside * (highest_outside - highest).exp()
        log_mass = (mass_outside + kept.exp().sum(dim=1, keepdim=True)).log()
        return cls(
            powers=powers,
            outside=outside,
            highest_outside=highest_outside,
            highest=highest,
            log_mass=log_mass,
            ids=ids,
            log_p=kept - log_mass,
            padding=padding,
        )


_KlParts = tuple[Tensor, Tensor | float, Tensor]
"""A KL (n,) and its gradient: the factor (n, 1) of `powers` outside of the targets, and (n, k) at
their ids."""


def _sparse_kl(chunk: _Split, targets: SparseTargets) -> _KlParts:
    """Return `plain.sparse_kl` and its gradient, q - p at the ids.

    q is the student's and p the teacher's distribution, both renormalised over the ids.
    """
    teacher = targets.log_probs.to(chunk.log_p.dtype).log_softmax(dim=1)
    student = chunk.log_p.log_softmax(dim=1)
    p = teacher.exp()
    kl = (p * (teacher - student).masked_fill_(chunk.padding, 0.0)).sum(dim=1)
    return kl, 0.0, student.exp_().sub_(p)


def _tail_kl(chunk: _Split, targets: SparseTargets) -> _KlParts:
    """Return `plain.tail_kl` and its gradient.

    With q the student's softmax, p the teacher's distribution, and r and t their masses outside of
    the targets, the gradient is q - p at a token of the targets, and q - t q / r at every other,
    where q / r is `powers / outside`.
    """
    outcomes = torch.cat([targets.log_probs, targets.tail[:, None].log()], dim=1)
    # Renormalised, because stored targets are rounded.
    outcomes = outcomes.to(chunk.log_p.dtype).log_softmax(dim=1)
    teacher, log_tail = outcomes[:, :-1], outcomes[:, -1:]
    p = teacher.exp()
    # Where the ids are the whole vocabulary, the tail is rounding alone.
    tail = log_tail.exp().masked_fill(chunk.outside == 0, 0.0)
    shift = chunk.highest_outside - chunk.highest - chunk.log_mass
    log_rest = shift + chunk.outside.log()
    # Without a tail, or at padding, differences of -inf are not numbers.
    inside = (p * (teacher - chunk.log_p).masked_fill(chunk.padding, 0.0)).sum(dim=1)
    beyond = (tail * (log_tail - log_rest)).masked_fill(tail == 0, 0.0)
    slope = shift.exp() - (tail / chunk.outside).masked_fill(tail == 0, 0.0)
    return inside + beyond[:, 0], slope, chunk.log_p.exp().sub_(p)


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Find the dtype of products: autocast's where it is on, as for a linear layer."""
    own = torch.promote_types(hidden.dtype, weight.dtype)
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind) and own != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else own


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> None:
    if weight.ndim != 2 or hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}: must be (N, d) and"
            " (V, d). Sharded weights are whole only inside their module's call: use FusedHead."
        )
    if labels.shape != hidden.shape[:1] or targets.ids.shape[:1] != labels.shape:
        raise ValueError(
            f"labels {tuple(labels.shape)}, targets {tuple(targets.ids.shape)}: must be"
            f" ({len(hidden)},) and ({len(hidden)}, k), one row for each row of hidden."
        )

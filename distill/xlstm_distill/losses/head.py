"""A language model's head that computes the loss, or the targets, instead of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from xlstm_distill.errors import UserError
from xlstm_distill.losses.fused import linear_distill_loss, targets_from_hidden
from xlstm_distill.losses.plain import LossParts, LossWeights
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import logit_cap, logit_factor


class FusedHead(nn.Linear):
    """A language model's head whose call can return a reduction of the logits instead of them.

    The reduction runs inside the module's call, so the hooks by which FSDP and ZeRO-3 gather
    sharded weights act for it as they do for logits. The parameters are those of the head it
    replaces, tied or not. A model that multiplies its logits by `factor`, or bounds them by `cap`,
    does that itself; the loss and the targets, which see no logits, multiply what the head reads,
    and bound the logits of each chunk.
    """

    def __init__(self, head: nn.Linear, factor: float = 1.0, cap: float | None = None) -> None:
        # On the meta device: weights of its own would be allocated and drawn, only to be dropped.
        super().__init__(
            head.in_features, head.out_features, bias=head.bias is not None, device="meta"
        )
        self.weight, self.bias = head.weight, head.bias
        self.factor, self.cap = factor, cap
        self.train(head.training)

    def forward(
        self, hidden: Tensor, reduce: Callable[[Tensor, Tensor, Tensor | None], Any] | None = None
    ) -> Any:
        """Return logits (..., V) of hidden (..., d), or what `reduce(hidden, weight, bias)` does.

        `reduce` returns a tensor or a tuple of tensors.
        """
        if reduce is None:
            return super().forward(hidden)
        return reduce(hidden, self.weight, self.bias)

    def loss(
        self, hidden: Tensor, labels: Tensor, targets: SparseTargets, weights: LossWeights
    ) -> tuple[Tensor, LossParts]:
        """Call `linear_distill_loss` with this head."""

        def reduce(
            hidden: Tensor, weight: Tensor, bias: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            total, parts = linear_distill_loss(
                hidden, weight, bias, labels, targets, weights, cap=self.cap
            )
            # A plain tuple: the wrappers' hooks look for tensors in tuples, not in dataclasses.
            return total, parts.cross_entropy, parts.kl

        total, cross_entropy, kl = self(self.scaled(hidden), reduce)
        return total, LossParts(cross_entropy, kl)

    def targets(self, hidden: Tensor, top_k: int) -> SparseTargets:
        """Call `targets_from_hidden` with this head."""
        reduce = functools.partial(targets_from_hidden, top_k=top_k, cap=self.cap)
        return self(self.scaled(hidden), reduce)

    def scaled(self, hidden: Tensor) -> Tensor:
        """Return the hidden states whose logits are the model's own."""
        return hidden if self.factor == 1 else hidden * self.factor


def fuse_head(model: Any) -> FusedHead:
    """Put a `FusedHead` in the place of a causal language model's `lm_head`, once, and return it.

    Raises:
        UserError: the head is not a plain linear layer.
    """
    head = model.lm_head
    if type(head) is nn.Linear:
        factor = logit_factor(model.config)
        if factor != 1 and head.bias is not None:
            raise UserError("lm_head: has a bias, which cannot be scaled; use another teacher.")
        head = model.lm_head = FusedHead(head, factor, logit_cap(model.config))
    if not isinstance(head, FusedHead):
        raise UserError(
            f"lm_head: a {type(head).__module__}.{type(head).__name__}, the loss needs a plain"
            " torch.nn.Linear; leave the head out of adapters and quantisation, and build the task"
            " before the model is wrapped."
        )
    return head

"""What the training loop optimises: a module whose forward turns a batch into sums over its tokens.

The loss lives inside a module's forward, so that every wrapper (DDP, FSDP, DeepSpeed) sees one call per batch.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from xlstm_distill.data.rows import IGNORE_INDEX, Batch
from xlstm_distill.losses.head import fuse_head
from xlstm_distill.losses.plain import LossWeights, alignment_error
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.mixer import HybridMixer
from xlstm_distill.targets.providers import TargetSource, kept_hidden


@dataclass(frozen=True)
class Sums:
    """What a batch adds to the step: `loss` to differentiate, sums to report, each to be divided by `tokens`."""

    loss: Tensor
    parts: dict[str, Tensor]


class Task(nn.Module, abc.ABC):
    """A module that sums a loss over the tokens of a batch, and says how many tokens the loss is averaged over."""

    @abc.abstractmethod
    def count(self, batch: Batch) -> int:
        """Tokens of a batch that the loss is averaged over."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> Sums:
        """Sum the loss over a batch."""


class AlignTask(Task):
    """Stage I: every mixer regresses its teacher layer's heads, all layers in one pass (paper, Eq. 12).

    Each mixer gets the hidden states that reach the layer in the *teacher*, so layers do not wait for each other and
    one teacher forward serves all. Only the new parameters train.
    """

    def __init__(self, student: CausalLM, teacher: CausalLM) -> None:
        super().__init__()
        teacher.requires_grad_(False)
        student.requires_grad_(False)
        self.mixers = nn.ModuleList(student.mixers())
        for _, parameter in student.new_parameters():
            parameter.requires_grad_(True)
        self.observer = [
            TeacherObserver(teacher)
        ]  # in a list: not a submodule, neither wrapped nor saved

    def count(self, batch: Batch) -> int:
        """Tokens the loss is averaged over: all but padding."""
        return int(batch.real.sum())

    def forward(self, batch: Batch) -> Sums:
        """Sum of squared errors per head element over layers and tokens, and the relative error's parts."""
        seen = self.observer[0](batch)
        errors, norms = [], []
        for mixer, layer in zip(self.mixers, seen, strict=True):
            mixed = cast(HybridMixer, mixer).mix(
                layer.hidden_states, layer.position_embeddings, segment_ids=batch.segment_ids
            )
            error, norm = alignment_error(mixed, layer.heads, batch.real)
            errors.append(error / mixed.shape[-1])
            norms.append(norm / mixed.shape[-1])
        total = torch.stack(errors).sum()
        parts = {"mse": total.detach(), "teacher_power": torch.stack(norms).sum()}
        return Sums(total, parts)


@dataclass
class LayerView:
    """What the teacher's attention layer got and gave: hidden states (B, T, d), RoPE, heads (B, T, H * D)."""

    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    heads: Tensor


class TeacherObserver:
    """Runs the teacher's body and records, per layer, the attention's input and its heads before the projection."""

    def __init__(self, teacher: CausalLM) -> None:
        self.teacher = teacher.eval()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[LayerView]:
        inputs: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        heads: list[Tensor] = []
        handles = []
        for layer in self.teacher.model.layers:
            attention = layer.self_attn
            handles.append(
                attention.register_forward_pre_hook(
                    lambda _, args, kwargs: inputs.append(
                        (kwargs["hidden_states"], kwargs["position_embeddings"])
                    ),
                    with_kwargs=True,
                )
            )
            handles.append(
                attention.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
            )
        try:
            self.teacher.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            )
        finally:
            for handle in handles:
                handle.remove()
        return [LayerView(x, rope, h) for (x, rope), h in zip(inputs, heads, strict=True)]


class DistillTask(Task):
    """Stage II: γ · cross-entropy + β · sparse KL to the teacher, on supervised tokens (paper, Eq. 13).

    The student's head becomes a `FusedHead`, which computes the loss without the tensor of logits.
    """

    def __init__(
        self,
        student: CausalLM,
        targets: TargetSource,
        weights: LossWeights,
    ) -> None:
        super().__init__()
        fuse_head(student)
        self.student = student
        self.targets = targets
        self.weights = weights

    def count(self, batch: Batch) -> int:
        """Tokens the loss is averaged over: the supervised ones."""
        return int((batch.labels != IGNORE_INDEX).sum())

    def forward(self, batch: Batch) -> Sums:
        """Weighted loss summed over kept tokens, and its two parts."""
        targets: SparseTargets = self.targets(batch)
        hidden = kept_hidden(self.student, batch, segment_ids=batch.segment_ids)
        labels = batch.labels[batch.labels != IGNORE_INDEX]
        loss, parts = self.student.lm_head.loss(hidden, labels, targets, self.weights)
        return Sums(loss, {"ce": parts.cross_entropy, "kl": parts.kl})

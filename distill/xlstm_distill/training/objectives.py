"""What the training loop optimises: a module whose forward turns a batch into sums over its tokens.

The loss lies inside a module's forward, so that every wrapper (DDP, FSDP, DeepSpeed) sees one call
for each batch.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlstm_distill.data.rows import Batch, DomainRows, Row, load_batch
from xlstm_distill.losses.head import fuse_head
from xlstm_distill.losses.plain import LossWeights, alignment_error
from xlstm_distill.models.attention.heads import take
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.loading import load_shards
from xlstm_distill.models.mixer import NEW_MODULES, HybridMixer
from xlstm_distill.models.packed import teacher_hidden
from xlstm_distill.targets.providers import StoredTargets, TargetSource, kept_hidden

ERROR, POWER = "squared_error", "teacher_power"


@dataclass(frozen=True)
class Sums:
    """Sums over a batch's tokens: the `loss` to differentiate, and `parts` of it to log."""

    loss: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module, abc.ABC):
    """Sums a loss over the tokens of a batch, and counts the tokens that it is averaged over.

    `shown` is the figure that the progress bar shows.
    """

    shown = "loss"
    renews = False
    """Whether `renew` makes the batches of a step, once the step before has changed the weights."""

    def load_weights(self, device: torch.device) -> None:
        """Read the weights that are still on the meta device, once they are sharded."""

    def load(self, domains: Mapping[str, DomainRows], rows: Sequence[Row]) -> Batch:
        """Read rows into a batch on the host, with all that `forward` needs of the disk."""
        return load_batch(domains, rows)

    def read(
        self, domains: Mapping[str, DomainRows], rows: Sequence[Row], numbers: Sequence[int]
    ) -> Batch:
        """Read rows to train on; `numbers` are their places in the training, over all ranks."""
        return self.load(domains, rows)

    def renew(
        self, domains: Mapping[str, DomainRows], batches: list[Batch], numbers: Sequence[int]
    ) -> tuple[list[Batch], dict[str, float]]:
        """Make what a rank trains on in a step from what it has read, with the weights as they are.

        `numbers` are those of the rows of all batches. Returns also figures to sum over ranks.
        """
        return batches, {}

    @abc.abstractmethod
    def count(self, batch: Batch) -> int:
        """Count the tokens of a batch that the loss is averaged over, without asking a device."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> Sums:
        """Sum the loss over a batch."""

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """Return what to log, of the loss and its parts per token over all ranks.

        Ratios of parts are made here: the ratio of two sums is no sum of ratios.
        """
        return means

    def figures_of_renewal(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return what to log of the sums that `renew` has given on all ranks."""
        return dict(sums)

    def computed(self) -> dict[str, str | int]:
        """Return settings that may change under way and then change the result's last bits."""
        return {}

    def hot_methods(self) -> list[tuple[nn.Module, str]]:
        """Return modules with the name of the method that takes their time, for compiling."""
        return []

    def whole_modules(self) -> list[nn.Module]:
        """Return modules whose weights FSDP2 leaves whole on every rank."""
        return []

    @abc.abstractmethod
    def checkpoint_activations(self) -> None:
        """Keep only what enters each layer for the backward pass, which computes the rest again."""


class AlignObjective(Objective):
    """Stage I: every mixer regresses its teacher layer's heads (paper, Eq. 12).

    Each mixer gets the hidden states that reach the layer in the *teacher*. So layers do not depend
    on each other, and one forward of the teacher serves all. Only the new parameters train. Layers
    and heads that keep the teacher's attention are left out.
    """

    shown = "relative_error"

    def __init__(self, student: CausalLM, teacher: CausalLM) -> None:
        super().__init__()
        teacher.requires_grad_(False)
        student.requires_grad_(False)
        self.mixers = nn.ModuleList(mixer for mixer in student.mixers() if mixer.kept.mixed)
        self.layer_numbers = [mixer.layer_idx for mixer in student.mixers() if mixer.kept.mixed]
        for _, parameter in student.new_parameters():
            parameter.requires_grad_(True)
        for mixer in student.mixers():
            if mixer.has_mlstm:
                # It cancels in the mLSTM's ratio. Its gradient is rounding, which Adam follows at
                # full speed, and a large constant costs the gates' last bits in bf16.
                mixer.input_gate.bias.requires_grad_(False)
        # In a list it is no submodule: the teacher is neither wrapped nor saved.
        self.observer = [TeacherObserver(teacher, self.layer_numbers)]
        self.checkpointing = False
        # By the gate's name in the student. No buffers: the student itself has no such scale.
        self.value_scales = {
            f"{name}.output_gate": _value_scale(mixer)
            for name, mixer in student.named_modules()
            if isinstance(mixer, HybridMixer) and mixer.kept.mixed
        }

    def count(self, batch: Batch) -> int:
        """Count all tokens but padding."""
        return batch.tokens

    def forward(self, batch: Batch) -> Sums:
        """Sum squared errors over layers, heads, features and tokens (Eq. 12).

        A sum over features, as in the paper, and no mean: at H * D = 4096 a mean would make the
        gradients 4096 times smaller, near the eps of Adam, while weight decay keeps its force.
        """
        seen = self.observer[0](batch)
        errors, norms = [], []
        scales = self.value_scales.values()
        for module, scale, layer in zip(self.mixers, scales, seen, strict=True):
            compare = functools.partial(_compare, cast(HybridMixer, module), scale, batch)
            if self.checkpointing:
                # Nothing in a mixer is random, so there is no state of a generator to restore.
                error, norm = checkpoint(
                    compare, layer, use_reentrant=False, preserve_rng_state=False
                )
            else:
                error, norm = compare(layer)
            errors.append(error)
            norms.append(norm)
        total = torch.stack(errors).sum()
        # By layer: a layer with small values is a small part of the sum, however wrong it is.
        layers = zip(self.layer_numbers, errors, norms, strict=True)
        parts: dict[str, Tensor] = {}
        for n, error, norm in layers:
            parts |= {f"{ERROR}/{n}": error.detach(), f"{POWER}/{n}": norm}
        return Sums(total, parts)

    def folded(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a student's weights with the scale of values in its output gates' weights.

        While they train, the gates read values of RMS 1. Adam moves every weight at the same
        speed, so weights for values a tenth as large would take ten times as long to be learnt.
        """
        for name, scale in self.value_scales.items():
            if (weight := weights.get(f"{name}.weight")) is not None:
                weight[:, 2] *= scale.to(weight)
        return weights

    def figures(self, means: dict[str, float]) -> dict[str, float]:
        """Add the relative error: squared error over the teacher's power.

        Over all layers; and of the layers' own, their mean and the largest. A squared error alone
        says nothing: its scale is that of the teacher's values.
        """
        if not means:  # of no rows
            return means
        errors = [means[f"{ERROR}/{n}"] for n in self.layer_numbers]
        powers = [means[f"{POWER}/{n}"] for n in self.layer_numbers]
        figures = {name: value for name, value in means.items() if "/" not in name}
        figures |= {ERROR: sum(errors), POWER: sum(powers)}
        # 0 means that all heads give zeros; a share of nothing is left out.
        ratios = [error / power for error, power in zip(errors, powers, strict=True) if power]
        if not ratios:
            return figures
        return figures | {
            "relative_error": figures[ERROR] / figures[POWER],
            "relative_error_of_layers": sum(ratios) / len(ratios),
            "relative_error_of_worst_layer": max(ratios),
        }

    def whole_modules(self) -> list[nn.Module]:
        """Return the projections: the teacher holds the same tensors, whole on every rank."""
        return [
            child
            for mixer in self.mixers
            for name, child in mixer.named_children()
            if name not in NEW_MODULES
        ]

    def checkpoint_activations(self) -> None:
        """Keep each layer's input and the teacher's heads alone."""
        self.checkpointing = True

    def hot_methods(self) -> list[tuple[nn.Module, str]]:
        """Return the mixers; the teacher's layers have hooks inside, which would break graphs."""
        return [(mixer, "mix") for mixer in self.mixers]


def _value_scale(mixer: HybridMixer) -> Tensor:
    """Return one over the RMS of a layer's values, for inputs of RMS 1."""
    weight = mixer.value_weight.detach().float()
    return (weight.square().mean() * weight.shape[1]).clamp_min(torch.finfo().tiny).rsqrt()


def _compare(
    mixer: HybridMixer, value_scale: Tensor, batch: Batch, layer: LayerView
) -> tuple[Tensor, Tensor]:
    """Run a mixer on what its teacher's layer saw; returns the squared error and the power."""
    mixed = mixer.mix(
        layer.hidden_states,
        layer.position_embeddings,
        segment_ids=batch.segment_ids,
        value_scale=value_scale,
        mixed_only=True,
    )
    return alignment_error(mixed, _of_mixer(mixer, layer.heads), batch.real)


def _of_mixer(mixer: HybridMixer, heads: Tensor) -> Tensor:
    """Take a teacher's heads (B, T, H * D) that are not kept, (B, T, M * D)."""
    if not mixer.kept.kept:
        return heads
    split = heads.unflatten(-1, (mixer.heads, mixer.head_dim))
    return take(split.transpose(1, 2), mixer.kept.queries).transpose(1, 2).flatten(2)


@dataclass
class LayerView:
    """A teacher's attention: its input (B, T, d), its RoPE, and the heads it gave (B, T, H * D)."""

    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    heads: Tensor


class AllSeen(Exception):
    """No error: the last layer that is observed has given its heads."""


class TeacherObserver:
    """Runs the teacher's body and records each attention's input and its heads.

    The heads are what the output projection gets. layers: which layers; None means all. On a CPU,
    what comes after the last heads is not computed. (On GPUs it would save little, of 32 layers the
    last one's MLP, and what shards, offloads or compiles a model counts on a pass that ends.)
    """

    def __init__(self, teacher: CausalLM, layers: Sequence[int] | None = None) -> None:
        self.teacher = teacher.eval()
        body = list(self.teacher.model.layers)
        self.layers = body if layers is None else [body[n] for n in layers]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[LayerView]:
        inputs: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        heads: list[Tensor] = []
        # The parameters of a sharded model have types or marks of their own.
        may_stop = all(
            type(p) is nn.Parameter and p.device.type == "cpu" and not hasattr(p, "ds_id")
            for p in self.teacher.parameters()
        )

        def record_input(_: object, __: object, kwargs: dict[str, Tensor]) -> None:
            rope = cast(tuple[Tensor, Tensor], kwargs["position_embeddings"])
            inputs.append((kwargs["hidden_states"], rope))

        def record_heads(_: object, args: tuple[Tensor]) -> None:
            heads.append(args[0])
            if may_stop and len(heads) == len(self.layers) and not torch.compiler.is_compiling():
                raise AllSeen

        handles = []
        for layer in self.layers:
            attention = layer.self_attn
            handles += [
                attention.register_forward_pre_hook(record_input, with_kwargs=True),
                # Families differ in how they compute the heads; all give them to o_proj.
                attention.o_proj.register_forward_pre_hook(record_heads),
            ]
        try:
            with contextlib.suppress(AllSeen):
                teacher_hidden(
                    self.teacher,
                    batch.input_ids,
                    batch.position_ids,
                    batch.segment_ids,
                    packed=batch.packed,
                )
        finally:
            for handle in handles:
                handle.remove()
        return [LayerView(x, rope, h) for (x, rope), h in zip(inputs, heads, strict=True)]


class DistillObjective(Objective):
    """Stage II: γ · cross-entropy + β · sparse KL, on supervised tokens (paper, Eq. 13).

    The student's head becomes a `FusedHead`, which computes the loss without the tensor of logits.
    A student from `empty_student` gets its weights from the folder `saved` after it is wrapped.
    """

    def __init__(
        self,
        student: CausalLM,
        targets: TargetSource,
        weights: LossWeights,
        saved: Path | None = None,
    ) -> None:
        super().__init__()
        fuse_head(student)
        self.student = student
        self.targets = targets
        self.weights = weights
        self.saved = saved

    def load_weights(self, device: torch.device) -> None:
        """Read this rank's shards of a student that was made without weights."""
        if self.saved is not None:
            load_shards(self.student, self.saved, device)

    def load(self, domains: Mapping[str, DomainRows], rows: Sequence[Row]) -> Batch:
        """Read rows, and their targets where these are stored."""
        batch = super().load(domains, rows)
        if isinstance(self.targets, StoredTargets):
            return replace(batch, targets=self.targets(batch))
        return batch

    def count(self, batch: Batch) -> int:
        """Count the supervised tokens."""
        return len(batch.kept)

    def forward(self, batch: Batch) -> Sums:
        """Sum the weighted loss and its two parts over the supervised tokens."""
        targets = self.targets(batch) if batch.targets is None else batch.targets
        # Only supervised positions reach the head, whose logits are the largest tensor of a step.
        hidden = kept_hidden(self.student, batch, segment_ids=batch.segment_ids)
        labels = batch.labels.flatten().index_select(0, batch.kept)
        loss, parts = self.student.lm_head.loss(hidden, labels, targets, self.weights)
        return Sums(loss, {"ce": parts.cross_entropy, "kl": parts.kl})

    # accelerate asks for these two and gives each an FSDP2 unit of its own. In the root they would
    # stay gathered through all layers: 1 GB each for Llama-3.1-8B, and their gradients.
    def get_input_embeddings(self) -> nn.Module:
        """Return the student's embedding."""
        return self.student.model.embed_tokens

    def checkpoint_activations(self) -> None:
        """Keep the inputs of the student's decoder layers alone."""
        checkpoint_activations(self.student)

    def get_output_embeddings(self) -> nn.Module:
        """Return the student's head."""
        return self.student.lm_head

    def hot_methods(self) -> list[tuple[nn.Module, str]]:
        """Return the student's decoder layers."""
        return [(layer, "forward") for layer in self.student.model.layers]


def checkpoint_activations(student: CausalLM) -> None:
    """Keep only the decoder layers' inputs for the backward pass, which computes the rest again."""
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

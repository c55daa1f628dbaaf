"""The recipe's sections for the stages: targets, alignment, distillation into experts, merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from xlstm_distill.recipe.fields import (
    BelowOne,
    Count,
    CountOrZero,
    FieldError,
    Flag,
    Mixture,
    Name,
    NonNegative,
    Positive,
    Section,
    ShareOfAll,
    Switch,
)

# An expert of this name would share the label `evaluate/NAME` with the model that has it.
RESERVED = ("teacher", "merged")
"""Names that the report gives to models; no expert may have one."""

FINAL_LR = (
    "Learning rate at the last step. null means that the rate falls towards 0 and would reach it "
    "one step after the last."
)

EPS = "AdamW's divisor is the root of the second moment plus this."
CLIP = "Largest norm of the gradient; null means no clipping."


class Capture(Section):
    """How the teacher's next-token distributions reach the distill stage."""

    targets: Literal["stored", "online"] = Field(
        default="stored",
        description="`stored` runs the teacher once and keeps its top tokens on disk; `online` "
        "runs the teacher in each training step.",
    )
    # 256 is also the format's limit: the store keeps k - 1 in one byte.
    top_k: int = Field(
        default=256,
        strict=True,
        ge=1,
        le=256,
        description="Maximum number of tokens to keep of each distribution (paper: 256).",
    )
    # 0.98: the largest of the measured masses at which a mean entropy of up to 1.65 nats takes at
    # most 160 bytes per token, mixtures included (docs/targets.md).
    mass: ShareOfAll | None = Field(
        default=0.98,
        description="Keep of each distribution only the smallest set of tokens whose "
        "probabilities sum to at least this; null keeps all `top_k`. docs/targets.md compares the "
        "choices.",
    )
    min_k: int = Field(
        default=16,
        strict=True,
        ge=1,
        le=256,
        description="Minimum number of tokens to keep with `mass` (at most `top_k`).",
    )
    batch: Count = Field(default=8, description="Rows per forward pass of the teacher (rows).")
    workers: CountOrZero | None = Field(
        default=None,
        description="Processes that code targets beside the teacher's forward pass; 0 means none. "
        "null means, on a GPU, one per free core (at most 8), and none on a CPU. The targets are "
        "the same for any number.",
    )
    shard_teacher: Flag = Field(
        default=False,
        description="Spread the layers of an online teacher over the processes, as FSDP2 does.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield errors of settings that have no effect, and of bounds in the wrong order."""
        if self.shard_teacher and self.targets == "stored":
            yield FieldError(
                "shard_teacher",
                "true has no effect with targets 'stored'; set targets to 'online'.",
            )
        if self.workers is not None and self.targets == "online":
            yield FieldError(
                "workers", "has no effect with targets 'online'; set it to null or leave it out."
            )
        # A recipe written out in full names min_k even where it is not used.
        if self.min_k == type(self).model_fields["min_k"].default:
            return
        if self.mass is None:
            yield FieldError(
                "min_k",
                f"{self.min_k} has no effect with mass null, which keeps all top_k; leave it out.",
            )
        if self.min_k > self.top_k:
            yield FieldError(
                "min_k", f"{self.min_k} is above top_k ({self.top_k}); give at most top_k."
            )


class Optimization(Section):
    """AdamW and its learning rate, shared by the stages that train."""

    batch: Count = Field(description="Rows per optimiser step, over all processes (rows).")
    micro_batch: Count | None = Field(
        default=None,
        description="Rows per forward pass of a process (rows); null means no gradient "
        "accumulation.",
    )
    lr: Positive = Field(description="Peak learning rate.")
    final_lr: NonNegative | None = Field(default=None, description=FINAL_LR)
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Course of the learning rate after warm-up."
    )
    warmup_steps: CountOrZero = Field(
        default=0, description="Steps of linear warm-up (optimiser steps)."
    )
    weight_decay: NonNegative = Field(default=0.1, description="AdamW's decoupled weight decay.")
    # The paper names AdamW and weight decay 0.1, but no betas.
    betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.95), description="AdamW's decay rates of the two moments."
    )
    # The paper gives none; this is torch's own.
    eps: Positive = Field(default=1e-8, description=EPS)
    # The paper clips at 1.0 in stage II.
    clip: Positive | None = Field(default=1.0, description=CLIP)
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="What happens when a loss or gradient is not finite: `stop` ends the training; "
        "`skip` leaves out the step and reports it.",
    )
    activation_checkpointing: Flag = Field(
        default=False,
        description="Keep only what enters each layer and compute the rest again in the backward "
        "pass: less memory, more time.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield errors of the micro-batch and of the final learning rate."""
        if self.micro_batch is not None and self.batch % self.micro_batch:
            yield FieldError(
                "micro_batch",
                f"{self.micro_batch} does not divide batch ({self.batch}); give a divisor.",
            )
        if self.final_lr is None:
            return
        if self.schedule == "constant":
            yield FieldError(
                "final_lr",
                f"{self.final_lr} has no effect with schedule 'constant'; set it to null.",
            )
        elif self.final_lr > self.lr:
            yield FieldError(
                "final_lr", f"{self.final_lr} is above lr ({self.lr}); give at most lr."
            )


# Paper: 2,500 steps of 64 rows of 4096 tokens, warm-up to 1e-2, then a cosine to 1e-5.
class Align(Optimization):
    """Stage I: each mixer learns its teacher layer's attention output (paper, Eq. 12)."""

    tokens: Count = Field(description="Text to train on (tokens; paper: 655 million).")
    batch: Count = Field(
        default=64, description="Rows per optimiser step, over all processes (rows)."
    )
    lr: Positive = Field(default=1e-2, description="Peak learning rate.")
    final_lr: NonNegative | None = Field(default=1e-5, description=FINAL_LR)
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="Course of the learning rate after warm-up."
    )
    # Not 1e-8: gradients have the scale of the teacher's values, and those of feature maps would
    # be below it at 8B shapes, while weight decay keeps its force (docs/losses.md).
    eps: Positive = Field(default=1e-15, description=EPS)
    # A norm to clip at would act at every step of one teacher and at none of another.
    clip: Positive | None = Field(default=None, description=CLIP)
    domains: Mixture | None = Field(
        default=None,
        description="Share of each domain in the tokens, relative; null means equal shares.",
    )


class Phase(Section):
    """A part of an expert's training, on one mixture of domains.

    `domain: NAME` is short for `domains: {NAME: 1.0}`.
    """

    domains: Mixture = Field(
        description="Share of each domain in the phase's tokens, relative; or give `domain`."
    )
    tokens: Count = Field(description="Text to train on (tokens).")
    lr: Positive | None = Field(
        default=None, description="Peak learning rate of this phase; null means `distill.lr`."
    )

    # Before the fields are checked: afterwards `domain` would be an unknown key.
    @model_validator(mode="before")
    @classmethod
    def _single_domain(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "domain" not in value:
            return value
        rest = {key: part for key, part in value.items() if key != "domain"}
        if "domains" in rest:
            raise FieldError("domain", "given beside 'domains'; keep one of the two.")
        if not isinstance(value["domain"], str):
            raise FieldError("domain", f"{value['domain']!r} is not the name of a domain.")
        return {**rest, "domains": {value["domain"]: 1.0}}


class Expert(Section):
    """One student, trained from the aligned weights through its phases in order."""

    phases: tuple[Phase, ...] = Field(min_length=1, description="What it is trained on, in order.")

    @property
    def tokens(self) -> int:
        """Tokens of text over all phases."""
        return sum(phase.tokens for phase in self.phases)


class Distill(Optimization):
    """Stage II: train the experts by cross-entropy and sparse KL divergence to the teacher.

    The source is the paper's Eq. 13.
    """

    # Paper, Eq. 13: gamma 0.9 and beta 0.1. By its ablations KL alone holds the student back, and
    # CE alone makes it forget.
    ce_weight: NonNegative = Field(
        default=0.9, description="Weight of the cross-entropy (paper's gamma)."
    )
    kl_weight: NonNegative = Field(
        default=0.1, description="Weight of the KL divergence to the teacher (paper's beta)."
    )
    kl_tail: Flag = Field(
        default=True,
        description="Count all tokens outside of the targets as one more outcome of the KL "
        "divergence. `false` leaves them out and renormalises both distributions, as the paper "
        "does; it needs `capture.mass: null`.",
    )
    # The paper's order of quality: all, then mixer, then LoRA of rank 256.
    trainable: Literal["all", "mixer", "lora"] = Field(
        default="all",
        description="Parameters that train: `all` (the paper's); `mixer`, the mixers' own "
        "(projections, maps, gates); or `lora`, low-rank adapters on all projections and what "
        "the mixers add (experts that a router chooses stay as they are).",
    )
    lora_rank: Count = Field(
        default=256, description="Rank of the adapters, with `trainable: lora` (paper: 256)."
    )
    lora_alpha: Count = Field(
        default=512, description="Scale of the adapters times their rank, with `trainable: lora`."
    )
    experts: dict[Name, Expert] = Field(
        min_length=1, description="Experts by name. A single expert needs no merge."
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield errors of the optimiser, the loss, the adapters and the experts."""
        yield from super().broken_rules()
        if self.ce_weight == self.kl_weight == 0:
            yield FieldError(
                "ce_weight",
                "0.0 beside kl_weight 0.0 leaves no loss; make one of the two positive.",
            )
        for name in ("lora_rank", "lora_alpha"):
            value = getattr(self, name)
            # A recipe written out in full names both at their defaults, whatever trains.
            default = type(self).model_fields[name].default
            if self.trainable != "lora" and value != default:
                yield FieldError(
                    name,
                    f"{value} has no effect with trainable {self.trainable!r}; set trainable to "
                    "'lora'.",
                )
        for name, expert in self.experts.items():
            yield from self._expert_errors(name, expert)

    def _expert_errors(self, name: str, expert: Expert) -> Iterator[FieldError]:
        if name in RESERVED:
            yield FieldError(f"experts.{name}", "the report uses this name itself; choose another.")
        for index, phase in enumerate(expert.phases):
            # The schedule falls from the phase's own rate to the final one, so it cannot rise.
            if phase.lr is not None and phase.lr < (self.final_lr or 0.0):
                yield FieldError(
                    f"experts.{name}.phases[{index}].lr",
                    f"{phase.lr} is below distill.final_lr ({self.final_lr}); raise it, or lower "
                    "final_lr.",
                )


class Training(Section):
    """How trainings run: checkpoints, figures, speed. Nothing here changes what is computed.

    `compile` and `reduce` change how sums are rounded.
    """

    checkpoint_steps: Count | None = Field(
        default=500,
        description="Optimiser steps from one checkpoint to the next; null means no checkpoints.",
    )
    keep_checkpoints: Count = Field(
        default=2,
        description="Maximum number of checkpoints of a training to keep; older ones are deleted.",
    )
    validate_steps: Count | None = Field(
        default=500,
        description="Optimiser steps from one validation on held-out rows to the next; null means "
        "before and after training only.",
    )
    compile: Switch = Field(
        default="auto",
        description="Compile each decoder layer with torch.compile (stage I: each mixer). `auto` "
        "is `off`, until a compiled step was compared with a plain one on a GPU.",
    )
    reduce: Literal["auto", "every", "last"] = Field(
        default="auto",
        description="When FSDP2 reduces gradients over the GPUs: at `every` micro-batch; at the "
        "`last` of a step, which takes 4 bytes a trained parameter on every GPU; or `auto`: `last` "
        "where the memory measured in the first two steps leaves room for that.",
    )
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        default=(),
        description="Where training figures go besides the log; each needs its own package.",
    )

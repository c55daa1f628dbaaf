"""The recipe's sections of the three stages: targets, alignment, distillation into experts, merge."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

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
    shape_of,
)

RESERVED = ("teacher", "merged")
"""Names that the report gives to models; no expert may have one."""

MIN_K = 16


class Capture(Section):
    """How the teacher's next-token distributions reach the distill stage."""

    targets: Literal["stored", "online"] = Field(
        default="stored",
        description="`stored` runs the teacher once and keeps its top tokens; `online` runs it in each step.",
    )
    top_k: int = Field(
        default=256,
        strict=True,
        ge=1,
        le=256,
        description="Tokens kept of each distribution at most (paper: 256).",
    )
    mass: ShareOfAll | None = Field(
        default=0.98,
        description="Keep of each distribution only the smallest set of tokens that holds this mass; null keeps all "
        "`top_k`. docs/targets.md has what each choice costs.",
    )
    min_k: int = Field(
        default=MIN_K,
        strict=True,
        ge=1,
        le=256,
        description="With `mass`, keep so many tokens at least (or all `top_k`).",
    )
    batch: Count = Field(default=8, description="Rows per forward pass of the teacher (rows).")
    shard_teacher: Flag = Field(
        default=False,
        description="Spread the layers of an online teacher over the processes, as FSDP2 does.",
    )

    @model_validator(mode="after")
    def _only_online_teachers_are_sharded(self) -> Self:
        if self.shard_teacher and self.targets == "stored":
            raise FieldError(
                "shard_teacher",
                "true has no effect with targets 'stored'; set targets to 'online'.",
            )
        return self

    @model_validator(mode="after")
    def _min_k_is_used(self) -> Self:
        if self.min_k == MIN_K:  # a recipe written out in full names it too
            return self
        if self.mass is None:
            raise FieldError(
                "min_k",
                f"{self.min_k} has no effect with mass null, which keeps all top_k; leave it out.",
            )
        if self.min_k > self.top_k:
            raise FieldError(
                "min_k", f"{self.min_k} is above top_k ({self.top_k}); it must not be."
            )
        return self


class Optimization(Section):
    """AdamW and its learning rate, shared by the stages that train."""

    batch: Count = Field(description="Rows per optimiser step, over all processes (rows).")
    micro_batch: Count | None = Field(
        default=None,
        description="Rows per forward pass of a process (rows); null means no gradient accumulation.",
    )
    lr: Positive = Field(description="Peak learning rate.")
    final_lr: NonNegative | None = Field(
        default=None,
        description="Learning rate at the last step; null: it falls towards 0, which the last step is just above.",
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Course of the learning rate after warm-up."
    )
    warmup_steps: CountOrZero = Field(
        default=0, description="Steps of linear warm-up (optimiser steps)."
    )
    weight_decay: NonNegative = Field(default=0.1, description="AdamW's decoupled weight decay.")
    betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.95), description="AdamW's decay rates of the two moments."
    )
    clip: Positive | None = Field(
        default=1.0, description="Largest norm of the gradient; null means no clipping."
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do at a loss or gradient that is not finite: `stop`, or `skip` the step and say so.",
    )

    @model_validator(mode="after")
    def _batch_is_whole(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise FieldError(
                "micro_batch",
                f"{self.micro_batch} does not divide batch ({self.batch}); take a divisor.",
            )
        return self

    @model_validator(mode="after")
    def _final_lr_is_used(self) -> Self:
        if self.final_lr is None:
            return self
        if self.schedule == "constant":
            raise FieldError(
                "final_lr",
                f"{self.final_lr} has no effect with schedule 'constant'; set it to null.",
            )
        if self.final_lr > self.lr:
            raise FieldError(
                "final_lr", f"{self.final_lr} is above lr ({self.lr}); it must not be."
            )
        return self


class Align(Optimization):
    """Stage I: each mixer learns to reproduce its teacher layer's attention output (paper, Eq. 12)."""

    tokens: Count = Field(description="Tokens of text to train on (tokens; paper: 655 million).")
    batch: Count = Field(
        default=64, description="Rows per optimiser step, over all processes (rows)."
    )
    lr: Positive = Field(default=1e-2, description="Peak learning rate.")
    final_lr: NonNegative | None = Field(
        default=1e-5,
        description="Learning rate at the last step; null: it falls towards 0, which the last step is just above.",
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="Course of the learning rate after warm-up."
    )
    domains: Mixture | None = Field(
        default=None,
        description="Share of each domain in the tokens, relative; null means all domains alike.",
    )


class Phase(Section):
    """A stretch of an expert's training on one mixture of domains; `domain: NAME` stands for `domains: {NAME: 1.0}`."""

    domains: Mixture = Field(
        description="Share of each domain in the phase's tokens, relative; or give `domain`."
    )
    tokens: Count = Field(description="Tokens of text to train on (tokens).")
    lr: Positive | None = Field(
        default=None, description="Peak learning rate of this phase; null means `distill.lr`."
    )

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
    """Stage II: cross-entropy and sparse KL divergence to the teacher, one expert per domain (paper, Eq. 13)."""

    ce_weight: NonNegative = Field(
        default=0.9, description="Weight of the cross-entropy (paper's gamma)."
    )
    kl_weight: NonNegative = Field(
        default=0.1, description="Weight of the KL divergence to the teacher (paper's beta)."
    )
    kl_tail: Flag = Field(
        default=True,
        description="Count all tokens outside of the targets as one outcome of the KL divergence; false leaves them "
        "out and renormalises both distributions (the paper's, which then needs `capture.mass: null`).",
    )
    trainable: Literal["all", "mixer", "lora"] = Field(
        default="all",
        description="Parameters that train: `all` (the paper's), the mixers' own (projections, maps, gates), or "
        "`lora`: low-rank adapters on all projections, and what the mixers add.",
    )
    lora_rank: Count = Field(
        default=256, description="Rank of the adapters, with `trainable: lora` (paper: 256)."
    )
    lora_alpha: Count = Field(default=512, description="Scale of the adapters times their rank.")
    activation_checkpointing: Flag = Field(
        default=False,
        description="Keep each decoder layer's input only and compute the rest again: less memory.",
    )
    experts: dict[Name, Expert] = Field(
        min_length=1, description="Experts by name; one alone makes no merge."
    )

    @model_validator(mode="after")
    def _adapters_are_used(self) -> Self:
        for name in (
            "lora_rank",
            "lora_alpha",
        ):  # a recipe written out in full names them, at their defaults
            value = getattr(self, name)
            if self.trainable != "lora" and value != type(self).model_fields[name].default:
                raise FieldError(
                    name,
                    f"{value} has no effect with trainable {self.trainable!r}; set trainable to 'lora'.",
                )
        return self

    @model_validator(mode="after")
    def _phases_end_lower(self) -> Self:
        """A phase's own rate must be able to fall to the final one."""
        for name, expert in self.experts.items():
            for index, phase in enumerate(expert.phases):
                if phase.lr is not None and phase.lr < (self.final_lr or 0.0):
                    raise FieldError(
                        f"experts.{name}.phases[{index}].lr",
                        f"{phase.lr} is below distill.final_lr ({self.final_lr}); raise it, or lower final_lr.",
                    )
        return self

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if self.ce_weight == self.kl_weight == 0:
            raise FieldError(
                "ce_weight", "0.0 beside kl_weight 0.0 leaves no loss; make one of them positive."
            )
        if taken := [name for name in self.experts if name in RESERVED]:
            raise FieldError(
                f"experts.{taken[0]}", "the report uses this name itself; choose another."
            )
        return self


class Training(Section):
    """How training is kept and watched; nothing here changes the weights, so nothing is made anew when it changes."""

    checkpoint_steps: Count | None = Field(
        default=500, description="Optimiser steps from one checkpoint to the next; null keeps none."
    )
    keep_checkpoints: Count = Field(
        default=2, description="Checkpoints of a training that are kept at most."
    )
    validate_steps: Count | None = Field(
        default=500,
        description="Optimiser steps from one look at the held-out rows to the next; null: before and after only.",
    )
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = Field(
        default=(), description="Where figures go besides the log; each needs its package."
    )


MergeWeights = Annotated[
    Annotated[Literal["uniform"], Tag("<word>")]
    | Annotated[dict[str, NonNegative], Tag("<mapping>")],
    Discriminator(shape_of),
]


class Merge(Section):
    """Stage III: the merged student is a weighted sum of the experts' weights (paper, Eq. 14)."""

    method: Literal["linear"] = Field(default="linear", description="How experts are merged.")
    weights: MergeWeights = Field(
        default="uniform", description="`uniform`, or a weight for each expert; they sum to 1."
    )

"""The recipe: everything a run is made from, and the checks across its sections. Imports no torch."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from xlstm_distill.recipe.data import Data
from xlstm_distill.recipe.evaluation import Evaluate, Report
from xlstm_distill.recipe.fields import SUM_TOLERANCE, FieldError, Name, Section
from xlstm_distill.recipe.model import Student, Teacher
from xlstm_distill.recipe.training import Align, Capture, Distill, Merge, Optimization, Training


class Recipe(Section):
    """One run, from teacher to report."""

    name: Name = Field(
        description="Name of the recipe; the run directory is `runs/NAME` unless given."
    )
    seed: int = Field(
        default=0, strict=True, ge=0, lt=2**32, description="Seed of everything random."
    )
    teacher: Teacher = Field(description="The model to distill.")
    student: Student = Field(default_factory=Student, description="The student's architecture.")
    data: Data = Field(description="The text to train on.")
    capture: Capture = Field(default_factory=Capture, description="Teacher targets.")
    align: Align = Field(description="Stage I.")
    distill: Distill = Field(description="Stage II.")
    merge: Merge = Field(default_factory=Merge, description="Stage III.")
    training: Training = Field(
        default_factory=Training, description="Checkpoints and logs of stages I and II."
    )
    evaluate: Evaluate = Field(description="The evaluation.")
    report: Report = Field(default_factory=Report, description="The report.")

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        mixer = self.student.mixer
        if "window" in mixer.branches and mixer.window >= self.data.context:
            raise FieldError(
                "student.mixer.window",
                f"{mixer.window} must be below data.context ({self.data.context}).",
            )
        if not self.distill.kl_tail and self.capture.mass is not None:
            raise FieldError(
                "distill.kl_tail",
                f"false renormalises over targets that capture.mass ({self.capture.mass:g}) cuts to a few tokens, and "
                "leaves little of the KL divergence; set capture.mass to null, or distill.kl_tail to true.",
            )
        self._check_domains("align.domains", self.align.domains or {})
        self._check_steps("align", self.align, self.align.tokens)
        for name, expert in self.distill.experts.items():
            for index, phase in enumerate(expert.phases):
                self._check_domains(
                    f"distill.experts.{name}.phases[{index}].domains", phase.domains
                )
                self._check_tokens(
                    f"distill.experts.{name}.phases[{index}].tokens",
                    phase.tokens,
                    self.distill.batch,
                )
            self._check_steps("distill", self.distill, expert.tokens)
        return self

    @model_validator(mode="after")
    def _merge_fits_experts(self) -> Self:
        weights, experts = self.merge.weights, self.distill.experts
        if weights == "uniform":
            return self
        if unknown := [name for name in weights if name not in experts]:
            raise FieldError(
                f"merge.weights.{unknown[0]}", f"no such expert. Experts: {', '.join(experts)}."
            )
        if missing := [name for name in experts if name not in weights]:
            raise FieldError(
                "merge.weights", f"no weight for expert {missing[0]!r}; give one (0 leaves it out)."
            )
        total = math.fsum(weights.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise FieldError("merge.weights", f"they sum to {total:.6g}; they must sum to 1.")
        return self

    def _check_domains(self, field: str, mixture: dict[str, float]) -> None:
        known = self.data.domains
        if unknown := [name for name in mixture if name not in known]:
            raise FieldError(
                f"{field}.{unknown[0]}", f"no such domain. Domains: {', '.join(known)}."
            )

    def _check_tokens(self, field: str, tokens: int, batch: int) -> None:
        step = batch * self.data.context
        if tokens < step:
            raise FieldError(
                field,
                f"{tokens} is less than one optimiser step (batch x data.context = {step} tokens).",
            )

    def _check_steps(self, section: str, settings: Optimization, tokens: int) -> None:
        self._check_tokens(f"{section}.tokens", tokens, settings.batch)
        steps = math.ceil(tokens / (settings.batch * self.data.context))
        if settings.warmup_steps >= steps:
            raise FieldError(
                f"{section}.warmup_steps",
                f"{settings.warmup_steps} must be below the {steps} steps there are.",
            )

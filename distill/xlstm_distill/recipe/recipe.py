"""The recipe: everything a run is made from, and the rules between its sections. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import Field

from xlstm_distill.recipe.data import Data
from xlstm_distill.recipe.evaluation import Evaluate, Report
from xlstm_distill.recipe.fields import FieldError, Name, Section
from xlstm_distill.recipe.merging import Merge, merge_fits_experts, tuning_fits
from xlstm_distill.recipe.model import Student, Teacher
from xlstm_distill.recipe.refining import Refine, refine_fits
from xlstm_distill.recipe.training import Align, Capture, Distill, Optimization, Training


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
    refine: Refine | None = Field(
        default=None,
        description="On-policy refinement of the experts, between stages II and III; null means "
        "none.",
    )
    merge: Merge = Field(default_factory=Merge, description="Stage III.")
    training: Training = Field(
        default_factory=Training, description="Checkpoints and logs of all trainings."
    )
    evaluate: Evaluate = Field(description="The evaluation.")
    report: Report = Field(default_factory=Report, description="The report.")

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield the broken rules between sections."""
        yield from broken_between({name: getattr(self, name) for name in type(self).model_fields})


def broken_between(sections: Mapping[str, Any]) -> Iterator[FieldError]:
    """Yield the broken rules between valid sections.

    A rule is skipped if a section that it reads is not given, because that section is invalid.
    """
    for needed, rule in RULES:
        # One bad section must not hide the problems of the others.
        if all(name in sections for name in needed):
            yield from rule(*(sections[name] for name in needed))


def _window_fits(student: Student, data: Data) -> Iterator[FieldError]:
    mixer = student.mixer
    # A window as long as the row would make the student full attention in training.
    if "window" in mixer.branches and mixer.window >= data.context:
        yield FieldError(
            "student.mixer.window", f"{mixer.window} must be below data.context ({data.context})."
        )


def _tail_fits_mass(distill: Distill, capture: Capture) -> Iterator[FieldError]:
    # Measured in docs/targets.md: with min_k 1 such a KL has 0.003 of the full one's value, and its
    # gradient hardly has the same direction (cosine 0.07).
    if not distill.kl_tail and capture.mass is not None:
        yield FieldError(
            "distill.kl_tail",
            f"false renormalises over targets that capture.mass ({capture.mass:g}) cuts to a few "
            "tokens, so little of the KL divergence is left; set capture.mass to null, or "
            "distill.kl_tail to true.",
        )


def _align_fits_data(align: Align, data: Data) -> Iterator[FieldError]:
    yield from _unknown_domains("align.domains", align.domains or {}, data)
    yield from _less_than_a_step("align.tokens", align.tokens, align.batch, data)
    yield from _too_few_steps("align", align, align.tokens, data)


def _experts_fit_data(distill: Distill, data: Data) -> Iterator[FieldError]:
    for name, expert in distill.experts.items():
        for index, phase in enumerate(expert.phases):
            field = f"distill.experts.{name}.phases[{index}]"
            yield from _unknown_domains(f"{field}.domains", phase.domains, data)
            yield from _less_than_a_step(f"{field}.tokens", phase.tokens, distill.batch, data)
        # Over all phases together: warm-up happens once, at the start of the first.
        yield from _too_few_steps("distill", distill, expert.tokens, data)


def _unknown_domains(field: str, mixture: Mapping[str, float], data: Data) -> Iterator[FieldError]:
    for name in mixture:
        if name not in data.domains:
            yield FieldError(
                f"{field}.{name}", f"no such domain. Domains: {', '.join(data.domains)}."
            )


def _less_than_a_step(field: str, tokens: int, batch: int, data: Data) -> Iterator[FieldError]:
    step = batch * data.context
    if tokens < step:
        yield FieldError(
            field,
            f"{tokens} is less than one optimiser step (batch x data.context = {step} tokens).",
        )


def _too_few_steps(
    section: str, settings: Optimization, tokens: int, data: Data
) -> Iterator[FieldError]:
    """Yield an error if warm-up takes all steps of a training of so many tokens."""
    steps = math.ceil(tokens / (settings.batch * data.context))
    # Otherwise the peak learning rate would never be reached.
    if settings.warmup_steps >= steps:
        yield FieldError(
            f"{section}.warmup_steps",
            f"{settings.warmup_steps} must be below the number of steps ({steps}).",
        )


RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[FieldError]]], ...] = (
    (("student", "data"), _window_fits),
    (("distill", "capture"), _tail_fits_mass),
    (("align", "data"), _align_fits_data),
    (("distill", "data"), _experts_fit_data),
    (("refine", "distill", "data"), refine_fits),
    (("merge", "distill"), merge_fits_experts),
    (("merge", "data", "evaluate"), tuning_fits),
)
"""The sections that each rule reads, and the rule."""

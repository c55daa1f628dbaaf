"""The recipe's section for stage III: how experts become one student."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from xlstm_distill.recipe.data import Data
from xlstm_distill.recipe.evaluation import EvalTask, Evaluate, repeated_tasks
from xlstm_distill.recipe.fields import (
    SUM_TOLERANCE,
    Count,
    FieldError,
    Folder,
    Name,
    NonNegative,
    Positive,
    Section,
    ShareOfAll,
    shape_of,
)
from xlstm_distill.recipe.training import RESERVED, Distill

MergeWeights = Annotated[
    Annotated[Literal["uniform", "tuned", "learned"], Tag("<word>")]
    | Annotated[dict[str, NonNegative], Tag("<mapping>")],
    Discriminator(shape_of),
]
WITH_SCALE = ("task_arithmetic", "ties", "dare")
"""Methods that merge differences from the seed student, the aligned one."""
WITH_DENSITY = {"ties": 0.2, "dare": 0.5}
"""Methods that leave differences out, and a density to begin with (their papers' choices)."""
DEFAULT_SCALE = 1.0
LEARNABLE = ("linear", "task_arithmetic")
"""Methods whose result is a linear function of the weights, so that these have a gradient."""


class Tuning(Section):
    """How weights are searched: merges are scored on items that the evaluation never asks."""

    trials: Count = Field(
        default=32, description="Merges to score. The first are uniform and each expert alone."
    )
    items: Count = Field(default=50, description="Items of each task.")
    tasks: tuple[EvalTask, ...] | None = Field(
        default=None,
        min_length=1,
        description="Tasks to score on; none may be a task of `evaluate`. null means new training "
        "problems of the embedded generators that the domains are made from.",
    )
    include: Folder | None = Field(
        default=None, description="Folder of lm-eval YAML tasks, relative to the recipe."
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield errors of a task named twice, and of a folder of tasks without a task."""
        yield from repeated_tasks(self.tasks or ())
        if self.include is not None and self.tasks is None:
            yield FieldError("include", "has no effect without 'tasks'; name tasks of the folder.")


class Learning(Section):
    """How weights are learned without labels: the merged student is to answer as the experts do.

    On rows of an expert's own domains its hidden states and its logits are the target.
    """

    steps: Count = Field(default=50, description="Optimiser steps (Adam).")
    rows: Count = Field(default=2, description="Rows of each expert's domains in a step.")
    lr: Positive = Field(default=0.1, description="Learning rate of the weights' logits.")
    hidden_weight: NonNegative = Field(
        default=1.0,
        description="Weight of the hidden states' relative squared error, beside the KL divergence "
        "of the logits.",
    )


class MergeSettings(Section):
    """One merge: the method, the weights, and what the method takes besides."""

    # Weighted sums and task arithmetic are what reliably helps (arXiv 2511.21437).
    method: Literal["linear", "task_arithmetic", "ties", "dare", "slerp"] = Field(
        default="linear",
        description="`linear`: weighted sum of the experts (the paper's). Of their differences "
        "from the aligned student: `task_arithmetic` scales the weighted sum; `ties` trims each to "
        "its largest, elects a sign and averages those that agree; `dare` keeps random ones. "
        "`slerp`: along the arc between two experts.",
    )
    # They sum to 1, so that the merged weights stay on the scale of the seed that all experts
    # share.
    weights: MergeWeights = Field(
        default="uniform",
        description="`uniform`, a weight for each expert (they sum to 1), `tuned` (searched on "
        "validation items) or `learned` (matches the experts' hidden states and logits).",
    )
    layer_groups: Count = Field(
        default=1,
        description="With `tuned` and `learned`: groups of successive layers, each with weights of "
        "its own. 1 means one weight for each expert.",
    )
    tuning: Tuning = Field(default_factory=Tuning, description="The search of `tuned` weights.")
    learning: Learning = Field(
        default_factory=Learning, description="The training of `learned` weights."
    )
    scale: Positive | None = Field(
        default=None,
        description="Factor of the merged differences, with `task_arithmetic`, `ties` and `dare`; "
        "null means 1.",
    )
    density: ShareOfAll | None = Field(
        default=None,
        description="Share of each tensor's differences that is kept: the largest with `ties`, "
        "random ones with `dare`. Both need it.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield errors of settings that the method or the weights do not take, or lack."""
        yield from self._weights_rules()
        method = self.method
        if self.scale is not None and method not in WITH_SCALE:
            yield FieldError(
                "scale", f"{self.scale} has no effect with method {method!r}; leave it out."
            )
        if self.density is not None and method not in WITH_DENSITY:
            yield FieldError(
                "density", f"{self.density} has no effect with method {method!r}; leave it out."
            )
        if self.density is None and method in WITH_DENSITY:
            yield FieldError(
                "density",
                f"missing; method {method!r} needs one, for example {WITH_DENSITY[method]}.",
            )

    def _weights_rules(self) -> Iterator[FieldError]:
        found = self.weights if isinstance(self.weights, str) else "given"
        if self.layer_groups > 1 and found not in ("tuned", "learned"):
            yield FieldError(
                "layer_groups",
                f"{self.layer_groups} has no effect with {found} weights; leave it out.",
            )
        # By value: a run's saved recipe names every field, also those of other weights.
        for key, section, word in (
            ("tuning", Tuning(), "tuned"),
            ("learning", Learning(), "learned"),
        ):
            if getattr(self, key) != section and found != word:
                yield FieldError(key, f"has no effect with {found} weights; leave it out.")
        if found == "learned" and self.method not in LEARNABLE:
            yield FieldError(
                "weights",
                f"'learned' needs a method that is linear in the weights "
                f"({' or '.join(LEARNABLE)}), not {self.method!r}.",
            )

    @property
    def found(self) -> str | None:
        """How the weights are found: `tuned` or `learned`; None where they are known."""
        return self.weights if self.weights in ("tuned", "learned") else None

    def weights_of(self, experts: Iterable[str]) -> dict[str, float]:
        """Weights by expert as far as they are known; uniform ones are 1/K each.

        Those that are found later are uniform here.
        """
        if isinstance(self.weights, dict):
            return dict(self.weights)
        names = list(experts)
        return {name: 1 / len(names) for name in names}


class Merge(MergeSettings):
    """Stage III: one student from all experts (paper, Eq. 14: the weighted sum of their weights).

    `variants` are further merges, each evaluated beside the merged student.
    """

    variants: dict[Name, MergeSettings] = Field(
        default_factory=dict,
        description="Further merges of the same experts by name, each with keys of its own; none "
        "replaces the merged student.",
    )


def merge_fits_experts(merge: Merge, distill: Distill) -> Iterator[FieldError]:
    """Yield errors of names and weights that do not fit the experts, and of slerp's two experts."""
    experts = list(distill.experts)
    yield from _fits("merge", merge, experts)
    for name, variant in merge.variants.items():
        path = f"merge.variants.{name}"
        # A variant is evaluated under its name, as an expert is.
        if name in (*RESERVED, *experts):
            yield FieldError(path, "an expert or the report uses this name; choose another.")
        yield from _fits(path, variant, experts)


def tuning_fits(merge: Merge, data: Data, evaluate: Evaluate) -> Iterator[FieldError]:
    """Yield errors of validation tasks that are held out, or that nothing tells."""
    yield from _tuning_fits("merge", merge, data, evaluate)
    for name, variant in merge.variants.items():
        yield from _tuning_fits(f"merge.variants.{name}", variant, data, evaluate)


def _tuning_fits(
    path: str, merge: MergeSettings, data: Data, evaluate: Evaluate
) -> Iterator[FieldError]:
    if merge.found != "tuned":
        return
    held_out = {task.name for task in evaluate.tasks}
    for index, task in enumerate(merge.tuning.tasks or ()):
        if task.name in held_out:
            yield FieldError(
                f"{path}.tuning.tasks[{index}].name",
                f"{task.name!r} is a task of evaluate.tasks, which must stay held out; name "
                "another.",
            )
    if merge.tuning.tasks is None and not embedded_domains(data):
        yield FieldError(
            f"{path}.tuning.tasks",
            "missing; no domain is made by an embedded generator, so name tasks to score on.",
        )


def embedded_domains(data: Data) -> dict[str, list[str]]:
    """Embedded generators of each domain that has any: their tasks have validation items."""
    found: dict[str, list[str]] = {}
    for name, domain in data.domains.items():
        names = [source.generator for source in domain.sources if source.generator is not None]
        if names:
            found[name] = list(dict.fromkeys(names))
    return found


def _fits(path: str, merge: MergeSettings, experts: list[str]) -> Iterator[FieldError]:
    if isinstance(merge.weights, dict):
        yield from _weights_fit(path, merge.weights, experts)
    used = [name for name, weight in merge.weights_of(experts).items() if weight > 0]
    if merge.method == "slerp" and len(used) != 2:
        yield FieldError(
            f"{path}.method",
            f"'slerp' merges two experts, and {len(used)} have a weight above 0; give two of them "
            "one in weights, or choose another method.",
        )


def _weights_fit(path: str, weights: dict[str, float], experts: list[str]) -> Iterator[FieldError]:
    for name in weights:
        if name not in experts:
            yield FieldError(
                f"{path}.weights.{name}", f"no such expert. Experts: {', '.join(experts)}."
            )
    missing = [name for name in experts if name not in weights]
    for name in missing:
        yield FieldError(
            f"{path}.weights", f"no weight for expert {name!r}; give one (0 leaves it out)."
        )
    total = math.fsum(weights.values())
    # Weights of the wrong experts need not sum to anything yet.
    if weights.keys() == set(experts) and abs(total - 1) > SUM_TOLERANCE:
        yield FieldError(f"{path}.weights", f"they sum to {total:.6g}; they must sum to 1.")

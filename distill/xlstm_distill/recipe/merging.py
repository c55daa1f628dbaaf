"""The recipe's section for stage III: how experts become one student."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from xlstm_distill.recipe.fields import (
    SUM_TOLERANCE,
    FieldError,
    Name,
    NonNegative,
    Positive,
    Section,
    ShareOfAll,
    shape_of,
)
from xlstm_distill.recipe.training import RESERVED, Distill

MergeWeights = Annotated[
    Annotated[Literal["uniform"], Tag("<word>")]
    | Annotated[dict[str, NonNegative], Tag("<mapping>")],
    Discriminator(shape_of),
]
WITH_SCALE = ("task_arithmetic", "ties", "dare")
"""Methods that merge differences from the seed student, the aligned one."""
WITH_DENSITY = {"ties": 0.2, "dare": 0.5}
"""Methods that leave differences out, and a density to begin with (their papers' choices)."""
DEFAULT_SCALE = 1.0


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
        default="uniform", description="`uniform`, or a weight for each expert; they sum to 1."
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
        """Yield errors of settings that the method does not take, or lacks."""
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

    def weights_of(self, experts: Iterable[str]) -> dict[str, float]:
        """Weights by expert; uniform ones are 1/K each."""
        names = list(experts)
        if self.weights == "uniform":
            return {name: 1 / len(names) for name in names}
        return dict(self.weights)


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


def _fits(path: str, merge: MergeSettings, experts: list[str]) -> Iterator[FieldError]:
    if merge.weights != "uniform":
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

"""What a report shows: records that a run, or another reader of results, fills."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from xlstm_eval.metrics import ALPHAS, MARGIN, compare, pair_results
from xlstm_eval.problems import FieldError
from xlstm_eval.records import Comparison, Frozen, LongContext, Name, TaskResult
from xlstm_eval.report.items import ItemSet
from xlstm_eval.report.speed import Speed

Finite = Annotated[float, Field(allow_inf_nan=False)]
HEADLINE_ALPHA = 0.05


class ReportModel(Frozen):
    """Name one student, its role (merged, expert, generalist, ...) and its results.

    ``domains`` are those that an expert was trained on.
    """

    name: Name
    role: Name
    results: tuple[TaskResult, ...]
    domains: tuple[Name, ...] = ()


class Curve(Frozen):
    """Hold one training curve: values over steps, and the same figure over held-out rows."""

    step: tuple[int, ...]
    value: tuple[Finite, ...]
    unit: str = ""
    held_out_step: tuple[int, ...] = ()
    held_out: tuple[Finite, ...] = ()

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        for field, values, steps in (
            ("value", self.value, self.step),
            ("held_out", self.held_out, self.held_out_step),
        ):
            if len(steps) != len(values):
                raise FieldError(
                    field, f"{len(values)} values for {len(steps)} steps. Give one for each."
                )
        return self


class ReportData(Frozen):
    """Hold all that a report shows.

    ``gates`` maps a model's name to its mean output gates, layers x heads (null: the head keeps
    full attention). ``losses`` maps a stage
    ("align", "distill/math") to its named curves, ``timings`` to its seconds. ``items`` are the
    headline's answers beside its teacher's; ``no_items`` says why some are not there. ``speed`` and
    ``long_context`` map a model's name (the teacher's is "teacher") to what was measured.
    ``finished`` is when the last evaluation was (ISO 8601, UTC). ``provenance`` holds seed,
    versions, machine and hashes; ``recipe`` is the recipe's text. ``margin`` is that of the
    decision over all tasks (`xlstm_eval.statistics.pooled`).
    """

    title: Name
    teacher: Name
    teacher_results: Annotated[tuple[TaskResult, ...], Field(min_length=1)]
    models: Annotated[tuple[ReportModel, ...], Field(min_length=1)]
    gates: dict[str, tuple[tuple[Finite | None, ...], ...]] | None = None
    losses: dict[str, dict[str, Curve]] = Field(default_factory=dict)
    timings: dict[str, Finite] = Field(default_factory=dict)
    items: ItemSet | None = None
    no_items: str = ""
    speed: dict[str, Speed] = Field(default_factory=dict)
    long_context: dict[str, LongContext] = Field(default_factory=dict)
    finished: str = ""
    provenance: dict[str, str] = Field(default_factory=dict)
    recipe: str = ""
    alphas: tuple[float, ...] = ALPHAS
    margin: float = MARGIN

    @model_validator(mode="after")
    def _check(self) -> Self:
        names: set[str] = set()
        for model in self.models:
            if model.name in names:
                raise FieldError(
                    "models", f"the name {model.name!r} appears twice. Give each model its own."
                )
            names.add(model.name)
        for name, rows in (self.gates or {}).items():
            lengths = {len(row) for row in rows}
            if len(lengths) != 1 or 0 in lengths:
                raise FieldError(
                    f"gates.{name}", "rows of unequal length, or none. Give layers x heads."
                )
        return self

    def headline(self) -> ReportModel:
        """Return the model the report is about: the merged one, else the first."""
        for model in self.models:
            if model.role == "merged":
                return model
        return self.models[0]

    def comparisons(self) -> list[Comparison]:
        """Compare every model with the teacher, at ``alphas`` and at the headline's tolerances.

        Each comparison has its statistics.
        """
        from xlstm_eval.statistics.measure import measure  # scipy takes a second to load

        # The tables of models need these two, whatever the recipe lists.
        alphas = sorted({*self.alphas, 0.0, HEADLINE_ALPHA})
        comparisons = []
        for model in self.models:
            pairs = pair_results(self.teacher_results, model.results)
            compared = compare(model.name, pairs, alphas)
            comparisons.append(measure(compared, alphas, self.margin))
        return comparisons

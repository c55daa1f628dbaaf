"""How many rows of each domain the stages read. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xlstm_distill.recipe import Recipe

HELD_OUT_SPREAD = 16
"""Held-out rows lie evenly over the first rows of a domain, one in so many.

They do not depend on how many rows come after these.
"""


def rows_needed(recipe: Recipe, domain: str, captured: Mapping[str, int] | None = None) -> int:
    """Rows of a domain that its longest use reads once, and its validation rows.

    `captured` are the `captured_rows`, for callers that ask for many domains.
    """
    captured = captured_rows(recipe) if captured is None else captured
    return max(rows_to_align(recipe, domain), captured.get(domain, 0))


def rows_to_align(recipe: Recipe, domain: str) -> int:
    """Rows of a domain that alignment reads once, and its validation rows."""
    aligned_on = recipe.align.domains or dict.fromkeys(recipe.data.domains, 1.0)
    read = _rows_read(recipe.align.tokens, recipe.align.batch, recipe)
    # Validation rows come on top: training never reads them.
    return math.ceil(read * _share(aligned_on, domain)) + recipe.data.validation_rows


def expert_rows(recipe: Recipe, expert: str) -> dict[str, int]:
    """Rows of each of its domains that an expert reads once, and validation rows.

    Domains are in the recipe's order.
    """
    batch = recipe.distill.batch
    phases = recipe.distill.experts[expert].phases
    rows_of_phases = [_rows_read(phase.tokens, batch, recipe) for phase in phases]
    found = {}
    for name in recipe.data.domains:
        if not any(name in phase.domains for phase in phases):
            continue
        # Summed before rounding up: each phase goes on after the rows of the one before.
        read = sum(
            rows * _share(phase.domains, name)
            for phase, rows in zip(phases, rows_of_phases, strict=True)
        )
        found[name] = math.ceil(read) + recipe.data.validation_rows
    return found


def captured_rows(recipe: Recipe) -> dict[str, int]:
    """Rows of each domain that some expert reads, in the recipe's order."""
    of_experts = [expert_rows(recipe, expert) for expert in recipe.distill.experts]
    found = {}
    for name in recipe.data.domains:
        # The most that one expert reads, not the sum: each expert reads the rows from the first one
        # on.
        counts = [rows[name] for rows in of_experts if name in rows]
        if counts:
            found[name] = max(counts)
    return found


def held_out_span(recipe: Recipe, domain: str) -> int:
    """Rows at the start of a domain over which its validation rows lie."""
    # Held-out rows are part of a domain's identity. A bound by the first rows lets a larger budget
    # later keep the rows, targets and trainings there are.
    return min(rows_needed(recipe, domain), HELD_OUT_SPREAD * recipe.data.validation_rows)


def _rows_read(tokens: int, batch: int, recipe: Recipe) -> int:
    """Rows of a token budget, rounded up to whole optimiser steps."""
    return math.ceil(tokens / (batch * recipe.data.context)) * batch


def _share(weights: Mapping[str, float], domain: str) -> float:
    return weights.get(domain, 0.0) / sum(weights.values())


def keys_of_rows(name: str) -> dict[str, str]:
    """Recipe keys of the parts of a domain's request, for messages."""
    return {
        "sources": f"data.domains.{name}.sources",
        "context": "data.context",
        "long_documents": "data.long_documents",
        "rows": f"rows of {name}",
    }


def notes_of_rows(
    recipe: Recipe, domain: str, captured: Mapping[str, int] | None = None
) -> dict[str, dict[str, int]]:
    """What a domain's identity holds besides its rows' settings: where validation rows lie."""
    held = recipe.data.validation_rows
    span = min(rows_needed(recipe, domain, captured), HELD_OUT_SPREAD * held)
    return {"data": {"validation_rows": held, "rows that validation is drawn from": span}}

"""How many rows of each domain the stages read. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xlstm_distill.recipe import Recipe

HELD_OUT_SPREAD = 16
"""Held-out rows lie evenly over so many times as many rows at the start, whatever comes after them."""


def rows_needed(recipe: Recipe, domain: str) -> int:
    """Rows of a domain that the longest of its uses reads once, and its validation rows."""
    return max(rows_to_align(recipe, domain), captured_rows(recipe).get(domain, 0))


def rows_to_align(recipe: Recipe, domain: str) -> int:
    """Rows of a domain that alignment reads once, and its validation rows."""
    aligned_on = recipe.align.domains or dict.fromkeys(recipe.data.domains, 1.0)
    read = _rows_read(recipe.align.tokens, recipe.align.batch, recipe) * _share(aligned_on, domain)
    return math.ceil(read) + recipe.data.validation_rows


def expert_rows(recipe: Recipe, expert: str) -> dict[str, int]:
    """Rows of each of its domains that an expert reads once, and validation rows; in the recipe's order."""
    phases = recipe.distill.experts[expert].phases
    steps = [(phase, _rows_read(phase.tokens, recipe.distill.batch, recipe)) for phase in phases]
    return {
        name: math.ceil(sum(rows * _share(phase.domains, name) for phase, rows in steps))
        + recipe.data.validation_rows
        for name in recipe.data.domains
        if any(name in phase.domains for phase in phases)
    }


def captured_rows(recipe: Recipe) -> dict[str, int]:
    """Rows of each domain that some expert reads, in the recipe's order."""
    seen = [expert_rows(recipe, expert) for expert in recipe.distill.experts]
    return {
        name: max(rows[name] for rows in seen if name in rows)
        for name in recipe.data.domains
        if any(name in rows for rows in seen)
    }


def held_out_span(recipe: Recipe, domain: str) -> int:
    """Rows at the start of a domain over which its validation rows lie."""
    return min(rows_needed(recipe, domain), HELD_OUT_SPREAD * recipe.data.validation_rows)


def _rows_read(tokens: int, batch: int, recipe: Recipe) -> int:
    """Rows of a budget, rounded up to whole optimiser steps."""
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

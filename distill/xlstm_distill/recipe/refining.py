"""The recipe's section for on-policy refinement, and how it must fit the other sections."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import Field

from xlstm_distill.recipe.data import Data
from xlstm_distill.recipe.fields import (
    Count,
    FieldError,
    Flag,
    Fraction,
    Name,
    Positive,
    ShareOfAll,
)
from xlstm_distill.recipe.training import Distill, Optimization

MOST_SAMPLED = 64
"""Samples decoded at once where the recipe names no number."""


class Refine(Optimization):
    """On-policy refinement of experts after stage II; optional, and not in the paper.

    An expert samples continuations of its domains' prompts. The teacher, which runs in each step,
    scores them, and the expert trains on the KL divergence (arXiv 2306.13649).
    """

    tokens: Count = Field(
        description="Text to train each expert on (tokens). Every sample counts as `prompt_tokens` "
        "+ `new_tokens`, also where it ends earlier."
    )
    batch: Count = Field(
        default=64, description="Samples per optimiser step, over all processes (rows)."
    )
    prompt_tokens: Count = Field(
        default=512,
        description="Maximum length of a prompt (tokens). A conversation gives what comes before a "
        "response; other text gives the beginning of a document.",
    )
    new_tokens: Count = Field(default=512, description="Maximum length of a continuation (tokens).")
    temperature: Positive = Field(default=1.0, description="Temperature of sampling.")
    top_p: ShareOfAll = Field(
        default=1.0,
        description="Sample from the smallest set of tokens whose probabilities sum to at least "
        "this; 1.0 means from all.",
    )
    off_policy: Fraction = Field(
        default=0.0,
        description="Share of the samples that are the text's own continuation instead of the "
        "expert's.",
    )
    sample_batch: Count | None = Field(
        default=None,
        description="Samples that a process decodes at once (rows); null means its share of a "
        f"step, at most {MOST_SAMPLED}.",
    )
    # No mass and no store here: what the teacher's top tokens leave out is one outcome.
    top_k: Count = Field(
        default=256, description="Tokens of the teacher's distribution that the loss compares."
    )
    kl_tail: Flag = Field(
        default=True,
        description="Count all tokens outside of the top k as one more outcome of the KL "
        "divergence; `false` renormalises both distributions over the top k.",
    )
    experts: tuple[Name, ...] | None = Field(
        default=None, min_length=1, description="Experts to refine; null means all."
    )
    shard_teacher: Flag = Field(
        default=False,
        description="Spread the layers of the teacher over the processes, as FSDP2 does.",
    )

    @property
    def row_tokens(self) -> int:
        """Tokens of a sample at most, prompt included."""
        return self.prompt_tokens + self.new_tokens

    def steps(self) -> int:
        """Optimiser steps of an expert's refinement; the last one is a whole one."""
        return math.ceil(self.tokens / (self.batch * self.row_tokens))

    def refined(self, distill: Distill) -> list[str]:
        """Names of the experts that are refined, in the recipe's order."""
        return [name for name in distill.experts if self.experts is None or name in self.experts]


def refine_fits(refine: Refine | None, distill: Distill, data: Data) -> Iterator[FieldError]:
    """Yield the broken rules between the section and what it refines."""
    if refine is None:
        return
    for name in refine.experts or ():
        if name not in distill.experts:
            known = ", ".join(distill.experts)
            yield FieldError("refine.experts", f"no expert {name!r}. Experts: {known}.")
    if refine.row_tokens > data.context:
        yield FieldError(
            "refine.new_tokens",
            f"{refine.new_tokens} and prompt_tokens ({refine.prompt_tokens}) are more than "
            f"data.context ({data.context}) together; lower one of them.",
        )
    step = refine.batch * refine.row_tokens
    if refine.tokens < step:
        yield FieldError(
            "refine.tokens",
            f"{refine.tokens} is less than one optimiser step (batch x (prompt_tokens + "
            f"new_tokens) = {step} tokens).",
        )
    # Otherwise the peak learning rate would never be reached.
    if refine.warmup_steps >= refine.steps():
        yield FieldError(
            "refine.warmup_steps",
            f"{refine.warmup_steps} must be below the number of steps ({refine.steps()}).",
        )

"""The sections for the models: teacher, student and mixer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from xlstm_distill.recipe.fields import (
    Count,
    CountOrZero,
    FieldError,
    Flag,
    HubOrPath,
    Number,
    Section,
    Text,
)
from xlstm_distill.recipe.kept import KeptAttention


class Teacher(Section):
    """The causal language model to distill; docs/families.md lists the families."""

    path: HubOrPath = Field(
        description="Local directory, relative to the recipe, or hub id `owner/name`."
    )
    revision: Text | None = Field(
        default=None,
        description="Branch, tag or commit on the hub. A commit makes a run reproducible.",
    )
    # Three formats without quantisation: a student takes over the weights, and those must train.
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Number format of the weights."
    )
    trust_remote_code: Flag = Field(
        default=False, description="Allow Python code that comes with the teacher to run."
    )


class MixerConfig(Section):
    """The mixer that replaces the teacher's attention (paper, Eq. 11)."""

    # W = 512 and 4 sinks in the paper's trainings.
    window: Count = Field(
        default=512,
        description="Keys that each query sees in the window branch, itself included (tokens).",
    )
    sinks: CountOrZero = Field(
        default=4,
        description="First tokens of each document that stay visible to the window (tokens).",
    )
    # The paper's map is a softmax over the features. Hedgehog's own adds the negated half, which
    # doubles the state.
    feature_map: Literal["softmax", "hedgehog"] = Field(
        default="softmax",
        description="Feature map of the mLSTM branch's queries and keys. Both begin with a linear "
        "map per head. `softmax` takes the softmax over the features (the paper's); `hedgehog` "
        "concatenates the softmax of x and of -x.",
    )
    feature_dim: Count | None = Field(
        default=None,
        description="Output width of the feature map's linear map; null means the head dimension.",
    )
    # The paper gives no initial biases. sigmoid(3) = 0.95: the memory begins with a reach of about
    # 20 tokens.
    forget_bias: Number = Field(
        default=3.0, description="Initial bias of the forget gate (before the sigmoid)."
    )
    # sigmoid(-2) = 0.12 for the mLSTM. LoLCATs' code has -2.197, which is 0.1.
    output_gate_bias: Number = Field(
        default=-2.0,
        description="Initial bias of the output gate (before the sigmoid). Below 0, the student "
        "starts close to window attention.",
    )
    branches: tuple[Literal["mlstm", "window"], ...] = Field(
        default=("mlstm", "window"),
        min_length=1,
        description="Branches of the mixer. The paper's mixer has both; one alone is an ablation.",
    )
    attention: KeptAttention | None = Field(
        default=None,
        description="Layers and heads that keep the teacher's full attention, whose keys and values"
        " then grow with the text; null means none.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error if a branch is named twice."""
        if len(set(self.branches)) < len(self.branches):
            yield FieldError(
                "branches", f"{list(self.branches)} names a branch twice; name each once."
            )

    def kept(self, layers: int, heads: int) -> list[tuple[int, ...]]:
        """Return which of H query heads each of L layers keeps; mostly none."""
        return [()] * layers if self.attention is None else self.attention.of(layers, heads)


class Student(Section):
    """The student: the teacher with other mixers."""

    mixer: MixerConfig = Field(default_factory=MixerConfig, description="The mixer of every layer.")
    # Backends round differently and compute the same function, so no artifact is remade for it.
    backend: Literal["auto", "torch", "triton"] = Field(
        default="auto",
        description="Kernels of the mixers, in every stage: `auto` (`triton` on CUDA where its "
        "kernels pass a self-check, else `torch`), plain `torch`, or `triton` (needs CUDA). "
        "Another one rounds differently; it makes nothing again.",
    )

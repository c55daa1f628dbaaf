"""The sections for the models: teacher, student and mixer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

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


class Teacher(Section):
    """The causal language model to distill: Llama, Qwen2, Qwen3, Olmo2 or Olmo3."""

    path: HubOrPath = Field(
        description="Local directory, relative to the recipe, or hub id `owner/name`."
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit on the hub; pin it to reproduce a run."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Number format of the weights."
    )
    trust_remote_code: Flag = Field(
        default=False, description="Run code that comes with the teacher."
    )


class MixerConfig(Section):
    """The mixer that takes the place of every attention layer (paper, Eq. 11)."""

    window: Count = Field(
        default=512,
        description="Keys each query sees in the window branch, itself included (tokens).",
    )
    sinks: CountOrZero = Field(
        default=4, description="First tokens of each document that stay visible (tokens)."
    )
    feature_map: Literal["softmax", "hedgehog"] = Field(
        default="softmax",
        description="Map of queries and keys for the mLSTM branch, after a linear map per head: `softmax` over "
        "features (the paper's), or `hedgehog`, softmax of x and of -x side by side.",
    )
    feature_dim: Count | None = Field(
        default=None, description="Width of the linear map; null means the head's dimension."
    )
    forget_bias: Number = Field(
        default=3.0, description="Initial bias of the forget gate (before the sigmoid)."
    )
    output_gate_bias: Number = Field(
        default=-2.0,
        description="Initial bias of the output gate (before the sigmoid); below 0 starts near window attention.",
    )
    branches: tuple[Literal["mlstm", "window"], ...] = Field(
        default=("mlstm", "window"),
        min_length=1,
        description="Branches to use; both is the paper's mixer, one is an ablation.",
    )

    @model_validator(mode="after")
    def _branches_differ(self) -> Self:
        if len(set(self.branches)) < len(self.branches):
            raise FieldError(
                "branches", f"{list(self.branches)} names a branch twice; name each once."
            )
        return self


class Student(Section):
    """The student: the teacher with other mixers."""

    mixer: MixerConfig = Field(default_factory=MixerConfig, description="The mixer of every layer.")

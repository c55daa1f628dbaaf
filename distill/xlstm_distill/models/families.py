"""The families of teachers, and all that differs between them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from xlstm_distill.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CausalLM: TypeAlias = Any
"""A causal language model of transformers, teacher or student. Not typed: attributes are set per
instance."""
Rotary: TypeAlias = "Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]"


@dataclass(frozen=True)
class Family:
    """A Transformer architecture that can be a teacher.

    `norm` says where queries and keys are normalised: not at all, per head after the head split
    (Qwen3), or over the full projection before it (Olmo).
    """

    model_type: str
    class_prefix: str
    norm: Literal["none", "head", "projection"]

    @property
    def modeling(self) -> ModuleType:
        """The family's modeling module in transformers."""
        return importlib.import_module(
            f"transformers.models.{self.model_type}.modeling_{self.model_type}"
        )

    @property
    def causal_lm(self) -> Any:
        """The family's causal language model class."""
        return getattr(self.modeling, f"{self.class_prefix}ForCausalLM")

    @property
    def config(self) -> Any:
        """The family's configuration class."""
        module = importlib.import_module(
            f"transformers.models.{self.model_type}.configuration_{self.model_type}"
        )
        return getattr(module, f"{self.class_prefix}Config")

    @property
    def body_name(self) -> str:
        """Name of the family's model without a head."""
        return f"{self.class_prefix}Model"

    @property
    def apply_rotary(self) -> Rotary:
        """The family's own rotary embedding; Llama's and Olmo's round differently in bf16."""
        return self.modeling.apply_rotary_pos_emb


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", "none"),
        # qwen2 has biases in its projections. They come along, because the mixer takes the modules
        # over.
        Family("qwen2", "Qwen2", "none"),
        Family("qwen3", "Qwen3", "head"),
        Family("olmo2", "Olmo2", "projection"),
        Family("olmo3", "Olmo3", "projection"),
    )
}


def family_of(model_type: str) -> Family:
    """Find the family of a teacher's `config.model_type`.

    Raises:
        UserError: the architecture is not supported.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"teacher.model_type: {model_type!r} cannot be converted; supported are"
            f" {', '.join(FAMILIES)}. Choose a teacher of one of these architectures."
        )
    return FAMILIES[model_type]

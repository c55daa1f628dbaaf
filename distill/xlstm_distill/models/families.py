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


def everywhere(attention: Any) -> bool:
    """Rotary positions in all layers."""
    return True


def where_flagged(attention: Any) -> bool:
    """Rotary positions where the layer says so (SmolLM3)."""
    return bool(attention.use_rope)


def where_it_slides(attention: Any) -> bool:
    """Rotary positions in layers with a window (Cohere 2)."""
    return attention.sliding_window is not None


def where_it_slides_or_none_does(attention: Any) -> bool:
    """Rotary positions in layers with a window, or everywhere if no layer has one (Exaone 4)."""
    return attention.config.sliding_window is None or attention.is_sliding


def one(config: Any) -> float:
    """Logits as the head gives them."""
    return 1.0


def granites(config: Any) -> float:
    """Granite divides its logits."""
    return 1.0 / config.logits_scaling


def coheres(config: Any) -> float:
    """Cohere 2 multiplies its logits."""
    return float(config.logit_scale)


def uncapped(config: Any) -> float | None:
    """Logits without a bound."""
    return None


def gemmas(config: Any) -> float | None:
    """Gemma 2 bounds its logits; Gemma 3 may, which no released model does."""
    cap = config.final_logit_softcapping
    return None if cap is None else float(cap)


def gemma2s(config: Any) -> float | None:
    """Gemma 2 bounds the scores of its attention."""
    cap = config.attn_logit_softcapping
    return None if cap is None else float(cap)


@dataclass(frozen=True)
class Family:
    """A Transformer architecture that can be a teacher.

    `norm` says where queries and keys are normalised: not at all, per head after the head split
    (Qwen3), or over the full projection before it (Olmo). `rotates` tells of a layer's attention
    whether it has rotary positions. `window`: whether a sliding window is a fact of each layer or
    of the whole model. `fused`: queries, keys and values are one projection, `qkv_proj`.
    `logit_factor`: what the model multiplies its head's output with; `logit_cap`: the c of logits
    that are bounded as c tanh(x / c), or None; `score_cap`: that of the attention's scores.
    `sink_logits`: each head has a learned logit that is in its softmax's denominator alone, the
    attention's parameter `sinks`. `module` and `causal_prefix`: where transformers
    does not use `model_type` and `class_prefix`.

    For counting parameters: `norms` of the hidden width in each layer and the vectors of weights
    that each has (`norm_weights`), which `biases` a configuration can ask for, whether the MLP is
    gated and whether its first two projections are one (`fused_mlp`), and whether embeddings are
    `tied` where the configuration says nothing. `fp32_norms`: norms multiply by their weights
    before they cast back. `experts`: MLPs are mixtures of experts, as Mixtral, Qwen or gpt-oss name
    them.
    """

    model_type: str
    class_prefix: str
    norm: Literal["none", "head", "projection"]
    rotates: Callable[[Any], bool] = everywhere
    window: Literal["layer", "model"] = "layer"
    fused: bool = False
    logit_factor: Callable[[Any], float] = one
    logit_cap: Callable[[Any], float | None] = uncapped
    module: str = ""
    causal_prefix: str = ""
    norms: int = 2
    norm_weights: int = 1
    fp32_norms: bool = False
    biases: Literal["all", "attention", "qkv", "always qkv", "qkv_bias", "use_bias", "none"] = (
        "attention"
    )
    gated_mlp: bool = True
    fused_mlp: bool = False
    tied: bool = False
    experts: Literal["none", "mixtral", "qwen", "gpt_oss"] = "none"
    score_cap: Callable[[Any], float | None] = uncapped
    sink_logits: bool = False

    @property
    def own_softmax(self) -> bool:
        """Whether the attention's softmax is another than PyTorch's fused attention computes."""
        return self.sink_logits or self.score_cap is not uncapped

    def reach(self, attention: Any) -> int | None:
        """Return how many keys a layer of the teacher sees, its own included; None means all."""
        if self.window == "model":
            found: int | None = attention.config.sliding_window
            return found
        # Exaone 4 names a window in all layers, and uses it in those that slide.
        if not getattr(attention, "is_sliding", True):
            return None
        return getattr(attention, "sliding_window", None)

    @property
    def package(self) -> str:
        """The family's package in transformers."""
        return f"transformers.models.{self.module or self.model_type}"

    @property
    def modeling(self) -> ModuleType:
        """The family's modeling module in transformers."""
        return importlib.import_module(f"{self.package}.modeling_{self.module or self.model_type}")

    def class_name(self, suffix: str) -> str:
        """Name one of the family's classes; `ForCausalLM` may have a prefix of its own."""
        own = self.causal_prefix if suffix == "ForCausalLM" else ""
        return (own or self.class_prefix) + suffix

    @property
    def causal_lm(self) -> Any:
        """The family's causal language model class."""
        return getattr(self.modeling, self.class_name("ForCausalLM"))

    @property
    def config(self) -> Any:
        """The family's configuration class."""
        module = importlib.import_module(
            f"{self.package}.configuration_{self.module or self.model_type}"
        )
        return getattr(module, self.class_name("Config"))

    @property
    def body_name(self) -> str:
        """Name of the family's model without a head."""
        return self.class_name("Model")

    @property
    def apply_rotary(self) -> Rotary:
        """The family's own rotary embedding; Llama's and Olmo's round differently in bf16."""
        return self.modeling.apply_rotary_pos_emb


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", "none", biases="all"),
        # qwen2 has biases in its projections. They come along, because the mixer takes the modules
        # over.
        Family("qwen2", "Qwen2", "none", biases="always qkv"),
        Family("qwen3", "Qwen3", "head"),
        Family("olmo2", "Olmo2", "projection", fp32_norms=True),
        Family("olmo3", "Olmo3", "projection", fp32_norms=True),
        Family("olmo", "Olmo", "none", norm_weights=0),
        Family("mistral", "Mistral", "none", window="model", biases="none"),
        Family("ministral", "Ministral", "none", biases="none"),
        Family("granite", "Granite", "none", logit_factor=granites, biases="all"),
        Family("smollm3", "SmolLM3", "none", where_flagged, biases="all"),
        Family("exaone4", "Exaone4", "head", where_it_slides_or_none_does, biases="none"),
        Family(
            "cohere2", "Cohere2", "none", where_it_slides, logit_factor=coheres, norms=1, tied=True
        ),
        Family("glm4", "Glm4", "none", norms=4, biases="qkv", fused_mlp=True),
        Family("phi3", "Phi3", "none", window="model", fused=True, biases="none", fused_mlp=True),
        Family("gemma", "Gemma", "none", fp32_norms=True, tied=True),
        Family(
            "gemma2",
            "Gemma2",
            "none",
            logit_cap=gemmas,
            norms=4,
            fp32_norms=True,
            tied=True,
            score_cap=gemma2s,
        ),
        Family(
            "gemma3_text",
            "Gemma3Text",
            "head",
            logit_cap=gemmas,
            module="gemma3",
            causal_prefix="Gemma3",
            norms=4,
            fp32_norms=True,
            tied=True,
        ),
        Family(
            "starcoder2",
            "Starcoder2",
            "none",
            window="model",
            norm_weights=2,
            biases="use_bias",
            gated_mlp=False,
            tied=True,
        ),
        Family("apertus", "Apertus", "head", gated_mlp=False),
        Family("mixtral", "Mixtral", "none", window="model", biases="none", experts="mixtral"),
        Family("qwen2_moe", "Qwen2Moe", "none", biases="qkv_bias", experts="qwen"),
        Family("qwen3_moe", "Qwen3Moe", "head", window="model", experts="qwen"),
        Family("gpt_oss", "GptOss", "none", fp32_norms=True, experts="gpt_oss", sink_logits=True),
    )
}

REFUSED = {
    "gemma3": "it has a vision tower; its language model alone is of type 'gemma3_text'",
}
"""Why architectures that may be looked for here have no row."""


def family_of(model_type: str) -> Family:
    """Find the family of a teacher's `config.model_type`.

    Raises:
        UserError: the architecture is not supported.
    """
    if model_type not in FAMILIES:
        reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        raise UserError(
            f"teacher.model_type: {model_type!r} cannot be converted{reason}; supported are"
            f" {', '.join(FAMILIES)}. Choose a teacher of one of these architectures."
        )
    return FAMILIES[model_type]


def logit_factor(config: Any) -> float:
    """Return what a teacher or student multiplies its head's output with."""
    family = FAMILIES.get(config.model_type.removeprefix("xlstm_"))
    return 1.0 if family is None else family.logit_factor(config)


def logit_cap(config: Any) -> float | None:
    """Return the bound of a teacher's or student's logits, c in c tanh(x / c), or None."""
    family = FAMILIES.get(config.model_type.removeprefix("xlstm_"))
    return None if family is None else family.logit_cap(config)

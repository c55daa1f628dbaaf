"""Describe a teacher's architecture as numbers, and count its and the student's parameters.

Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xlstm_distill.errors import UserError
from xlstm_distill.models.attention.layout import LayerHeads, layer_kinds
from xlstm_distill.models.families import Family, family_of
from xlstm_distill.recipe import MixerConfig, Recipe
from xlstm_distill.recipe.kept import kept_problems

ARCHITECTURES = "architectures"
"""Folder beside a recipe with the facts of teachers that are not here."""
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
PATTERNED = {
    "olmo3": 4,
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3_text": 6,
    "gpt_oss": 2,
}
"""Families whose configs may name no layer types: every n-th layer has no window."""
XIELU = 2
"""Parameters of Apertus's activation function."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of some layers' MLPs.

    A token uses `active` of `count` experts of inner width `width`, and the `shared` width of one
    that all tokens use (0: there is none). `layers`: how many layers have experts; the others have
    an MLP. `biases`: experts and router have biases (gpt-oss).
    """

    count: int
    active: int
    width: int
    shared: int
    layers: int
    biases: bool = False

    def expert(self, hidden: int) -> int:
        """Count the parameters of one expert."""
        return 3 * hidden * self.width + self.biases * (2 * self.width + hidden)


@dataclass(frozen=True)
class Architecture:
    """A Transformer language model in numbers: widths, heads, layers, and what its family adds.

    `reaches`: how many keys each layer of the teacher attends to, its own included; None means all.
    `norms`: norms of the hidden width in each layer, of `norm_weights` vectors each. `fused`:
    queries, keys and values are one projection; `fused_mlp`: so are the MLP's first two.
    `gated_mlp`: the MLP has two first products, not one; `activation`: parameters of what is
    between its products. `sink_logits`: learned logits of each layer's softmax, one a head or none.
    `own_softmax`: PyTorch's fused attention does not compute that softmax.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    model_type: str
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    norm: Literal["none", "head", "projection"]
    norms: int
    norm_weights: int
    fp32_norms: bool
    fused: bool
    gated_mlp: bool
    fused_mlp: bool
    activation: int
    sink_logits: int
    own_softmax: bool
    reaches: tuple[int | None, ...]
    experts: Experts | None = None

    @property
    def query_width(self) -> int:
        """H * D."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """G * D."""
        return self.groups * self.head_dim

    @property
    def mlp_layers(self) -> int:
        """Layers with an MLP, and not with experts."""
        return self.layers - (self.experts.layers if self.experts else 0)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, by what happens to them."""

    embedding: int
    """A table look-up: no product."""
    head: int
    """The output projection; 0 where it is the embedding."""
    projections: int
    """The attention's own weights, in all layers."""
    rest: int
    """MLPs and norms, in all layers, and the last norm."""
    new: int
    """The mixers' feature maps and gates, in all layers."""
    layer: int
    """One layer of the teacher, its largest where they differ."""
    layers: int
    """All layers of the teacher."""
    experts: int
    """Experts' weights, in all layers; part of `rest`."""
    inactive: int
    """Those of the experts' that a token does not use."""

    @property
    def teacher(self) -> int:
        """All of the teacher's."""
        return self.embedding + self.head + self.projections + self.rest

    @property
    def student(self) -> int:
        """All of the student's."""
        return self.teacher + self.new

    @property
    def active(self) -> int:
        """Those of the teacher's that a token uses."""
        return self.teacher - self.inactive

    @property
    def mixer(self) -> int:
        """The mixers' own: what `distill.trainable: mixer` trains."""
        return self.projections + self.new


def features(mixer: MixerConfig, architecture: Architecture) -> int:
    """Features per head that enter the mLSTM, F."""
    width = mixer.feature_dim or architecture.head_dim
    return 2 * width if mixer.feature_map == "hedgehog" else width


def count_parameters(architecture: Architecture, mixer: MixerConfig) -> Parameters:
    """Count the parameters of a teacher and of the student that `convert` makes of it."""
    a = architecture
    d, queries, keys = a.hidden, a.query_width, a.key_width
    attention = d * (queries + 2 * keys) + queries * d
    attention += a.qkv_bias * (queries + 2 * keys) + a.output_bias * d
    # Weights of the norms on queries and keys: one head wide (Qwen3), or the whole projection
    # (Olmo).
    attention += a.sink_logits
    attention += {"none": 0, "head": 2 * a.head_dim, "projection": queries + keys}[a.norm]
    norms = a.norms * a.norm_weights * d
    mlp, mixture = _mlp_parameters(a), _mixture_parameters(a)
    rest = a.layers * norms + a.mlp_layers * mlp
    expert = 0
    if a.experts is not None:
        rest += a.experts.layers * mixture
        expert = a.experts.layers * a.experts.expert(d)
    mixed = sum(len(heads.mixed) * count for heads, count in kinds_of_layers(a, mixer))
    table = a.vocabulary * d
    return Parameters(
        embedding=table,
        head=0 if a.tied else table,
        projections=a.layers * attention,
        rest=rest + a.norm_weights * d,
        new=mixed * _new_parameters(a, mixer),
        layer=attention + norms + max(mlp if a.mlp_layers else 0, mixture),
        layers=a.layers * attention + rest,
        experts=expert * a.experts.count if a.experts else 0,
        inactive=expert * (a.experts.count - a.experts.active) if a.experts else 0,
    )


def _mlp_parameters(a: Architecture) -> int:
    """Count the MLP of a layer without experts."""
    first = 2 if a.gated_mlp else 1
    biases = a.mlp_bias * (first * a.intermediate + a.hidden)
    return (first + 1) * a.hidden * a.intermediate + biases + a.activation


def _mixture_parameters(a: Architecture) -> int:
    """Count a layer's experts, their router, and the shared expert with its gate."""
    if a.experts is None:
        return 0
    e, d = a.experts, a.hidden
    router = e.count * (d + e.biases)
    return e.count * e.expert(d) + router + (3 * d * e.shared + d if e.shared else 0)


def _new_parameters(a: Architecture, mixer: MixerConfig) -> int:
    """Count what the mixer adds for a query head: feature maps and gates."""
    if "mlstm" not in mixer.branches:
        return 0
    width = mixer.feature_dim or a.head_dim
    feature_maps = 2 * width * a.head_dim
    input_and_forget_gate = 2 * (a.hidden + 1)
    # The output gate mixes two branches; it reads q, k and v of a head.
    output_gate = 3 * a.head_dim + 1 if "window" in mixer.branches else 0
    return feature_maps + input_and_forget_gate + output_gate


def kinds_of_layers(a: Architecture, mixer: MixerConfig) -> list[tuple[LayerHeads, int]]:
    """Return the student's kinds of layers, by the heads they keep, and how many each has."""
    return layer_kinds(mixer.kept(a.layers, a.heads), a.heads, a.groups)


def check_kept_attention(mixer: MixerConfig, a: Architecture) -> None:
    """Refuse layers and heads to keep that the teacher has not.

    Raises:
        UserError: names each.
    """
    if mixer.attention is None:
        return
    found = kept_problems(mixer.attention, a.heads, a.reaches)
    if problems := [f"student.mixer.attention.{problem}" for problem in found]:
        raise UserError(*problems)


def lora_parameters(a: Architecture, rank: int) -> int:
    """Count adapters of a rank on every projection of every layer (`models.lora.add_lora`).

    An adapter of a projection from m to n numbers has rank * (m + n) parameters. Routed experts and
    routers have none.
    """
    # One adapter serves projections that are fused, so it reads their input once.
    attention = 2 * (a.hidden + a.query_width) + 2 * (a.hidden + a.key_width)
    attention -= 2 * a.fused * a.hidden
    products = 3 if a.gated_mlp else 2
    mlp = products * (a.hidden + a.intermediate) - a.fused_mlp * a.hidden
    total = a.layers * attention + a.mlp_layers * mlp
    if a.experts is not None and a.experts.shared:
        gate = a.hidden + 1
        total += a.experts.layers * (3 * (a.hidden + a.experts.shared) + gate)
    return rank * total


def find_architecture(recipe: Recipe, folder: Path, config: Path | None = None) -> Architecture:
    """Find the teacher's architecture without the network.

    Looks in this order: `config` (a config.json); the teacher's own, where it is a local directory;
    the facts in `architectures/` beside the recipe (in `folder`); a copy in the hub's cache.

    Raises:
        UserError: none of them has the teacher, or the architecture found cannot be converted.
    """
    if config is not None:
        return read_architecture(_read_json(config), str(config))
    path = Path(recipe.teacher.path)
    if path.is_dir():
        return read_architecture(_read_json(path / "config.json"), str(path / "config.json"))
    # Before the hub's cache: the shipped facts make a plan independent of what was downloaded.
    for file in sorted((folder / ARCHITECTURES).glob("*.json")):
        facts = _read_json(file)
        if recipe.teacher.path in facts.get("teachers", ()):
            return read_architecture(facts.get("config", {}), str(file))
    if cached := _cached_config(recipe):
        return read_architecture(_read_json(cached), str(cached))
    raise UserError(
        f"teacher.path: the architecture of {recipe.teacher.path!r} is not known here; "
        "save its config.json and give it with --config FILE."
    )


def _cached_config(recipe: Recipe) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        recipe.teacher.path, "config.json", revision=recipe.teacher.revision
    )
    return Path(found) if isinstance(found, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise UserError(f"{path}: cannot be read ({reason}); give a model's config.json.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; give a model's config.json.")
    return content


def read_architecture(config: Mapping[str, Any], name: str) -> Architecture:
    """Read a model's config.json; `name` is what an error calls it.

    Raises:
        UserError: a number is missing or impossible, or the family is not supported.
    """
    family = family_of(str(config.get("model_type")))
    numbers = {key: _count(config, key, name) for key in REQUIRED}
    heads, hidden = numbers["num_attention_heads"], numbers["hidden_size"]
    groups = _count(
        {"num_key_value_heads": heads, **_given(config, "num_key_value_heads")},
        "num_key_value_heads",
        name,
    )
    if heads % groups:
        raise UserError(
            f"{name}: num_key_value_heads {groups} does not divide num_attention_heads {heads}."
        )
    head_dim = {"head_dim": hidden // heads, **_given(config, "head_dim")}
    qkv_bias, output_bias, mlp_bias = _biases(config, family)
    return Architecture(
        model_type=family.model_type,
        hidden=hidden,
        intermediate=numbers["intermediate_size"],
        layers=numbers["num_hidden_layers"],
        heads=heads,
        groups=groups,
        head_dim=_count(head_dim, "head_dim", name),
        vocabulary=numbers["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        norm=family.norm,
        norms=family.norms,
        norm_weights=family.norm_weights,
        fp32_norms=family.fp32_norms,
        fused=family.fused,
        gated_mlp=family.gated_mlp,
        fused_mlp=family.fused_mlp,
        activation=XIELU if _activation(config, family) == "xielu" else 0,
        sink_logits=heads if family.sink_logits else 0,
        own_softmax=family.own_softmax,
        reaches=_reaches(config, family, numbers["num_hidden_layers"]),
        experts=_experts(config, family, name),
    )


def _activation(config: Mapping[str, Any], family: Family) -> str:
    default = "xielu" if family.model_type == "apertus" else ""
    return str(config.get("hidden_act", default))


def _biases(config: Mapping[str, Any], family: Family) -> tuple[bool, bool, bool]:
    """Read whether queries, keys and values have biases, the output projection, and the MLP."""
    if family.biases == "use_bias":
        every = bool(config.get("use_bias", True))
        return every, every, every
    if family.biases == "qkv_bias":
        return bool(config.get("qkv_bias", True)), False, False
    # gpt-oss has biases where its config says nothing.
    asked = bool(config.get("attention_bias", family.model_type == "gpt_oss"))
    # Qwen2 has biases on q, k and v whatever its config says, and none on the output.
    qkv = family.biases == "always qkv" or (asked and family.biases != "none")
    output = asked and family.biases in ("all", "attention")
    return qkv, output, bool(config.get("mlp_bias", False)) and family.biases == "all"


def _experts(config: Mapping[str, Any], family: Family, name: str) -> Experts | None:
    """Read a mixture of experts; None where all layers have an MLP."""
    if family.experts == "none":
        return None
    layers: Sequence[int] = range(_count(config, "num_hidden_layers", name))
    # Two names for one number: transformers saves Qwen's under Mixtral's.
    names = [n for n in ("num_local_experts", "num_experts") if config.get(n) is not None]
    count = _count(config, names[0] if names else "num_experts", name)
    width = "intermediate_size"
    if family.experts == "qwen":
        width = "moe_intermediate_size"
        dense = config.get("mlp_only_layers") or ()
        step = config.get("decoder_sparse_step") or 1
        layers = [n for n in layers if n not in dense and (n + 1) % step == 0]
    return Experts(
        count=count,
        active=_count(config, "num_experts_per_tok", name),
        width=_count(config, width, name),
        shared=int(config.get("shared_expert_intermediate_size") or 0)
        if family.model_type == "qwen2_moe"
        else 0,
        layers=len(layers),
        biases=family.experts == "gpt_oss",
    )


def _given(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: config[key]} if config.get(key) is not None else {}


def _count(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    # In Python, True is an int.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: {key} is {value!r}; it must be a whole number of at least 1.")
    return value


def _reaches(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, ...]:
    """Read how many keys each layer of the teacher attends to."""
    window = config.get("sliding_window")
    # Qwen's configs name a window even where `use_sliding_window` turns it off.
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return (None,) * layers
    if family.window == "model":
        return (window,) * layers
    types = config.get("layer_types")
    if types is None and family.model_type in PATTERNED:
        every = PATTERNED[family.model_type]
        types = [
            "full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(layers)
        ]
    return tuple(window if kind == "sliding_attention" else None for kind in types or [""] * layers)

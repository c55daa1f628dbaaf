"""Describe a teacher's architecture as numbers, and count its and the student's parameters.

Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xlstm_distill.errors import UserError
from xlstm_distill.models.families import Family, family_of
from xlstm_distill.recipe import MixerConfig, Recipe

ARCHITECTURES = "architectures"
"""Folder beside a recipe with the facts of teachers that are not here."""
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
FULL_ATTENTION_EVERY = 4
"""Where a config names a pattern and no layer types: 3 layers with a window, 1 without."""
PATTERNED = ("olmo3", "cohere2", "exaone4")


@dataclass(frozen=True)
class Architecture:
    """A Transformer language model in numbers: widths, heads, layers, and what its family adds.

    `reaches`: how many keys each layer of the teacher attends to, its own included; None means all.
    `norms`: norms of the hidden width in each layer. `fused`: queries, keys and values are one
    projection; `fused_mlp`: so are the MLP's first two.
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
    fused: bool
    fused_mlp: bool
    reaches: tuple[int | None, ...]

    @property
    def query_width(self) -> int:
        """H * D."""
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        """G * D."""
        return self.groups * self.head_dim


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
    """One layer of the teacher."""

    @property
    def teacher(self) -> int:
        """All of the teacher's."""
        return self.embedding + self.head + self.projections + self.rest

    @property
    def student(self) -> int:
        """All of the student's."""
        return self.teacher + self.new

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
    attention += {"none": 0, "head": 2 * a.head_dim, "projection": queries + keys}[a.norm]
    mlp = 3 * d * a.intermediate + a.mlp_bias * (2 * a.intermediate + d)
    rest = mlp + a.norms * d
    new = _new_parameters(a, mixer)
    table = a.vocabulary * d
    return Parameters(
        embedding=table,
        head=0 if a.tied else table,
        projections=a.layers * attention,
        # Olmo's norms have no weights, the last one included.
        rest=a.layers * rest + (d if a.norms else 0),
        new=a.layers * new,
        layer=attention + rest,
    )


def _new_parameters(a: Architecture, mixer: MixerConfig) -> int:
    """Count what one mixer adds to a layer: feature maps and gates, all of them per query head."""
    if "mlstm" not in mixer.branches:
        return 0
    width = mixer.feature_dim or a.head_dim
    feature_maps = 2 * a.heads * width * a.head_dim
    input_and_forget_gate = 2 * a.heads * (a.hidden + 1)
    # The output gate mixes two branches; it reads q, k and v of a head.
    output_gate = a.heads * (3 * a.head_dim + 1) if "window" in mixer.branches else 0
    return feature_maps + input_and_forget_gate + output_gate


def lora_parameters(a: Architecture, rank: int) -> int:
    """Count adapters of a rank on every projection of every layer (`models.lora.add_lora`).

    An adapter of a projection from m to n numbers has rank * (m + n) parameters.
    """
    # One adapter serves projections that are fused, so it reads their input once.
    fused = 2 * a.fused + a.fused_mlp
    attention = 2 * (a.hidden + a.query_width) + 2 * (a.hidden + a.key_width)
    return a.layers * rank * (attention + 3 * (a.hidden + a.intermediate) - fused * a.hidden)


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
    bias = bool(config.get("attention_bias", False))
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
        # Qwen2 has biases on q, k and v whatever its config says, and none on the output.
        qkv_bias=family.biases == "always qkv" or (bias and family.biases != "none"),
        output_bias=bias and family.biases in ("all", "attention"),
        mlp_bias=bool(config.get("mlp_bias", False)) and family.biases == "all",
        norm=family.norm,
        norms=family.norms,
        fused=family.fused,
        fused_mlp=family.fused_mlp,
        reaches=_reaches(config, family, numbers["num_hidden_layers"]),
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
        types = [
            "full_attention" if (n + 1) % FULL_ATTENTION_EVERY == 0 else "sliding_attention"
            for n in range(layers)
        ]
    return tuple(window if kind == "sliding_attention" else None for kind in types or [""] * layers)

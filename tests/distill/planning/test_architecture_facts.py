"""Architectures and parameter counts against real models and published figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xlstm_distill.errors import UserError
from xlstm_distill.models.families import FAMILIES, CausalLM
from xlstm_distill.models.student import STUDENTS, convert
from xlstm_distill.planning.architecture import (
    count_parameters,
    find_architecture,
    lora_parameters,
    read_architecture,
)
from xlstm_distill.planning.inputs import MemoryInputs
from xlstm_distill.recipe import MixerConfig, Recipe, load_recipe
from xlstm_distill.stages.workbench import architecture_of

ROOT = Path(__file__).parents[3]
FACTS = sorted((ROOT / "recipes" / "architectures").glob("*.json"))
MIXERS = {
    "softmax": MixerConfig(window=40, sinks=4),
    "hedgehog": MixerConfig(window=16, sinks=4, feature_map="hedgehog", feature_dim=24),
    "mlstm": MixerConfig(window=40, branches=("mlstm",)),
    "window": MixerConfig(window=40, branches=("window",)),
    "kept": MixerConfig(window=40, attention={"layers": [1], "heads": {0: [0, 3]}}),
}
Make = Callable[..., CausalLM]
PUBLISHED = {
    "llama-3.1-8b": 8.03,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "olmo-2-1b": 1.48,
    "olmo-3-7b": 7.30,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "smollm2-1.7b": 1.71,
}
"""Billions of parameters, a shared embedding once: model cards and the hub's count of the weights.

Qwen3-1.7B's weights hold the shared matrix twice, as embedding and as output head: the hub counts
2.03.
"""


@pytest.mark.parametrize("path", FACTS, ids=lambda p: p.stem)
def test_parameters_of_shipped_architectures_are_those_published(path: Path) -> None:
    config = json.loads(path.read_text())["config"]
    counted = count_parameters(read_architecture(config, path.name), MixerConfig())
    assert counted.teacher / 1e9 == pytest.approx(PUBLISHED[path.stem], abs=0.0051)
    if path.stem == "qwen3-1.7b":
        assert (counted.teacher + counted.embedding) / 1e9 == pytest.approx(2.03, abs=0.0051)


@pytest.mark.parametrize("path", FACTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
def test_parameters_equal_those_of_real_models_on_the_meta_device(
    path: Path, mixer: MixerConfig
) -> None:
    # All widths are the real ones. Layers are equal, so two show what each of them has.
    config = json.loads(path.read_text())["config"] | {"num_hidden_layers": 2}
    counted = count_parameters(read_architecture(config, path.name), mixer)
    settings = {key: value for key, value in config.items() if key != "model_type"}
    family = FAMILIES[config["model_type"]]
    student_class = STUDENTS[family.model_type]
    student_config = student_class.config_class(**settings, mixer=mixer.model_dump(mode="json"))
    with torch.device("meta"):
        teacher = family.causal_lm(family.config(**settings))
        student = student_class(student_config)
    assert counted.teacher == sum(p.numel() for p in teacher.parameters())
    assert counted.student == sum(p.numel() for p in student.parameters())
    assert counted.new == sum(p.numel() for _, p in student.new_parameters())
    assert counted.mixer == sum(p.numel() for m in student.mixers() for p in m.parameters())
    assert counted.layer == sum(p.numel() for p in teacher.model.layers[0].parameters())
    assert counted.embedding == teacher.model.embed_tokens.weight.numel()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_every_family_with_biases(
    tiny_teacher: Make, family: str, tied: bool
) -> None:
    teacher = tiny_teacher(family, tie_word_embeddings=tied, attention_bias=True)
    student = convert(teacher, MixerConfig(window=16))
    counted = count_parameters(architecture_of(teacher), MixerConfig(window=16))
    assert counted.teacher == sum(p.numel() for p in teacher.parameters())
    assert counted.student == sum(p.numel() for p in student.parameters())


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPE += ("num_key_value_heads", "vocab_size")
MODELS = {
    "starcoder2-3b": (
        ("starcoder2", 3072, 12288, 30, 24, 2, 49152),
        {},
        (3.03, 3.03),
    ),
    "gemma-3-1b": (
        ("gemma3_text", 1152, 6912, 26, 4, 1, 262144),
        {"head_dim": 256, "sliding_window": 512},
        (1.00, 1.00),
    ),
    "apertus-8b": (("apertus", 4096, 21504, 32, 32, 8, 131072), {}, (8.05, 8.05)),
    "mixtral-8x7b": (
        ("mixtral", 4096, 14336, 32, 32, 8, 32000),
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        (46.70, 12.88),
    ),
    "qwen1.5-moe-a2.7b": (
        ("qwen2_moe", 2048, 5632, 24, 16, 16, 151936),
        {
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        (14.32, 2.69),
    ),
    "gemma-2-9b": (
        ("gemma2", 3584, 14336, 42, 16, 8, 256000),
        {"head_dim": 256, "sliding_window": 4096},
        (9.24, 9.24),
    ),
    # Its card counts 3.61 in use, without the 0.58 of the embedding.
    "gpt-oss-20b": (
        ("gpt_oss", 2880, 2880, 24, 64, 8, 201088),
        {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4},
        (20.91, 4.19),
    ),
    "qwen3-30b-a3b": (
        ("qwen3_moe", 2048, 6144, 48, 32, 4, 151936),
        {
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        (30.53, 3.35),
    ),
}
"""Shapes of released models, and billions of parameters: all of them, and those of a token."""


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_experts_in_use_are_those_published(name: str) -> None:
    (model_type, *shape), own, (total, active) = MODELS[name]
    config = {"model_type": model_type, **dict(zip(SHAPE, shape, strict=True)), **own}
    counted = count_parameters(read_architecture(config, name), MixerConfig())
    assert counted.teacher / 1e9 == pytest.approx(total, abs=0.0051)
    assert counted.active / 1e9 == pytest.approx(active, abs=0.0051)


def test_layers_with_and_without_experts_are_counted_apart(tiny_teacher: Make) -> None:
    teacher = tiny_teacher("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[1, 2])
    a = architecture_of(teacher)
    counted = count_parameters(a, MixerConfig(window=16))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in teacher.model.layers]
    assert (counted.layers, counted.layer) == (sum(sizes), max(sizes))
    assert a.mlp_layers == 2
    assert counted.teacher == sum(p.numel() for p in teacher.parameters())
    experts = sum(p.numel() for n, p in teacher.named_parameters() if ".experts." in n)
    assert counted.experts == experts
    assert counted.inactive == experts * 5 // 8  # 3 of 8 are in use


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "starcoder2", "phi3"])
def test_adapters_are_counted_as_peft_makes_them(tiny_teacher: Make, family: str) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    from xlstm_distill.models.lora import add_lora

    teacher, mixer = tiny_teacher(family), MIXERS["softmax"]
    a = architecture_of(teacher)
    student = convert(teacher, mixer)
    add_lora(student, 4, 8)
    inputs = MemoryInputs(
        architecture=a,
        mixer=mixer,
        teacher_dtype="float32",
        gpus=1,
        sharding="none",
        rows=1,
        tokens=8,
        accumulates=False,
        checkpointing=False,
        backend="torch",
        trainable="lora",
        lora_rank=4,
    )
    assert inputs.trained == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert inputs.adapters == lora_parameters(a, 4)


def unknown(tmp_path: Path) -> Recipe:
    """A recipe whose teacher nothing here knows."""
    text = (
        (ROOT / "recipes" / "llama3.1-8b.yaml")
        .read_text()
        .replace("meta-llama/Llama-3.1-8B", "nobody/unheard-of")
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def test_an_unknown_teacher_is_one_line_that_asks_for_its_config(tmp_path: Path) -> None:
    recipe = unknown(tmp_path)
    with pytest.raises(UserError, match=r"teacher\.path: .*'nobody/unheard-of'.*--config FILE"):
        find_architecture(recipe, tmp_path)


def test_a_given_config_is_enough_for_an_unknown_teacher(tmp_path: Path) -> None:
    recipe = unknown(tmp_path)
    config = ROOT / "recipes" / "quickstart" / "teacher" / "config.json"
    assert find_architecture(recipe, tmp_path, config).hidden == 128


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "gpt2"}', "'gpt2' cannot be converted"),
        (
            '{"model_type": "llama", "hidden_size": 64}',
            "intermediate_size is None; it must be a whole number",
        ),
    ],
)
def test_a_bad_config_is_refused_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    recipe = unknown(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        find_architecture(recipe, tmp_path, tmp_path / "config.json")


def test_key_value_heads_must_divide_the_heads() -> None:
    config = json.loads(FACTS[0].read_text())["config"] | {"num_key_value_heads": 5}
    with pytest.raises(
        UserError, match="num_key_value_heads 5 does not divide num_attention_heads 32"
    ):
        read_architecture(config, "x")

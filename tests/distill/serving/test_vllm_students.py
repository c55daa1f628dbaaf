"""vLLM gives the tokens of `generate`: students of other families, and those that keep attention.

All of them run in one process, with one engine after another.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, process_environment
from serving import VLLM_PYTHON

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.families import FAMILIES
from xlstm_kernels.testing import error_ratio

TOKENS = 16
LENGTHS = (1, 2, 5, 33, 48, 58, 60, 62, 97, 200)
# vLLM's attention takes no smaller heads.
SMALL = {"head_dim": 32, "num_hidden_layers": 3}
KINDS = ["full_attention", "sliding_attention", "full_attention"]
WINDOWS = {"sliding_window": 16, "layer_types": KINDS}
HEADS = {"layers": [0], "heads": {2: [0, 2, 3]}}


@dataclass
class Case:
    """A student, and the settings of its engine."""

    family: str
    teacher: dict[str, Any] = field(default_factory=dict)
    mixer: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


OWN: dict[str, dict[str, Any]] = {
    "cohere2": WINDOWS,
    "exaone4": WINDOWS,
    "gemma2": WINDOWS,
    "gemma3_text": WINDOWS,
    "gpt_oss": WINDOWS,
    "ministral": WINDOWS,
    "mistral": {"sliding_window": 16},
    "mixtral": {"sliding_window": 16},
    "olmo3": WINDOWS,
    "phi3": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "starcoder2": {"sliding_window": 16},
}
# Those that differ in kind; VLLM_FAMILIES names others, or all.
QUICK = "cohere2 gemma2 gpt_oss mixtral olmo2 phi3 qwen3 smollm3"
NAMES = os.environ.get("VLLM_FAMILIES", QUICK).split()
CASES = {
    name: Case(name, OWN.get(name, {})) for name in (FAMILIES if NAMES == ["all"] else NAMES)
} | {
    # 9 pages that can be had, of 64 tokens. Three requests have one each, besides their states',
    # and want another.
    "kept layer, preempted": Case(
        "llama", mixer={"attention": {"layers": [1]}}, engine={"num_gpu_blocks_override": 10}
    ),
    "kept everywhere": Case("qwen3", mixer={"attention": {"layers": [0, 1, 2]}}),
    "kept heads, bounded scores": Case(
        "gemma2", WINDOWS | {"attn_logit_softcapping": 5.0}, {"attention": HEADS}
    ),
    "kept heads, sink logits": Case("gpt_oss", WINDOWS, {"attention": HEADS}),
    # Pages of three key/value heads and of two: the latter have a rest.
    "kept heads, window alone": Case(
        "phi3",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
        {"attention": {"layers": [1], "heads": {0: [0, 2]}}, "branches": ("window",), "window": 60},
    ),
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in LENGTHS]


def save(case: Case, make_teacher: Callable[..., Any], folder: Path) -> Any:
    """Make a student with random gates and feature maps, whose answers have no end."""
    # Tied to small random embeddings, a head repeats one token.
    teacher = make_teacher(case.family, tie_word_embeddings=False, **(SMALL | case.teacher))
    mixer = {"window": 24, "sinks": 2, "feature_map": "hedgehog", "feature_dim": 16} | case.mixer
    student = convert(teacher, MixerConfig(**mixer)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in student.new_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    for config in (student.config, student.generation_config):
        config.eos_token_id = None
    student.save_pretrained(folder)
    return student


def generated(student: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Return greedy tokens of `generate` for each prompt alone, and their log probabilities."""
    tokens, logprobs = [], []
    for prompt in prompts:
        found = student.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(found.sequences[0, len(prompt) :].tolist())
        steps = torch.cat(found.logits).float().log_softmax(-1)
        logprobs.append(steps.amax(-1).tolist())
    return tokens, logprobs


@pytest.fixture(scope="module")
def both(
    prompts: list[list[int]],
    make_teacher: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Any, Any]]:
    """By case: what `generate` gives, and what vLLM does."""
    if not VLLM_PYTHON.exists():
        pytest.skip("needs vLLM in .venv/vllm, or VLLM_PYTHON")
    folder = tmp_path_factory.mktemp("students")
    expected, students = {}, []
    for number, (name, case) in enumerate(CASES.items()):
        directory = folder / str(number)
        expected[name] = generated(save(case, make_teacher, directory), prompts)
        students.append({"name": name, "directory": str(directory), "settings": case.engine})
    job, out = folder / "job.json", folder / "answers.jsonl"
    job.write_text(json.dumps({"prompts": prompts, "tokens": TOKENS, "students": students}))
    done = subprocess.run(
        [VLLM_PYTHON, ROOT / "tests/helpers/vllm_engines.py", job, out],
        capture_output=True,
        text=True,
        check=False,
        env=process_environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    return {answer["name"]: (expected[answer["name"]], answer) for answer in answers}


@pytest.mark.vllm
@pytest.mark.parametrize("name", CASES)
def test_vllm_gives_the_tokens_of_generate(name: str, both: dict[str, tuple[Any, Any]]) -> None:
    """Of prompts in chunks beside what decodes, and of requests that wait."""
    (tokens, logprobs), answer = both[name]
    assert answer["tokens"] == tokens
    assert len({token for row in tokens for token in row}) > 10
    assert error_ratio(torch.tensor(answer["logprobs"]), torch.tensor(logprobs).double()) < 1e-5
    assert (answer["preemptions"] > 0) == ("preempted" in name)

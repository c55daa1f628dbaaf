"""Settings and fixtures shared by all tests; nothing here touches the network."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from processes import SETTINGS

os.environ.update(SETTINGS)  # before torch is imported: it reads the number of threads once

import psutil
import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
MAX_WORKERS = 8
WORKER_MEMORY = 3 * 2**30
"""Memory that a worker of pytest-xdist may need with the processes its tests start (bytes)."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return what `-n auto` means: a worker for each core, if the memory allows it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory().available // WORKER_MEMORY
    return max(1, min(cores or 1, memory, MAX_WORKERS))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of optional packages slow, skip those that cannot run, and put long files first.

    DeepSpeed compiles a part of itself at its first start, so it needs a compiler.
    """
    missing = [] if importlib.util.find_spec("deepspeed") else ["DeepSpeed"]
    missing += [] if shutil.which("c++") else ["a C++ compiler"]
    for item in items:
        if any(item.get_closest_marker(name) for name in ("deepspeed", "peers", "slurm", "vllm")):
            item.add_marker(pytest.mark.slow)
        if missing and item.get_closest_marker("deepspeed"):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))
    # Files that start processes take longest. If one came last, the other workers would be idle.
    long = {item.path for item in items if item.get_closest_marker("multi_process")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., torch.nn.Module]:
    """Make a randomly initialised teacher: 2 layers, 4 query heads of 16, 2 key/value heads."""

    def make(family: str = "llama", seed: int = 0, **overrides: object) -> torch.nn.Module:
        from xlstm_distill.models.families import FAMILIES

        torch.manual_seed(seed)
        settings = {
            "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 512, "initializer_range": 0.15,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            # Granite's own scale of scores. It is 1 by default, which no released model has.
            "attention_multiplier": 0.25,
            # Mixtures of experts have 8, of which a token uses 3.
            "num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 3,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
        }  # fmt: skip
        config = FAMILIES[family].config(**{**settings, **overrides})
        return FAMILIES[family].causal_lm(config).eval()

    return make


@pytest.fixture
def tiny_teacher(make_teacher: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`make_teacher`, under the name that most tests use."""
    return make_teacher


@pytest.fixture(scope="session")
def saved_student(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a student of the embedded teacher; its gates and feature maps are random."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from xlstm_distill import MixerConfig, convert

    teacher = root / "recipes" / "quickstart" / "teacher"
    mixer = MixerConfig(window=8, sinks=2, feature_map="hedgehog", feature_dim=16)
    student = convert(AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), mixer)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in student.new_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    folder = tmp_path_factory.mktemp("student") / "model"
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)
    return folder

"""Fixtures shared by all tests; nothing here touches the network."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """DeepSpeed compiles a part of itself at its first start: without it or a compiler, its tests are skipped."""
    missing = [] if importlib.util.find_spec("deepspeed") else ["DeepSpeed"]
    missing += [] if shutil.which("c++") else ["a C++ compiler"]
    for item in items:
        if missing and item.get_closest_marker("deepspeed"):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)}"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def tiny_teacher() -> Callable[..., torch.nn.Module]:
    """Make a randomly initialised teacher of a family: 2 layers, 4 query heads of 16 over 2 key/value heads."""

    def make(family: str = "llama", seed: int = 0, **overrides: object) -> torch.nn.Module:
        from xlstm_distill.models.families import FAMILIES

        torch.manual_seed(seed)
        settings = {
            "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.15,
        }  # fmt: skip
        config = FAMILIES[family].config(**{**settings, **overrides})
        return FAMILIES[family].causal_lm(config).eval()

    return make

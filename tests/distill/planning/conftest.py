"""Fixtures of the planner's tests: small batches, and the shipped architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from xlstm_distill.data.rows import Batch
from xlstm_distill.planning.architecture import Architecture, read_architecture


@pytest.fixture(scope="session")
def small_batch() -> Callable[[int, int], Batch]:
    """Make a batch of rows of two documents each, of a vocabulary of 97; all tokens supervised."""

    def make(rows: int, tokens: int) -> Batch:
        ids = torch.randint(0, 97, (rows, tokens), generator=torch.Generator().manual_seed(0))
        segments = (torch.arange(tokens) >= tokens // 2).long().expand(rows, -1)
        positions = torch.arange(tokens).expand(rows, -1) - segments * (tokens // 2)
        return Batch(ids, positions, segments, ids, torch.ones_like(ids, dtype=torch.bool), ())

    return make


@pytest.fixture(scope="session")
def facts(root: Path) -> Callable[[str], Architecture]:
    """Read a shipped architecture by the name of its file."""

    def read(name: str) -> Architecture:
        path = root / "recipes" / "architectures" / f"{name}.json"
        return read_architecture(json.loads(path.read_text())["config"], name)

    return read

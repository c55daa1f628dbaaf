"""A step over fake tensors, as rank 0 of eight: it does what the planner says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from xlstm_distill.benchmarks.shapes import Case, compared

FACTS = Path(__file__).parents[3] / "recipes" / "architectures" / "llama-3.1-8b.json"
# Fake tensors cost the same at any size, so the shapes are the real ones; layers cost time.
CONFIG = {**json.loads(FACTS.read_text())["config"], "num_hidden_layers": 2}
# Measured here: 1 to 2 % (docs/reports).
MEMORY_ERROR = 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": "align"},
        {"stage": "distill"},
        pytest.param({"stage": "distill", "replicas": 2}, marks=pytest.mark.slow),
        pytest.param({"stage": "distill", "waits": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_sends_and_holds_what_is_planned(changes: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    found = compared(Case(config=CONFIG, world=8, context=4096, batch=16, **changes))
    for name in ("gathered", "scattered"):
        assert found[name] == pytest.approx(found[f"planned_{name}"], rel=1e-3), name
    # Beside the gradients there are the scalars of a step: a few bytes.
    assert found["reduced"] == pytest.approx(found["planned_reduced"], rel=1e-3, abs=1e3)
    assert found["peak"] == pytest.approx(found["planned_peak"], rel=MEMORY_ERROR)
    assert not dist.is_initialized()

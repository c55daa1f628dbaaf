"""Training of the embedded teacher, and the committed checkpoint."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded.packing import batches
from xlstm_distill.embedded.tasks import TASKS
from xlstm_distill.embedded.train import Settings, build, learning_rate, loss_of, main

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart"
TEACHER = QUICKSTART / "teacher"
SMALL = Settings(tokens=2048, rows=2, context=384, layers=2, hidden=96, intermediate=64)


def test_training_is_deterministic_and_learns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def losses() -> list[float]:
        model, curve = build(SMALL, tokenizer), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for batch in islice(batches(tokenizer, rows=2, length=384, seed=0), 8):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return curve

    first = losses()
    assert first == losses()
    assert first[-1] < first[0] - 0.3
    assert learning_rate(SMALL.steps - 1, SMALL) < learning_rate(SMALL.steps // 2, SMALL)
    assert main(["--out", str(tmp_path / "t"), "--tokens", "0"]) == 2
    assert not (tmp_path / "t").exists()


def test_committed_checkpoint_has_the_right_shape(teacher: LlamaForCausalLM) -> None:
    size = sum(path.stat().st_size for path in TEACHER.iterdir())
    assert size <= 12 * 2**20
    assert isinstance(teacher, LlamaForCausalLM)
    parameters = sum(p.numel() for p in teacher.parameters())
    log = json.loads((TEACHER / "training.json").read_text())
    assert 500_000 <= parameters == log["parameters"] <= 3_000_000
    assert teacher.config.num_key_value_heads < teacher.config.num_attention_heads
    assert teacher.config.max_position_embeddings >= 384
    assert set(log["held_out_accuracy"]) == set(TASKS)

"""Training of the embedded teacher, and the committed checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded import train
from xlstm_distill.embedded.packing import batches
from xlstm_distill.embedded.tasks import TASKS
from xlstm_distill.embedded.train import Settings, build, learning_rate, loss_of, main
from xlstm_distill.embedded.unfinished import Checkpoint
from xlstm_distill.errors import UserError

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
    settings = replace(SMALL, tokens=100 * 2 * 384, warmup_steps=20)
    rates = [learning_rate(step, settings) for step in (0, 19, 49, 99)]
    assert rates == pytest.approx([2e-3 / 20, 2e-3, 2e-3, 2e-3 / 50])
    assert main(["--out", str(tmp_path / "t"), "--tokens", "0"]) == 2
    assert not (tmp_path / "t").exists()


def test_a_stopped_training_goes_on_to_the_same_bits(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SCORED_EVERY", 2)
    # What the model answers does not matter here.
    monkeypatch.setattr(train, "outcomes", lambda *_, **__: {})
    settings = replace(SMALL, tokens=4 * 2 * 384, warmup_steps=2)

    def run(out: Path, stop: int | None = None) -> LlamaForCausalLM:
        model = build(settings, tokenizer)
        real, steps = train.take_step, iter(range(99))

        def step(*given: Any) -> float:
            if next(steps) == stop:
                raise KeyboardInterrupt
            return real(*given)

        with monkeypatch.context() as patched:
            patched.setattr(train, "take_step", step)
            train.fit(model, tokenizer, settings, Checkpoint(out, asdict(settings)))
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop=3)
    resumed = run(tmp_path / "stopped")
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"other settings \(rows\)"):
        Checkpoint(tmp_path / "stopped", {**asdict(settings), "rows": 3}).load(
            resumed, train.make_optimizer(resumed, settings)
        )


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

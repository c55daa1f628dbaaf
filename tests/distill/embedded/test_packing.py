"""Packed rows of the embedded teacher's training."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded import documents
from xlstm_distill.embedded.packing import PROMPT_WEIGHT, batches
from xlstm_distill.embedded.train import Settings, build

SMALL = Settings(tokens=2048, rows=2, context=384, layers=2, hidden=96, intermediate=64)


def test_packed_rows_equal_separate_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(SMALL, tokenizer).eval()
    batch = next(batches(tokenizer, rows=2, length=384, seed=0))
    with torch.no_grad():
        packed = model(
            batch.input_ids, attention_mask=batch.mask(), position_ids=batch.position_ids
        ).logits
        for number in range(int(batch.segment_ids[0].max()) + 1):
            at = batch.segment_ids[0] == number
            alone = model(batch.input_ids[:1, at]).logits
            torch.testing.assert_close(packed[:1, at], alone, rtol=1e-4, atol=1e-5)
    assert sorted(batch.weights.unique().tolist()) == pytest.approx([0.0, PROMPT_WEIGHT, 1.0])


def test_loss_weights_agree_with_the_template_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = next(batches(tokenizer, rows=1, length=384, seed=0))
    document = next(documents("math", 512, 0))
    mask = tokenizer.apply_chat_template(
        document["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    weights = batch.weights[0, : len(mask["input_ids"])]
    assert (weights == 1.0).long().tolist() == mask["assistant_masks"]

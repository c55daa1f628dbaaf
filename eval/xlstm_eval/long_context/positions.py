"""Loss of every token of a long document, read in chunks with the model's cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xlstm_eval.answering.batches import Batch
from xlstm_eval.answering.journal import Answered
from xlstm_eval.long_context.documents import ranges

CHUNK = 2048
"""Tokens of a forward pass. With 128k words its logits take 0.5 GB in bf16."""
PIECE = 256
"""Tokens whose logits are turned into single precision at a time."""


class DocumentReader:
    """Answers batches of one document each: (text, tokens) to the loss of each range, summed."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def compute(self, batch: Batch) -> Answered:
        """Sum the losses of a batch's documents."""
        started, answers, tokens = time.perf_counter(), [], 0
        for question in batch.questions:
            text, length = question.arguments
            ids = self.tokenizer(text, verbose=False)["input_ids"][:length]
            losses = token_losses(self.model, torch.tensor(ids)).double()
            # The loss at index i is that of position i + 1.
            answers.append(
                [float(losses[max(start, 1) - 1 : end - 1].sum()) for start, end in ranges(length)]
            )
            tokens += length
        return Answered(batch.key, answers, tokens, round(time.perf_counter() - started, 3))


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the loss of each token after the first: ids (T,) to (T - 1,) fp32 on the CPU.

    A student's cache has a constant size; a teacher's grows with the document.
    """
    ids = ids.to(model.device)
    cache, found = None, []
    for start in range(0, len(ids) - 1, chunk):
        read = ids[start : min(start + chunk, len(ids) - 1)]
        output = model(input_ids=read[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        wanted = ids[start + 1 : start + 1 + len(read)]
        for piece, targets in zip(output.logits[0].split(PIECE), wanted.split(PIECE), strict=True):
            found.append(
                torch.nn.functional.cross_entropy(piece.float(), targets, reduction="none")
            )
    # Copied once: a copy for each piece would wait for the device.
    return torch.cat(found).cpu()

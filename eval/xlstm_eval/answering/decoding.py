"""Generation row by row inside a batch: each row stops by itself and draws from its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

EXTRA_TOKENS = 2
"""Tokens looked back beyond a stop sequence's own: it may be written with others than its own."""
DEFAULT_TOP_K = 50
"""What transformers takes where neither the task nor the model's files name a top_k."""


class StopRows(StoppingCriteria):
    """Stop each row at its first stop sequence; lm-eval's own waits until all rows have the same.

    A sequence that more tokens spell than are looked back at goes unnoticed here. That costs time
    alone: answers are cut at the sequence afterwards.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int, rows: int
    ) -> None:
        self.tokenizer, self.stops, self.prompt = (
            tokenizer,
            [stop for stop in stops if stop],
            prompt,
        )
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self.stops]
        self.look_back = max(lengths, default=0) + EXTRA_TOKENS
        self.done = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say which rows (B,) are done; input_ids (B, prompt and all tokens so far)."""
        open_rows = (~self.done).nonzero().flatten().tolist()
        start = max(self.prompt, input_ids.shape[1] - self.look_back)
        endings = self.tokenizer.batch_decode(input_ids[:, start:][open_rows])
        for row, text in zip(open_rows, endings, strict=True):
            self.done[row] = any(stop in text for stop in self.stops)
        return self.done.to(input_ids.device)


class DrawRows(LogitsProcessor):
    """Draw each row's next token from numbers of its own, so that its neighbours do not matter.

    `draws` (B, steps) float64 in [0, 1). The drawn token gets all the mass, and greedy decoding
    takes it.
    """

    def __init__(self, draws: Tensor, prompt: int) -> None:
        self.draws, self.prompt = draws, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) that are 0 at the drawn token and -inf elsewhere."""
        # In double precision: a sum over 128k tokens in single would lose the rare ones.
        mass = scores.double().softmax(-1).cumsum(-1)
        wanted = self.draws[:, input_ids.shape[1] - self.prompt, None] * mass[:, -1:]
        # Right of equals: a token without mass has its neighbour's sum and is passed over.
        token = torch.searchsorted(mass, wanted, right=True).clamp_max(scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def row_draws(seeds: Sequence[int], steps: int, device: torch.device) -> Tensor:
    """Return numbers in [0, 1) for each row and step, (B, steps), the same on every device."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(device)


def sampling(
    model: PreTrainedModel, settings: dict[str, Any], draws: Tensor, prompt: int
) -> LogitsProcessorList:
    """Take the settings of sampling out of `settings`; return what samples with them instead.

    What the task does not name is taken from the model's generation config, as `generate` does.
    """

    def take(name: str, default: Any) -> Any:
        # One at a time: what stays in `settings` goes to `generate`.
        value = settings.pop(name, None)
        value = getattr(model.generation_config, name, None) if value is None else value
        return default if value is None else value

    top_k, top_p, min_p = take("top_k", DEFAULT_TOP_K), take("top_p", 1.0), take("min_p", None)
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(float(take("temperature", 1.0)))]
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        steps.append(MinPLogitsWarper(min_p))
    settings["do_sample"] = False
    return LogitsProcessorList([*steps, DrawRows(draws, prompt)])

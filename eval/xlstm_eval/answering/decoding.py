"""Generation row by row inside a batch: each row stops by itself and draws from its own seed.

Rows that are done leave the batch whenever they are half of it, so that a batch costs little more
than its answers are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

EXTRA_TOKENS = 2
"""Tokens looked back beyond a stop sequence's own: it may be written with others than its own."""
DEFAULT_TOP_K = 50
"""What transformers takes where neither the task nor the model's files name a top_k."""
FROM_THE_START = ("min_new_tokens", "exponential_decay_length_penalty", "begin_suppress_tokens")
"""Settings that count from the start of a call of `generate`: a second call would count anew."""
FEW_ROWS = 8
"""Rows that stay together until the last is done: a new call would take longer than they do."""


@dataclass(frozen=True)
class Prompts:
    """A batch to be answered: ids and mask (B, T), padded on the left, and at most `budget` tokens.

    stops: texts that end an answer. draws: (B, budget) float64 in [0, 1) where answers are drawn at
    random, else None. prefill: tokens of a prompt that are read at once; None for all.
    """

    ids: Tensor
    mask: Tensor
    budget: int
    stops: Sequence[str]
    draws: Tensor | None
    prefill: int | None


def generate_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    settings: dict[str, Any],
) -> list[list[int]]:
    """Generate an answer to each prompt: its tokens, some with padding behind them.

    `settings` are those of `generate`. One call of it answers until half of the rows are done; the
    next one goes on from its cache with the others alone.
    """
    settings, start = dict(settings), prompts.ids.shape[1]
    end = start + prompts.budget
    warpers = [] if prompts.draws is None else sampling(model, settings)
    leaves = _rows_may_leave(model, settings)
    first = {}
    if prompts.prefill is not None and start > prompts.prefill:
        first["prefill_chunk_size"] = prompts.prefill
    ids, mask, draws, cache = prompts.ids, prompts.mask, prompts.draws, None
    left = list(range(len(ids)))
    answers: list[list[int]] = [[] for _ in left]
    answer: Any = model.generate
    while left:
        processors = LogitsProcessorList(warpers)
        if draws is not None:
            processors.append(DrawRows(draws, start))
        stop = StopRows(model, tokenizer, prompts.stops, start, len(left), leaves=leaves)
        found = answer(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=end - ids.shape[1],
            stopping_criteria=StoppingCriteriaList([stop]),
            logits_processor=processors,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            return_dict_in_generate=True,
            **settings,
            **first,
        )
        first = {}
        ids, cache = found.sequences, found.past_key_values
        open_rows = [] if not stop.left or ids.shape[1] >= end else stop.open_rows()
        for row, tokens in zip(left, ids[:, start:].tolist(), strict=True):
            answers[row] = tokens
        left = [left[row] for row in open_rows]
        if left:
            index = torch.tensor(open_rows, device=ids.device)
            cache.batch_select_indices(index)
            mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
            ids, mask = ids[index], mask[index]
            draws = None if draws is None else draws[index]
    return answers


def _rows_may_leave(model: PreTrainedModel, settings: dict[str, Any]) -> bool:
    """Tell whether an answer may be made by several calls of `generate`.

    With several beams rows are no answers, and a cache of a fixed shape keeps all of its rows.
    """

    def value(name: str) -> Any:
        asked = settings.get(name)
        return getattr(model.generation_config, name, None) if asked is None else asked

    kept = any(value(name) for name in (*FROM_THE_START, "cache_implementation"))
    return (value("num_beams") or 1) == 1 and not kept


class StopRows(StoppingCriteria):
    """Stop each row at its first stop sequence; lm-eval's own waits until all rows have the same.

    A sequence that more tokens spell than are looked back at goes unnoticed here. That costs time
    alone: answers are cut at the sequence afterwards. With `leaves`, all rows stop as soon as half
    of them are done; `left` then says that others are not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[str],
        prompt: int,
        rows: int,
        *,
        leaves: bool = False,
    ) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.stops = [stop for stop in stops if stop]
        lengths = [len(tokenizer.encode(stop, add_special_tokens=False)) for stop in self.stops]
        self.look_back = max(lengths, default=0) + EXTRA_TOKENS
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.done = torch.zeros(rows, dtype=torch.bool)
        # The most rows that are left when a call of `generate` ends.
        self.most_left = rows // 2 if leaves and rows > FEW_ROWS else 0
        self.left = False

    def open_rows(self) -> list[int]:
        """Return the rows that are not done."""
        found: list[int] = (~self.done).nonzero().flatten().tolist()
        return found

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Say which rows (B,) are done; input_ids (B, prompt and all tokens so far)."""
        rows = self.open_rows()
        start = max(self.prompt, input_ids.shape[1] - self.look_back)
        endings = input_ids[:, start:].tolist()
        texts = self.tokenizer.batch_decode([endings[row] for row in rows])
        for row, text in zip(rows, texts, strict=True):
            # `generate` stops these rows by itself.
            ended = endings[row][-1] in self.ends
            self.done[row] = ended or any(stop in text for stop in self.stops)
        open_rows = int((~self.done).sum())
        self.left = 0 < open_rows <= self.most_left
        done = torch.ones_like(self.done) if self.left else self.done
        return done.to(input_ids.device)


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


def sampling(model: PreTrainedModel, settings: dict[str, Any]) -> list[LogitsProcessor]:
    """Take the settings of sampling out of `settings`; return what stands before `DrawRows`.

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
    return steps

"""Log-likelihoods of continuations: each context is read once, whatever it is continued by.

A context goes into the model's cache; its continuations are then read from copies of that. So of
four answers to a question with long examples, one quarter of the tokens is computed. A student's
cache has a constant size; a teacher's copies grow with the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

Tokens = tuple[int, ...]
Score = tuple[float, bool]
"""Log-probability of a continuation, and whether greedy decoding gives it."""

READ_AT_ONCE = 2048
"""Tokens of continuations that are read at a time: the logits of a document of 128k tokens would
take 33 GB at a vocabulary of 128k words, in bf16."""


@dataclass(frozen=True)
class Pair:
    """A context and a continuation, both at least one token."""

    context: Tokens
    continuation: Tokens


@torch.no_grad()
def score_pairs(model: PreTrainedModel, pairs: Sequence[Pair], padding: int) -> list[Score]:
    """Score all pairs of a batch in two forward passes: contexts, then continuations.

    `padding` is any token's id.
    """
    contexts = list(dict.fromkeys(pair.context for pair in pairs))
    row_of = {context: row for row, context in enumerate(contexts)}
    rows = [row_of[pair.context] for pair in pairs]
    ids, mask = _left_padded(contexts, padding, model.device)
    longer = [n for n, pair in enumerate(pairs) if len(pair.continuation) > 1]
    # Positions count from each row's first token. Stated, because only some models infer them.
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    read = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=bool(longer),
        logits_to_keep=1,
    )
    log_probs = _log_probs(read.logits[:, -1])
    wanted = torch.tensor([pair.continuation[0] for pair in pairs], device=model.device)
    first, likeliest = log_probs[rows, wanted], log_probs.argmax(-1)[rows] == wanted
    # Of each pair's tokens, one part after the other.
    scored = [[part] for part in zip(first.split(1), likeliest.split(1), strict=True)]
    if longer:
        index = torch.tensor([rows[n] for n in longer], device=model.device)
        cache = read.past_key_values
        cache.batch_select_indices(index)
        # Without its last token, after which nothing is asked.
        tails = [pairs[n].continuation[:-1] for n in longer]
        width = max(map(len, tails))
        padded = [list(tail) + [padding] * (width - len(tail)) for tail in tails]
        tokens = torch.tensor(padded, device=index.device)
        steps = torch.arange(width, device=index.device)
        for start in range(0, width, READ_AT_ONCE):
            end = min(width, start + READ_AT_ONCE)
            logits = model(
                input_ids=tokens[:, start:end],
                # Padding on the right counts as tokens: no real one comes after it.
                attention_mask=torch.cat([mask[index], torch.ones_like(tokens[:, :end])], dim=1),
                position_ids=mask[index].sum(-1, keepdim=True) + steps[start:end],
                past_key_values=cache,
                use_cache=True,
            ).logits
            for n, row in zip(longer, logits, strict=True):
                asked = pairs[n].continuation[start + 1 : end + 1]
                if asked:
                    # Row by row: log-probabilities of a batch would double its largest tensor.
                    scored[n].append(_scored(row[: len(asked)], asked))
    return [_added_up(parts) for parts in scored]


def _scored(logits: Tensor, asked: Tokens) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities (T,) of tokens, and which are the likeliest (T,) bool.

    logits (T, V): after the token before each.
    """
    log_probs = _log_probs(logits)
    wanted = torch.tensor(asked, device=logits.device)
    return log_probs.gather(1, wanted[:, None]).flatten(), log_probs.argmax(-1) == wanted


def _added_up(parts: Sequence[tuple[Tensor, Tensor]]) -> Score:
    found, likeliest = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return float(found.sum()), bool(likeliest.all())


def _log_probs(logits: Tensor) -> Tensor:
    # In single precision: in bf16, sums of many tokens would tie.
    return logits.float().log_softmax(-1)


def _left_padded(
    rows: Sequence[Tokens], padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return ids and mask (B, T); padding is on the left, so that all rows end together."""
    width = max(map(len, rows))
    ids = [[padding] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

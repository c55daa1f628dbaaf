"""Score the teacher on held-out items, greedily, with full attention or with a window alone."""

from collections import defaultdict

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_distill.embedded.tasks import TASKS, Item, held_out_items
from xlstm_distill.embedded.tokenizer import ASSISTANT, BOS, END, USER

BATCH = 100  # items answered together
LONGEST_ANSWER = 24  # tokens, the end token included

Outcome = tuple[Item, bool]
"""An item, and whether it was answered exactly."""


@torch.no_grad()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    *,
    window: int | None = None,
    sinks: int = 0,
) -> list[str]:
    """Answer the items greedily.

    With `window`, every layer sees only the last `window` tokens and the first `sinks` ones.
    """
    texts = [f"{BOS}{USER}{item.prompt}{END}{ASSISTANT}" for item in items]
    # Padding here leaves the tokenizer as it was; its own would stay on for whoever encodes next.
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, encoded))
    pad = int(tokenizer.pad_token_id)
    given = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded])
    # valid (B, T) is False at the padding on the left.
    valid = torch.tensor([[i >= longest - len(ids) for i in range(longest)] for ids in encoded])
    cache, written = DynamicCache(config=model.config), []
    for _ in range(LONGEST_ANSWER):
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
        new = given.shape[1]
        hidden = model.model(
            input_ids=given,
            attention_mask=_mask(valid, positions, window, sinks)[:, :, -new:],
            position_ids=positions[:, -new:],
            past_key_values=cache,
        ).last_hidden_state
        given = model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)
        valid = torch.cat([valid, torch.ones_like(given, dtype=torch.bool)], dim=1)
        written.append(given)
        if (torch.cat(written, dim=1) == tokenizer.eos_token_id).any(-1).all():
            break
    return [_until_end(row, tokenizer) for row in torch.cat(written, dim=1).tolist()]


def _mask(valid: Tensor, positions: Tensor, window: int | None, sinks: int) -> Tensor:
    """Make the mask (B, 1, T, T), True where a query sees a key.

    A padded query sees itself: a softmax over nothing is not a number.
    """
    total = valid.shape[1]
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    seen = causal & valid[:, None, :]
    if window is not None:
        near = positions[:, :, None] - positions[:, None, :] < window
        seen = seen & (near | (positions[:, None, :] < sinks))
    return (seen | torch.eye(total, dtype=torch.bool))[:, None]


def _until_end(tokens: list[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """Decode the tokens before the first end token."""
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(tokens))


def outcomes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    count: int,
    seed: int = 0,
    tasks: tuple[str, ...] | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> dict[str, list[Outcome]]:
    """Return, for each task, whether each of `count` held-out items is answered exactly."""
    model.eval()
    found = {}
    for name in tasks or tuple(TASKS):
        items = held_out_items(TASKS[name], count, seed)
        given: list[str] = []
        for start in range(0, count, BATCH):
            asked = items[start : start + BATCH]
            given += answers(model, tokenizer, asked, window=window, sinks=sinks)
        found[name] = [
            (item, answer == item.answer) for item, answer in zip(items, given, strict=True)
        ]
    return found


def accuracies(found: dict[str, list[Outcome]]) -> dict[str, float]:
    """Return each task's share of items that were answered exactly."""
    return {name: _share(outcomes) for name, outcomes in found.items()}


def by_level(found: dict[str, list[Outcome]]) -> dict[str, dict[int, tuple[int, float]]]:
    """Return, for each task and each level of its items, how many there are and the share right."""
    levels: dict[str, dict[int, tuple[int, float]]] = {}
    for name, of_task in found.items():
        groups: dict[int, list[Outcome]] = defaultdict(list)
        for item, right in of_task:
            groups[item.level].append((item, right))
        levels[name] = {at: (len(groups[at]), _share(groups[at])) for at in sorted(groups)}
    return levels


def _share(found: list[Outcome]) -> float:
    return sum(right for _, right in found) / len(found)

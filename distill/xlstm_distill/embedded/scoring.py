"""Score the teacher on held-out items, greedily, with full attention or with a window alone."""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from xlstm_distill.embedded.tasks import TASKS, Item, held_out_items
from xlstm_distill.embedded.tokenizer import ASSISTANT, BOS, END, USER

BATCH = 100  # items answered together
LONGEST_ANSWER = 24  # tokens, the end token included


@torch.no_grad()
def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    items: list[Item],
    *,
    window: int | None = None,
    sinks: int = 0,
) -> list[str]:
    """Answer the items greedily, without a cache.

    With `window`, every layer sees only the last `window` tokens and the first `sinks` ones.
    """
    texts = [f"{BOS}{USER}{item.prompt}{END}{ASSISTANT}" for item in items]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    # valid (B, T) is False at the padding on the left.
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    start = ids.shape[1]
    for _ in range(LONGEST_ANSWER):
        positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
        mask = _mask(valid, positions, window, sinks)
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        valid = torch.cat([valid, torch.ones_like(token, dtype=torch.bool)], dim=1)
        if (ids[:, start:] == tokenizer.eos_token_id).any(-1).all():
            break
    return [_until_end(row, tokenizer) for row in ids[:, start:].tolist()]


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


def accuracies(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    count: int,
    seed: int = 0,
    tasks: tuple[str, ...] | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> dict[str, float]:
    """Return, for each task, the share of `count` held-out items that is answered exactly."""
    model.eval()
    scores = {}
    for name in tasks or tuple(TASKS):
        items = held_out_items(TASKS[name], count, seed)
        right = 0
        for start in range(0, count, BATCH):
            asked = items[start : start + BATCH]
            given = answers(model, tokenizer, asked, window=window, sinks=sinks)
            right += sum(answer == item.answer for answer, item in zip(given, asked, strict=True))
        scores[name] = right / count
    return scores

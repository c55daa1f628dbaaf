"""What the committed teacher can do, and what a window alone cannot."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded.recall import WINDOW
from xlstm_distill.embedded.scoring import accuracies, answers, outcomes
from xlstm_distill.embedded.tasks import TASKS, held_out_items

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"
RECALL = tuple(name for name, task in TASKS.items() if task.passage)


def test_no_task_is_out_of_reach_or_solved(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A score of 0 or 1 leaves nothing to lose, so it cannot tell two students apart."""
    log = json.loads((TEACHER / "training.json").read_text())
    said = log["held_out_accuracy"]
    assert sum(0.6 <= score <= 0.95 for score in said.values()) > len(TASKS) / 2, said
    assert max(said.values()) < 1.0, said
    # The log is true: 40 of its 500 items, so within four standard errors.
    found = outcomes(teacher, tokenizer, count=40, tasks=("add", "copy", "pairs_12"))
    for name, score in accuracies(found).items():
        error = (max(said[name] * (1 - said[name]), 0.01) / 40) ** 0.5
        assert abs(score - said[name]) <= 4 * error


def test_a_window_alone_fails_at_recall(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = outcomes(teacher, tokenizer, count=25, tasks=RECALL, window=WINDOW, sinks=4)
    scores = accuracies(found)
    assert max(scores.values()) <= 0.3, scores


def test_scoring_equals_generate(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.backend_tokenizer.no_padding()
    items = [
        item for name in ("add", "copy", "pairs_12") for item in held_out_items(TASKS[name], 2)
    ]
    for item, mine in zip(items, answers(teacher, tokenizer, items), strict=True):
        message = [{"role": "user", "content": item.prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = teacher.generate(**encoded, max_new_tokens=24, do_sample=False)
        start = encoded["input_ids"].shape[1]
        assert tokenizer.decode(output[0, start:], skip_special_tokens=True) == mine
    # Padding that stays on would pad every conversation of a training that is scored on the way.
    assert tokenizer.backend_tokenizer.padding is None

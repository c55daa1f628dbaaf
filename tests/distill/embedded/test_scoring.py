"""What the committed teacher can do, and what a window alone cannot."""

from __future__ import annotations

from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded import DOMAINS
from xlstm_distill.embedded.scoring import accuracies, answers
from xlstm_distill.embedded.tasks import TASKS, held_out_items

RECALL = tuple(name for name, task in TASKS.items() if task.table)


def test_teacher_answers_most_tasks(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = accuracies(teacher, tokenizer, count=25)
    assert sum(score >= 0.8 for score in scores.values()) >= 12, scores
    for domain in DOMAINS:
        assert sum(scores[n] >= 0.8 for n, task in TASKS.items() if task.domain == domain) >= 2, (
            scores
        )


def test_a_window_alone_fails_at_recall(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    scores = accuracies(teacher, tokenizer, count=25, tasks=RECALL, window=32, sinks=4)
    assert max(scores.values()) <= 0.3, scores


def test_scoring_without_cache_equals_generate(
    teacher: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    items = [item for name in ("add", "copy", "stock") for item in held_out_items(TASKS[name], 2)]
    for item, mine in zip(items, answers(teacher, tokenizer, items), strict=True):
        message = [{"role": "user", "content": item.prompt}]
        encoded = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = teacher.generate(**encoded, max_new_tokens=10, do_sample=False)
        start = encoded["input_ids"].shape[1]
        assert tokenizer.decode(output[0, start:], skip_special_tokens=True) == mine

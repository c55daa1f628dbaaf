"""The embedded teacher's tokenizer and chat template."""

from __future__ import annotations

from transformers import (
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded import pools
from xlstm_distill.embedded.tokenizer import VOCABULARY, render, train_tokenizer


def test_tokenizer_round_trips_and_splits_digits(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= VOCABULARY
    words = (*pools.ITEMS, *pools.NAMES, *pools.WORDS, *pools.ELEMENTS)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    for text in ("Größe 42 €\n\t x==y", "  two  spaces ", "日本語 🙂", "print((3+4)*12)"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.tokenize("B4 NaGC") == ["B", "4", "Ġ", "Na", "G", "C"]
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_template_marks_answers_and_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "Compute 1+2."},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Compute 10+20."},
        {"role": "assistant", "content": "30"},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "3<|end|>30<|end|>"
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids == tokenizer(render({"messages": messages}))["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert asked == "<|bos|><|user|>Compute 1+2.<|end|><|assistant|>"

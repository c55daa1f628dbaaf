"""What rows depend on: the tokenizer's hash, and a format that is raised when rows change."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.data.packing import pack
from xlstm_distill.data.prepare import tokenizer_hash
from xlstm_distill.data.tokenization import Chunk, ChunkTokenizer, DocumentTokenizer

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"


def test_using_a_tokenizer_does_not_change_its_hash():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    before = tokenizer_hash(tokenizer)
    tokenizer("one two three", padding="max_length", truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    tokenizer.chat_template += " "
    assert tokenizer_hash(tokenizer) != before


@pytest.mark.parametrize("setting", [{"bos_token": "sun"}, {"split_special_tokens": True}])
def test_settings_that_change_the_tokens_change_the_tokenizers_hash(setting):
    from transformers import AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(TEACHER) for _ in range(2)]
    assert len({tokenizer_hash(tokenizer) for tokenizer in tokenizers}) == 1
    for name, value in setting.items():
        setattr(tokenizers[0], name, value)
    assert len({tokenizer_hash(tokenizer) for tokenizer in tokenizers}) == 2


ASKED = [{"role": "user", "content": "Sort: fog sun"}, {"role": "assistant", "content": "fog sun"}]
GOLDEN = {
    "text": (
        [{"text": "one two"}, {"text": "three " * 30}, {"text": "Größe: 42 €"}],
        "5f92744a17b8b54d0b6063888ed09488",
    ),
    "prompt and response": (
        [
            {"prompt": "Sort: fog sun", "response": "fog sun"},
            {"prompt": ASKED + ASKED[:1], "response": "sun"},
        ],
        "f2d5765e84220bc26a7e6420ba5cf260",
    ),
    "messages": (
        [{"messages": ASKED}, {"messages": ASKED * 2}],
        "1e2d8a76eb7c5ae423db8f5c2ed0df60",
    ),
}


@pytest.mark.parametrize("style", GOLDEN)
def test_rows_keep_their_meaning_or_their_format_is_raised(style):
    """The same documents make the same rows as when ROWS_FORMAT was last raised.

    The tokenizer is the embedded teacher's. When that is trained anew, only the hashes change.
    """
    from transformers import AutoTokenizer

    documents, expected = GOLDEN[style]
    tokenizer = DocumentTokenizer(AutoTokenizer.from_pretrained(TEACHER))
    tokens = ChunkTokenizer(tokenizer, 32, "split")(Chunk(documents, "data", "golden", 0))
    rows = pack([piece for document in tokens for piece in document.pieces(32)], 32, 0)
    content = [
        [row.ids.tolist(), row.supervised.tolist(), row.segment_ids.tolist()] for row in rows
    ]
    assert digest(content) == expected, (
        f"{style}: rows have changed; raise prepare.ROWS_FORMAT and take the new hash."
    )

"""Packing loses nothing, leaks nothing and fills rows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_distill.packing import DocumentTokenizer, Tokens, pack


def document(length, start=0):
    return Tokens(list(range(start, start + length)), [n % 2 == 0 for n in range(length)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(4, 24))
def test_every_token_is_kept_once_and_in_its_document(lengths, context):
    documents = [document(n, 1000 * i) for i, n in enumerate(lengths)]
    rows = list(pack(documents, context, pad=-1))
    pieces = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["supervised"]) == len(row["segment_ids"]) == context
        segments: dict[int, Tokens] = {}
        for t in range(row["length"]):
            segments.setdefault(row["segment_ids"][t], Tokens([], [])).ids.append(row["input_ids"][t])
            segments[row["segment_ids"][t]].supervised.append(row["supervised"][t])
        pieces += [(tuple(s.ids), tuple(s.supervised)) for s in segments.values()]
        padding = slice(row["length"], None)
        assert set(row["input_ids"][padding]) <= {-1}
        assert not any(row["supervised"][padding])
        assert not set(row["segment_ids"][padding]) & set(segments)
    expected = [(tuple(p.ids), tuple(p.supervised)) for d in documents for p in d.pieces(context)]
    assert sorted(pieces) == sorted(expected)


def test_short_documents_fill_rows():
    import random

    rng = random.Random(0)
    rows = list(pack((document(rng.randint(5, 120)) for _ in range(600)), 256, pad=-1))
    assert sum(row["length"] for row in rows) / (256 * len(rows)) > 0.97


class Letters:
    """A tokenizer of single letters with a chat template that marks nothing."""

    eos_token_id = 0
    chat_template = "plain"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [ord(c) for c in text]}

    def apply_chat_template(self, messages, return_dict, add_generation_prompt=False):
        text = "".join(f"<{m['role'][0]}>{m['content']};" for m in messages) + ("<a>" if add_generation_prompt else "")
        return {"input_ids": [ord(c) for c in text]}


def supervised_text(tokens):
    return "".join(chr(i) if i else "$" for i, s in zip(tokens.ids, tokens.supervised, strict=True) if s)


def test_what_is_supervised_in_each_style():
    tokenize = DocumentTokenizer(Letters())
    assert supervised_text(tokenize({"text": "ab"})) == "\x01ab$"
    turns = (("user", "q"), ("assistant", "xy"), ("user", "r"), ("assistant", "z"))
    chat = [{"role": role, "content": content} for role, content in turns]
    assert supervised_text(tokenize({"messages": chat})) == "xy;z;"


def test_prompts_become_chats_where_there_is_a_template():
    tokenize = DocumentTokenizer(Letters())
    ask = {"role": "user", "content": "ask"}
    assert supervised_text(tokenize({"prompt": "ask", "response": "tell"})) == "tell;"
    assert tokenize({"prompt": [ask], "response": "tell"}) == tokenize({"prompt": "ask", "response": "tell"})
    plain = Letters()
    plain.chat_template = None
    assert supervised_text(DocumentTokenizer(plain)({"prompt": "ask", "response": "tell"})) == "tell$"

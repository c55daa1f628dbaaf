"""What is supervised in each style and chat format; what becomes of documents that do not fit."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from xlstm_distill.data.tokenization import (
    Chunk,
    ChunkTokenizer,
    DocumentOutcome,
    DocumentTokenizer,
)
from xlstm_distill.errors import UserError

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"

# Templates that render as the named families do, written for this test. ANSWER marks the place of
# generation tags.
LLAMA3 = (
    "{{ bos_token }}{% set day = strftime_now('%d %b %Y') %}"
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ day }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.role == 'assistant' %}<ANSWER>{{ m.content | trim }}<|eot_id|></ANSWER>"
    "{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<ANSWER>{{ m.content }}<|im_end|></ANSWER>{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# Drops the reasoning of every answer but the last, and opens the next one in its generation prompt.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{{ '\n' }}{% endif %}"
)
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sort: fog sun "},
    {"role": "assistant", "content": " fog sun\n"},
    {"role": "user", "content": "Größe?"},
    {"role": "assistant", "content": "42 €"},
]


@pytest.fixture(scope="module")
def base():
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


@pytest.fixture
def with_template(base):
    before = base.chat_template

    def make(template, tagged=False):
        tags = ("{% generation %}", "{% endgeneration %}") if tagged else ("", "")
        if template is not None:
            template = template.replace("<ANSWER>", tags[0]).replace("</ANSWER>", tags[1])
        base.chat_template = template
        return DocumentTokenizer(base)

    yield make
    base.chat_template = before


def text(tokenizer, tokens):
    return tokenizer.decode(tokens.ids)


def supervised(tokenizer, tokens):
    return tokenizer.decode(tokens.ids[tokens.supervised])


@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "no tags"])
def test_llama3_supervises_answers_and_their_end(tagged, with_template):
    tokenize = with_template(LLAMA3, tagged)
    assert tokenize.marks_turns == tagged
    (tokens,) = tokenize([{"messages": CHAT}])
    assert supervised(tokenize.tokenizer, tokens) == "fog sun<|eot_id|>42 €<|eot_id|>"
    rendered = text(tokenize.tokenizer, tokens)
    assert rendered.startswith("<|bos|><|start_header_id|>system")
    assert rendered.count("<|bos|>") == 1
    assert "Today Date: 26 Jul 2024" in rendered
    assert date.today().strftime("%d %b %Y") not in rendered


@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "no tags"])
@pytest.mark.parametrize("chat", [CHAT, CHAT[1:]], ids=["system", "default system"])
def test_qwen25_supervises_answers_but_not_the_line_break_after(chat, tagged, with_template):
    tokenize = with_template(QWEN25, tagged)
    (tokens,) = tokenize([{"messages": chat}])
    assert supervised(tokenize.tokenizer, tokens) == " fog sun\n<|im_end|>42 €<|im_end|>"
    assert text(tokenize.tokenizer, tokens).endswith("42 €<|im_end|>\n")


@pytest.mark.parametrize("template", [LLAMA3, QWEN25], ids=["llama3", "qwen2.5"])
def test_tags_and_prefixes_agree_in_a_batch(template, with_template):
    chats = [{"messages": CHAT[:3]}, {"messages": CHAT}, {"messages": CHAT[1:3]}]
    marked = with_template(template, True)(chats)
    found = with_template(template)(chats)
    for a, b in zip(marked, found, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.supervised.tolist() == b.supervised.tolist()


def test_turns_that_a_template_rewrites_later_are_left_out(with_template):
    chat = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm</think>b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "<think>\nso</think>d"},
    ]  # fmt: skip
    tokenize = with_template(REASONING)
    (tokens,) = tokenize([{"messages": chat}])
    assert supervised(tokenize.tokenizer, tokens) == "so</think>d<|im_end|>"
    (tokens,) = tokenize([{"messages": [chat[0], {"role": "assistant", "content": "b"}]}])
    assert supervised(tokenize.tokenizer, tokens) == "b<|im_end|>"


def test_the_embedded_template_marks_what_prefixes_find(base):
    from xlstm_distill.embedded import documents

    marked, by_prefix = DocumentTokenizer(base), DocumentTokenizer(base)
    assert marked.marks_turns
    by_prefix.marks_turns = False
    chats = [{"messages": document["messages"]} for document in documents("chat", 50, 3)]
    for a, b in zip(marked(chats), by_prefix(chats), strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.supervised.tolist() == b.supervised.tolist()


def test_a_refused_chat_is_left_out_alone(with_template):
    tokenize = with_template(LLAMA3, tagged=True)
    odd = [{"role": "tool", "content": "x"}, *CHAT[1:3]]
    first, second, third = tokenize([{"messages": CHAT}, {"messages": odd}, {"messages": CHAT}])
    assert second.outcome is DocumentOutcome.REFUSED
    assert second.reason == "no role tool"
    assert first.ids.tolist() == third.ids.tolist()
    assert len(first)


def test_text_is_supervised_whole_and_ends_once(with_template):
    tokenize = with_template(None)
    end = tokenize.tokenizer.eos_token
    plain, ended = tokenize([{"text": "sun fog"}, {"text": "sun fog" + end}])
    assert text(tokenize.tokenizer, plain) == "sun fog" + end
    assert plain.ids.tolist() == ended.ids.tolist()
    assert plain.supervised.all()


def test_prompts_without_a_template_are_put_before_their_responses(with_template):
    tokenize = with_template(None)
    (tokens,) = tokenize([{"prompt": "Repeat: sun", "response": " sun"}])
    assert supervised(tokenize.tokenizer, tokens) == " sun" + tokenize.tokenizer.eos_token
    assert text(tokenize.tokenizer, tokens) == "Repeat: sun sun" + tokenize.tokenizer.eos_token
    with pytest.raises(UserError, match="no chat template"):
        tokenize([{"prompt": CHAT[1:2], "response": "x"}])


def test_prompts_become_chats_where_there_is_a_template(with_template):
    tokenize = with_template(QWEN25)
    plain, listed = tokenize(
        [
            {"prompt": "ask", "response": "tell"},
            {"prompt": [{"role": "user", "content": "ask"}], "response": "tell"},
        ]
    )
    assert supervised(tokenize.tokenizer, plain) == "tell<|im_end|>"
    assert plain.ids.tolist() == listed.ids.tolist()


def fitted(tokenize, policy, documents, context=6):
    return ChunkTokenizer(tokenize, context, policy)(
        Chunk(documents, "data.domains.x.sources[0]", "d.jsonl", 40)
    )


def test_each_policy_for_long_documents(with_template):
    tokenize = with_template(None)
    documents = [{"text": "1 2"}, {"text": "1 2 3 4 5 6 7 8 9"}]
    whole = [tokens.ids.tolist() for tokens in tokenize(documents)]
    assert len(whole[0]) <= 6 < len(whole[1])
    for policy, outcome, kept in (
        ("split", DocumentOutcome.SPLIT, whole[1]),
        ("truncate", DocumentOutcome.TRUNCATED, whole[1][:6]),
        ("drop", DocumentOutcome.DROPPED, []),
    ):
        short, long = fitted(tokenize, policy, documents)
        assert short.outcome is DocumentOutcome.KEPT
        assert (long.outcome, long.ids.tolist()) == (outcome, kept)
    message = (
        rf"sources\[0\]: record 42 of d.jsonl has {len(whole[1])} tokens, more than data.context "
        r"\(6\), and .*'error'"
    )
    with pytest.raises(UserError, match=message):
        fitted(tokenize, "error", documents)
    assert fitted(tokenize, "error", documents[:1])[0].ids.tolist() == whole[0]


TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]


@pytest.mark.parametrize("tagged", [True, False], ids=["tags", "no tags"])
def test_of_a_prompt_with_answers_only_the_response_is_supervised(tagged, with_template):
    tokenize = with_template(QWEN25, tagged)
    response = [{"role": "assistant", "content": "e"}]
    one, two, whole = *tokenize(
        [{"prompt": TALK, "response": "e"}, {"prompt": TALK[:3], "response": "e"}]
    ), tokenize([{"messages": [*TALK, *response]}])[0]  # fmt: skip
    assert (
        supervised(tokenize.tokenizer, one) == supervised(tokenize.tokenizer, two) == "e<|im_end|>"
    )
    assert one.ids.tolist() == whole.ids.tolist()
    assert supervised(tokenize.tokenizer, whole) == "b<|im_end|>c<|im_end|>e<|im_end|>"


def test_a_system_column_stands_before_the_prompt(with_template):
    tokenize = with_template(QWEN25)
    documents = [
        {"system": "be brief", "prompt": "ask", "response": "tell"},
        {"system": None, "prompt": TALK[:1], "response": "tell"},
        {"system": "be brief", "prompt": TALK[:1], "response": "tell"},
    ]
    one, none, listed = fitted(tokenize, "error", documents, 512)
    assert text(tokenize.tokenizer, one).startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nask"
    )
    assert text(tokenize.tokenizer, none).startswith(
        "<|im_start|>system\nYou are helpful.<|im_end|>"
    )
    assert text(tokenize.tokenizer, listed).startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na"
    )
    assert all(
        supervised(tokenize.tokenizer, tokens) == "tell<|im_end|>" for tokens in (one, none, listed)
    )
    with pytest.raises(
        UserError,
        match=r"record 41 of d\.jsonl: its prompt begins with a system message; leave out",
    ):
        fitted(tokenize, "error", [{"system": "be brief", "prompt": CHAT[:2], "response": "tell"}])
    with pytest.raises(UserError, match="no chat template, which chats need"):
        fitted(with_template(None), "error", documents[:1])


@pytest.mark.parametrize("nothing", [[], None])
def test_keys_without_a_value_do_not_reach_the_template(nothing, with_template):
    template = LLAMA3.replace(
        "{% if m.role not in",
        "{% if 'tool_calls' in m %}{{ raise_exception('one call') }}{% endif %}{% if m.role not in",
    )
    tokenize = with_template(template)
    chat = [{**message, "tool_calls": nothing, "name": None} for message in CHAT]
    for tokens, again in (
        (
            fitted(tokenize, "error", [{"messages": chat}], 512),
            fitted(tokenize, "error", [{"messages": CHAT}], 512),
        ),
        (
            fitted(tokenize, "error", [{"prompt": chat[:2], "response": "x"}], 512),
            fitted(tokenize, "error", [{"prompt": CHAT[:2], "response": "x"}], 512),
        ),
    ):
        assert tokens[0].outcome is DocumentOutcome.KEPT
        assert tokens[0].ids.tolist() == again[0].ids.tolist()


def test_contents_in_text_parts_are_joined(with_template):
    tokenize = with_template(QWEN25)
    parts = [{"type": "text", "text": "so", "image_url": None}, {"type": "text", "text": "-so"}]
    chat = [{"role": "user", "content": parts[:1]}, {"role": "assistant", "content": parts}]
    (tokens,) = fitted(tokenize, "error", [{"messages": chat}], 512)
    assert supervised(tokenize.tokenizer, tokens) == "so-so<|im_end|>"
    assert "user\nso<|im_end|>" in text(tokenize.tokenizer, tokens)


def test_an_answer_without_content_is_an_empty_document_unless_it_calls_a_tool(with_template):
    tokenize = with_template(
        "{% for m in messages %}{{ m.role }}:"
        "{{ m.content or 'calls ' + m.tool_calls[0].name }}|{% endfor %}"
    )
    ask = {"role": "user", "content": "ask"}
    for content in (None, "", []):
        answer = {"role": "assistant", "content": content}
        assert (
            fitted(tokenize, "error", [{"messages": [ask, answer]}], 512)[0].outcome
            is DocumentOutcome.EMPTY
        )
        calling = {**answer, "tool_calls": [{"name": "f"}]}
        (tokens,) = fitted(tokenize, "error", [{"messages": [ask, calling]}], 512)
        assert text(tokenize.tokenizer, tokens) == "user:ask|assistant:calls f|"
    (tokens,) = fitted(
        tokenize, "error", [{"messages": [{"role": "user", "content": None}, CHAT[2]]}], 512
    )
    assert tokens.outcome is DocumentOutcome.EMPTY


def test_what_has_nothing_to_train_on_is_told_apart(with_template):
    tokenize = with_template(QWEN25)
    outcomes = [
        t.outcome
        for t in fitted(tokenize, "split", [{"messages": []}, {"messages": CHAT[:2]}], 512)
    ]
    assert outcomes == [DocumentOutcome.EMPTY, DocumentOutcome.UNSUPERVISED]
    plain = with_template(None)
    outcomes = [
        t.outcome
        for t in fitted(plain, "split", [{"text": None}, {"text": ""}, {"text": "a"}], 512)
    ]
    assert outcomes == [DocumentOutcome.EMPTY, DocumentOutcome.EMPTY, DocumentOutcome.KEPT]


def test_a_wrong_type_names_the_record_of_its_chunk(with_template):
    with pytest.raises(UserError, match=r"record 42 of d.jsonl: its text is int; text is needed"):
        fitted(with_template(QWEN25), "split", [{"text": "a"}, {"text": 5}])

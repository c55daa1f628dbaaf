"""A preview shows what a source becomes, and collects problems instead of stopping at the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xlstm_distill.data.preview import preview_sources
from xlstm_distill.models.teacher import load_tokenizer
from xlstm_distill.recipe import Recipe, Teacher

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"


def recipe_of(*sources, context=64, **data):
    """A recipe with one domain `x` of these sources."""
    return Recipe.model_validate(
        {
            "name": "test",
            "teacher": {"path": str(TEACHER), "dtype": "float32"},
            "student": {"mixer": {"window": 32}},
            "data": {"context": context, "domains": {"x": {"sources": sources}}, **data},
            "align": {"tokens": 1024, "batch": 1, "warmup_steps": 0},
            "distill": {
                "lr": 1e-3,
                "batch": 1,
                "experts": {"x": {"phases": [{"domain": "x", "tokens": 1024}]}},
            },
            "evaluate": {"tasks": [{"name": "t"}]},
        }
    )


@pytest.fixture
def tokenizer():
    return load_tokenizer(Teacher(path=str(TEACHER), dtype="float32"))


@pytest.fixture
def file(tmp_path):
    """Write records to a JSONL file; returns its path."""

    def write(name, *records):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def text_of(example):
    return "".join(text for text, _ in example.pieces)


def supervised_of(example):
    return "".join(text for text, supervised in example.pieces if supervised)


def test_text_is_supervised_whole_and_only_the_first_examples_are_shown(file, tokenizer):
    path = file("texts", *({"text": f"sun {n}", "n": n} for n in range(10)))
    (found,) = preview_sources(recipe_of({"path": path}), tokenizer)
    assert (found.field, found.origin) == ("data.domains.x.sources[0]", path)
    assert (found.columns, found.left_out, found.problem) == ({"text": "text"}, None, None)
    end = tokenizer.eos_token
    assert [e.pieces for e in found.examples] == [((f"sun {n}{end}", True),) for n in range(3)]
    for example in found.examples:
        assert example.tokens == example.supervised == len(tokenizer(text_of(example))["input_ids"])
    (found,) = preview_sources(recipe_of({"path": path}), tokenizer, examples=5)
    assert len(found.examples) == 5


def test_of_a_chat_the_answers_are_marked(file, tokenizer):
    chat = [
        {"role": "user", "content": "Sort: fog sun"},
        {"role": "assistant", "content": "fog sun"},
        {"role": "user", "content": "Größe?"},
        {"role": "assistant", "content": "42 €"},
    ]
    path = file("chats", {"talk": chat})
    (found,) = preview_sources(recipe_of({"path": path, "messages": "talk"}), tokenizer)
    assert found.columns == {"messages": "talk"}
    (example,) = found.examples
    marks = [supervised for _, supervised in example.pieces]
    assert marks[:4] == [False, True, False, True]
    assert example.pieces[1][0].startswith("fog sun")
    assert example.pieces[3][0].startswith("42 €")
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text_of(example) == whole
    assert 0 < example.supervised < example.tokens


def test_of_a_prompt_and_its_response_the_response_is_marked(file, tokenizer):
    path = file("pairs", {"ask": "1+1", "tell": "2", "rule": "Be brief."})
    columns = {"prompt": "ask", "response": "tell"}
    source = {"path": path, **columns}
    (found,) = preview_sources(recipe_of(source), tokenizer)
    assert found.columns == columns
    (example,) = found.examples
    assert supervised_of(example).startswith("2")
    assert "1+1" in text_of(example)
    tokenizer.chat_template = None
    (found,) = preview_sources(recipe_of(source), tokenizer)
    assert found.examples[0].pieces == (("1+1", False), ("2" + tokenizer.eos_token, True))


def test_a_generator_needs_no_file(tokenizer):
    (found,) = preview_sources(
        recipe_of({"generator": "chat", "documents": 200}, context=256), tokenizer
    )
    assert (found.origin, found.columns) == ("generator 'chat'", {"messages": "messages"})
    assert len(found.examples) == 3
    assert all(supervised_of(example) for example in found.examples)


def test_what_is_left_out_is_counted_with_its_reason(file, tokenizer):
    talk = [{"role": "tool", "content": "x"}] * 2
    ask = [{"role": "user", "content": "ask"}]
    path = file("chats", {"messages": talk}, {"messages": ask}, {"messages": []})
    texts = file("texts", {"text": "sun"}, {"text": None}, {"text": "fog " * 200})
    recipe = recipe_of({"path": path}, {"path": texts}, long_documents="drop")
    chats, dropped = preview_sources(recipe, tokenizer)
    assert chats.examples == ()
    losses = (
        "of 3 documents 1 empty, 1 with nothing to train on, 1 refused by the chat template left "
        "out (the first: Role tool is unknown"
    )
    assert chats.left_out.startswith(losses)
    assert chats.problem.startswith(f"data.domains.x.sources[0]: {losses}")
    assert chats.problem.endswith("nothing of it can be used.")
    assert dropped.left_out == "of 3 documents 1 too long, 1 empty left out"
    assert len(dropped.examples) == 1
    _, cut = preview_sources(
        recipe_of({"path": path}, {"path": texts}, long_documents="truncate"), tokenizer
    )
    assert cut.left_out == ("of 3 documents 1 empty left out; 1 cut to 64 tokens (data.context)")
    assert [example.tokens for example in cut.examples][1] == 64


def test_problems_are_collected_per_source_and_name_the_field(file, tokenizer, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "sun"}\n' * 2 + '{"text": oops}\n')
    sources = (
        {"path": str(tmp_path / "missing.jsonl")},
        {"path": file("body", {"body": "x"})},
        {"path": file("named", {"text": "x"}), "text": "body"},
        {"path": file("empty")},
        {"path": str(broken)},
        {"path": file("typed", {"text": "sun"}, {"text": 5})},
        {"path": file("sound", {"text": "sun"})},
    )
    found = preview_sources(recipe_of(*sources), tokenizer)
    expected = (
        "cannot be read",
        "has none of the columns messages, prompt + response, text; it has body.",
        "has no column 'body' (record 1); it has text.",
        "has no documents.",
        "line 3 cannot be read",
        "record 2 of",
        None,
    )
    for number, (preview, problem) in enumerate(zip(found, expected, strict=True)):
        assert preview.field == f"data.domains.x.sources[{number}]"
        if problem is None:
            assert preview.problem is None
        else:
            assert preview.problem.startswith(f"data.domains.x.sources[{number}]")
            assert problem in preview.problem
            assert "\n" not in preview.problem
    assert len(found[5].examples) == 1  # what comes before a bad record is shown


def test_chats_without_a_chat_template_are_a_problem(file, tokenizer):
    tokenizer.chat_template = None
    chats = {"path": file("chats", {"messages": [{"role": "user", "content": "a"}]})}
    texts = {"path": file("texts", {"text": "sun"})}
    first, second = preview_sources(recipe_of(chats, texts), tokenizer)
    assert first.problem == "teacher.path: its tokenizer has no chat template, which chats need."
    assert (second.problem, len(second.examples)) == (None, 1)


def test_a_document_that_is_too_long_is_a_problem_where_the_recipe_says_so(file, tokenizer):
    path = file("texts", {"text": "sun"}, {"text": "fog " * 200})
    (found,) = preview_sources(recipe_of({"path": path}, long_documents="error"), tokenizer)
    assert "record 2 of" in found.problem
    assert len(found.examples) == 1


def test_enough_documents_are_read_to_find_examples(file, tokenizer):
    records = [{"text": ""}] * 500 + [{"text": f"sun {n}"} for n in range(9)]
    (found,) = preview_sources(recipe_of({"path": file("texts", *records)}), tokenizer)
    assert len(found.examples) == 3
    assert found.left_out == "of 503 documents 500 empty left out"

"""RULER's needles: items of one length, the same in every process, scored by the share found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from xlstm_eval.harness import check_suite
from xlstm_eval.loading import load_suite
from xlstm_eval.records import EvalError
from xlstm_eval.suites import Suite, SuiteTask
from xlstm_eval.tasks.local import local_tasks
from xlstm_eval.tasks.ruler import share_found

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"
NEEDLES = Suite(tasks=(SuiteTask(name="xlstm_niah_multikey_1k", metric="recall"),))


def test_the_score_is_the_share_of_values_that_are_found() -> None:
    doc = {"outputs": ["123", "ab-C", "777", "9"]}
    assert share_found(doc, ["It is 1234, and AB-c."]) == {"recall": 0.5}
    assert share_found(doc, [""]) == {"recall": 0.0}


def test_prompts_need_a_tokenizer() -> None:
    with pytest.raises(EvalError, match="xlstm_niah_multikey_1k: its prompts are sized by a token"):
        local_tasks()["xlstm_niah_multikey_1k"].settings({})


@pytest.mark.slow  # lm-eval's own index, and 500 items for each load
def test_items_fit_their_length_and_are_drawn_alike() -> None:
    pytest.importorskip("wonderwords")
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    # The first time, libraries are imported, which may draw too.
    (first,) = (leaf for _, leaf in load_suite(NEEDLES, tokenizer).leaves())
    drawn = random.Random(5).random()
    random.seed(5)
    (second,) = (leaf for _, leaf in load_suite(NEEDLES, tokenizer).leaves())
    assert random.random() == drawn  # loading leaves the caller's generator as it was
    rows = list(first.test_docs())
    assert rows == list(second.test_docs())
    assert len({row["input"] for row in rows}) == len(rows) == 500
    for row in rows[:20]:
        assert row["outputs"][0] in row["input"]
        assert 600 < len(tokenizer(row["input"], verbose=False)["input_ids"]) + 128 <= 1024
    # The embedded teacher's context is shorter.
    with pytest.raises(EvalError, match="have 1024 tokens, the model's context"):
        check_suite(NEEDLES, AutoConfig.from_pretrained(TEACHER), tokenizer)

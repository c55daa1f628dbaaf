"""Suites as data: validation, and the paper's two suites against the paper's list."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from xlstm_eval.records import EvalError
from xlstm_eval.suites import Suite, SuiteTask, paper_suite


def test_a_task_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"tasks\[1\]\.name: 'a' is already tasks\[0\]"):
        Suite(tasks=(SuiteTask(name="a"), SuiteTask(name="a")))


@pytest.mark.parametrize("change", [{"tasks": ()}, {"limit": 0}, {"limt": 3}])
def test_bad_suites_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Suite.model_validate({"tasks": ({"name": "a"},)} | change)


def test_the_papers_base_suite() -> None:
    suite = paper_suite("base")
    shots = {task.name: (task.shots, task.max_gen_tokens) for task in suite.tasks}
    assert len(shots) == 13
    assert shots["arc_challenge"] == (25, 100)
    assert shots["mmlu"] == (5, 10)
    assert shots["gsm8k"] == (8, 1024)
    assert shots["mbpp"] == (3, 256)
    assert shots["mbpp_plus"] == (3, 1024)
    assert shots["gpqa_main_cot_zeroshot"] == (0, 2048)
    assert not suite.apply_chat_template
    assert not any(task.multiturn for task in suite.tasks)


def test_the_papers_instruct_suite() -> None:
    suite = paper_suite("instruct")
    by_name = {task.name: task for task in suite.tasks}
    assert suite.apply_chat_template
    assert by_name["gsm8k_cot"].shots == 5
    assert by_name["gsm8k_cot"].max_gen_tokens == 3072
    assert {name for name, task in by_name.items() if not task.multiturn} == {
        "piqa",
        "arc_easy",
        "gpqa_diamond_cot_zeroshot",
        "gpqa_main_cot_zeroshot",
        "humaneval_instruct",
        "humaneval_plus",
        "ifeval",
    }
    assert set(suite.domains().values()) == {"understanding", "math", "code", "stem", "chat"}


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(EvalError, match=r"'bse' is unknown\. Allowed: base, instruct"):
        paper_suite("bse")  # type: ignore[arg-type]

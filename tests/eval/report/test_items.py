"""Items of two evaluations for a reader: which are chosen, what they say, what a page can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xlstm_eval.records import TaskResult
from xlstm_eval.report.items import (
    Item,
    ItemSet,
    answer_of,
    outcome_of,
    page_values,
    prompt_of,
    read_item_set,
    script_json,
    shortened,
)
from xlstm_eval.samples import GROUPS_FILE, Rows, as_logged, folder_rows

HOSTILE = '</script><script>alert(1)</script><!-- <b>bold</b> & \\u003c \u2028 "quoted"'


def logged(folder: Path, task: str, answers: list[str], scores: list[float]) -> TaskResult:
    """Write samples as an evaluation does, under two filters; return the result with its items."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples").mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, (answer, score) in enumerate(zip(answers, scores, strict=True)):
        row = {
            "doc_id": number,
            "target": f"target {number}",
            "arguments": [[f"prompt {number} of {task}", {"until": ["."]}]],
            "resps": [[f"so: {answer}"]],
        }
        rows.append({**row, "filter": "none", "filtered_resps": [f"so: {answer}"], "acc": 0.0})
        rows.append({**row, "filter": "strict", "filtered_resps": [answer], "acc": score})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples" / f"{task}.jsonl").write_text(lines)
    return TaskResult(
        task=task,
        metric="acc,strict",
        score=sum(scores) / len(scores),
        samples=len(scores),
        items=tuple(scores),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Rows, list[Any]]:
    """Two tasks: the student loses items 1 and 4 of `a` and item 0 of `b`, and wins 2 of `b`."""
    base = tmp_path_factory.mktemp("evaluations")
    pairs = []
    for task, teacher, student in (
        ("a", [1.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0]),
        ("b", [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]),
    ):
        own = logged(base / "teacher", task, [f"t{i}" for i in range(len(teacher))], teacher)
        other = logged(base / "student", task, [f"s{i}" for i in range(len(student))], student)
        pairs.append((own, other))
    return (
        folder_rows(base / "teacher" / "samples"),
        folder_rows(base / "student" / "samples"),
        pairs,
    )


def test_losses_come_first_then_wins_then_the_tasks_take_turns(folders: Any) -> None:
    found = read_item_set(*folders)
    assert found is not None
    assert found.counts == {"teacher": 3, "student": 1, "neither": 2, "both": 2}
    assert [(item.task, item.number) for item in found.items] == [
        ("a", 1), ("b", 0), ("a", 4), ("b", 2), ("a", 0), ("b", 1), ("a", 2), ("a", 3),
    ]  # fmt: skip
    first = found.items[0]
    assert (first.prompt, first.target, first.outcome) == ("prompt 1 of a", "target 1", "teacher")
    assert first.teacher == "t1\n--- all that was generated ---\nso: t1"
    assert first.student.startswith("s1\n")
    assert (first.teacher_score, first.student_score) == (1.0, 0.0)


def test_limits_keep_the_items_on_which_the_models_differ(folders: Any) -> None:
    few = read_item_set(*folders, most=4)
    assert few is not None
    assert {item.outcome for item in few.items} == {"teacher", "student"}
    assert few.total == 8
    small = read_item_set(*folders, most_bytes=400)
    assert small is not None
    assert [(item.task, item.number) for item in small.items] == [("a", 1), ("b", 0)]
    assert read_item_set(*folders, most=0) is None


def test_items_of_a_group_are_those_of_its_members(tmp_path: Path) -> None:
    for name in ("a", "b"):
        logged(tmp_path, name, [f"{name}0", f"{name}1"], [1.0, 0.0])
    group = TaskResult(
        task="all", metric="acc,strict", score=0.5, samples=4, items=(1.0, 0.0, 1.0, 0.0)
    )
    folder = tmp_path / "samples"
    assert not list(folder_rows(folder)(group))
    (folder / GROUPS_FILE).write_text('{"all": ["b", "a"]}')
    answers = [row["filtered_resps"][0] for row in folder_rows(folder)(group)]
    assert answers == ["b0", "b1", "a0", "a1"]
    (folder / "a.jsonl").unlink()  # with a part alone, items would get others' scores
    assert not list(folder_rows(folder)(group))


def test_rows_that_lm_eval_saved_read_as_those_that_it_logged() -> None:
    saved = {
        "arguments": {
            "gen_args_0": {"arg_0": "Q", "arg_1": " no"},
            "gen_args_1": {"arg_0": "Q", "arg_1": " a much longer answer"},
        },
        "filtered_resps": [["-2.0", "False"], ["-6.0", "True"]],
    }
    row = as_logged(saved)
    assert prompt_of(row) == "Q"
    assert answer_of(row, "acc,none") == "no (log-likelihood -2.00)"
    written = {"arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": {}}}, "resps": [["True"]]}
    assert answer_of(as_logged(written | {"filtered_resps": ["True"]}), "acc,none") == "True"
    codes = ["def f(): ...", "False"]
    assert as_logged({"filtered_resps": [codes]})["filtered_resps"] == [codes]


def test_outcomes_follow_the_direction_of_the_score() -> None:
    assert outcome_of(1.0, 0.0, True) == "teacher"
    assert outcome_of(2.0, 1.0, False) == "student"
    assert outcome_of(0.4, 0.4, True) == "both"
    assert outcome_of(0.0, 0.0, True) == "neither"


def test_a_choice_is_named_as_its_metric_decides() -> None:
    row = {
        "arguments": [["Q", " no"], ["Q", " a much longer answer"]],
        "filtered_resps": [[-2.0, False], [-6.0, False]],
    }
    assert prompt_of(row) == "Q"
    assert answer_of(row, "acc,none") == "no (log-likelihood -2.00)"
    assert answer_of(row, "acc_norm,none") == "a much longer answer (log-likelihood -6.00)"
    # A perplexity's item, and several answers to one prompt.
    assert answer_of({"filtered_resps": [-12.5]}, "word_perplexity,none") == "-12.5"
    assert answer_of({"filtered_resps": [["x", "y"]]}, "pass@2,all") == '["x", "y"]'
    other = {"arguments": [["He left", " too"], ["She left", " too"]]}
    assert prompt_of(other) == "He left\n---\nShe left"


def test_long_texts_lose_their_middle_and_half_characters_are_no_error() -> None:
    text = "a" * 5000 + "MIDDLE" + "z" * 5000
    short = shortened(text)
    assert len(short) < 6100
    assert "MIDDLE" not in short
    assert short.startswith("a" * 2000)
    assert short.endswith("z" * 4000)
    assert "[... 4,006 characters left out ...]" in short
    assert shortened("cut \ud83d") == "cut ?"


def test_a_page_holds_shared_beginnings_once_and_no_text_ends_the_script() -> None:
    examples = "Q: 1+1\nA: 2\n" * 20
    task = TaskResult(task="t", metric="acc,none", score=0.5, samples=3)
    items = tuple(
        Item(
            task="t",
            number=number,
            prompt=f"{examples}Q: {number}{HOSTILE}",
            target="x",
            teacher=HOSTILE,
            student="",
            teacher_score=1,
            student_score=0.25,
            outcome="teacher",
        )
        for number in range(3)
    )
    values = page_values(ItemSet(items=items, counts={"teacher": 3}), [task])
    assert values["tasks"] == [["t", examples]]
    assert values["items"][2] == [0, 2, 0, f"Q: 2{HOSTILE}", "x", HOSTILE, "", 1, 0.25]
    text = script_json(values)
    assert not set("<>&") & set(text)
    assert json.loads(text) == json.loads(json.dumps(values))

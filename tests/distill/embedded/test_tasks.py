"""Tasks: answers that are right, and a split whose sides share no problem."""

from __future__ import annotations

import random
import re

import pytest
from transformers import (
    PreTrainedTokenizerFast,
)

from xlstm_distill.embedded.tasks import FACTS, TASKS, draw, held_out_items, is_held_out

RECALL = tuple(name for name, task in TASKS.items() if task.table)


def solve(prompt: str) -> str | None:
    """Answer a question from its words alone, without the generators; None for facts."""
    lines = prompt.split("\n")
    if found := re.fullmatch(r"Compute (\d+)\+(\d+)\.", prompt):
        return str(int(found[1]) + int(found[2]))
    if found := re.fullmatch(r"\w+ has (\d+) \w+, (\w+) (\d)\. How many\?", prompt):
        sign = {"gets": 1, "buys": 1, "finds": 1, "loses": -1, "sells": -1, "gives": -1}[found[2]]
        return str(int(found[1]) + sign * int(found[3]))
    if prompt.startswith("Largest of"):
        return max(re.findall(r"\d+", prompt), key=int)
    if found := re.fullmatch(r"Convert (\d+) (\w+) to (\w+)\.", prompt):
        size = {
            "km": 10**6,
            "hm": 10**5,
            "m": 1000,
            "dm": 100,
            "cm": 10,
            "mm": 1,
            "kg": 10**6,
            "g": 1000,
            "mg": 1,
        }
        return str(int(found[1]) * size[found[2]] // size[found[3]])
    if found := re.fullmatch(r"(?:How many |What is in |Gift for |echo \$)(\w+)[?;]", lines[-1]):
        return (
            next(line for line in lines if re.match(rf"{found[1]}\b", line))
            .replace("=", " ")
            .split()[-1]
        )
    if prompt.startswith("print(") or "=" in lines[0]:
        printed: list[str] = []
        exec(prompt, {"print": lambda *values: printed.append(" ".join(map(str, values)))})
        return printed[0]
    if prompt.startswith(("Repeat: ", "Sort: ", "First word of: ", "Last word of: ")):
        order, words = prompt.split(": ")[0], prompt.split(": ")[1].split()
        chosen = {
            "Repeat": words,
            "Sort": sorted(words),
            "First word of": words[:1],
            "Last word of": words[-1:],
        }
        return " ".join(chosen[order])
    return None


@pytest.mark.parametrize("name", TASKS)
def test_split_sides_share_no_problem(name: str) -> None:
    rng = random.Random(0)
    trained = {draw(TASKS[name], rng, held_out=False).key for _ in range(2000)}
    held = {item.key for item in held_out_items(TASKS[name], 100)}
    assert len(held) == 100
    assert not trained & held
    assert all(is_held_out(name, key) for key in held)


def test_order_of_operands_does_not_cross_the_split() -> None:
    rng = random.Random(1)
    trained = {draw(TASKS["add"], rng, held_out=False).prompt for _ in range(20_000)}
    for item in held_out_items(TASKS["add"], 100):
        a, b = re.findall(r"\d+", item.prompt)
        assert f"Compute {b}+{a}." not in trained


def test_every_fact_keeps_three_wordings_for_training() -> None:
    rng = random.Random(0)
    trained = {draw(TASKS["fact"], rng, held_out=False).prompt for _ in range(15_000)}
    for wordings, _ in FACTS:
        assert sum(wording in trained for wording in wordings) == 3


@pytest.mark.parametrize("name", [name for name in TASKS if name != "fact"])
def test_answers_are_right_by_an_independent_solver(name: str) -> None:
    for item in held_out_items(TASKS[name], 100):
        assert solve(item.prompt) == item.answer


@pytest.mark.parametrize("name", RECALL)
def test_recall_lies_beyond_the_window(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for item in held_out_items(TASKS[name], 100):
        table, _, question = item.prompt.rpartition("\n")
        key = re.findall(r"\w+", question)[-1]
        last = re.search(rf"^{key}\b.*$", table, flags=re.MULTILINE)
        assert last
        between = tokenizer(item.prompt[last.end() : item.prompt.rindex("\n") + 1])["input_ids"]
        assert len(between) >= 40

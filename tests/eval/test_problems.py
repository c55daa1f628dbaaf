"""Lines for what pydantic refused: the path, the value, what is allowed, all problems."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from xlstm_eval.problems import (
    MOST_NAMES,
    FieldError,
    Problem,
    did_you_mean,
    dotted,
    kind_of,
    one_line,
    problem_lines,
)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Item(Strict):
    name: Annotated[str, Field(min_length=1)]
    size: Annotated[int, Field(strict=True, ge=1, lt=10)] = 1
    share: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 0.5

    @model_validator(mode="after")
    def _agree(self) -> Item:
        if self.name == "odd":
            raise FieldError("size", f"{self.size} does not fit 'odd'; give 3.")
        if self.name == "plain":
            raise ValueError("does not fit")
        return self


class Folder(Strict):
    items: Annotated[tuple[Item, ...], Field(min_length=1)]
    named: dict[str, Item] = Field(default_factory=dict)
    mode: Literal["fast", "slow"] = "fast"
    exact: Annotated[bool, Field(strict=True)] = False
    pair: Annotated[list[int], Field(max_length=2)] = Field(default_factory=list)


def refusal(data: Any) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Folder.model_validate(data)
    return caught.value


def lines(data: Any) -> list[str]:
    return problem_lines(refusal(data), Folder, whole="the folder")


ITEM = {"name": "a"}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (3, "the folder: 3 is a whole number; give a mapping."),
        ({}, "items: missing. Add it."),
        ({"items": []}, "items: empty. Give at least one."),
        ({"items": "a"}, "items: 'a' is text; give a list."),
        ({"items": [{"name": ""}]}, "items[0].name: empty. Give at least one character."),
        ({"items": [ITEM], "mod": 1}, "mod: unknown key. Did you mean 'mode'?"),
        ({"items": [ITEM | {"sise": 1}]}, "items[0].sise: unknown key. Did you mean 'size'?"),
        (
            {"items": [ITEM], "named": {"x": ITEM | {"qqq": 1}}},
            "named.x.qqq: unknown key. Allowed: name, share, size.",
        ),
        ({"items": [ITEM | {"size": 0}]}, "items[0].size: 0 must be at least 1."),
        ({"items": [ITEM | {"size": 10}]}, "items[0].size: 10 must be less than 10."),
        ({"items": [ITEM | {"size": "4"}]}, "items[0].size: '4' is text; give a whole number."),
        ({"items": [ITEM | {"share": None}]}, "items[0].share: None is nothing; give a number."),
        (
            {"items": [ITEM | {"share": float("nan")}]},
            "items[0].share: nan is not a finite number. Give one.",
        ),
        ({"items": [{"name": "odd"}]}, "items[0].size: 1 does not fit 'odd'; give 3."),
        ({"items": [{"name": "plain"}]}, "items[0]: does not fit"),
        ({"items": [ITEM], "mode": "f"}, "mode: 'f' is not allowed. Allowed: 'fast' or 'slow'."),
        ({"items": [ITEM], "exact": 1}, "exact: 1 is a whole number; give true or false."),
        ({"items": [ITEM], "pair": [1, 2, 3]}, "pair: has 3 items. Give 2."),
        (
            {"items": [ITEM], "mode": "x" * 80},
            f"mode: '{'x' * 56}... is not allowed. Allowed: 'fast' or 'slow'.",
        ),
    ],
)  # fmt: skip
def test_a_problem_is_one_line(data: Any, line: str) -> None:
    assert lines(data) == [line]


def test_all_problems_are_listed_unknown_keys_first() -> None:
    data = {"items": [{"nme": "a", "size": 0}], "mode": "fst"}
    expected = [
        "items[0].nme: unknown key. Did you mean 'name'?",
        "items[0].name: missing. Add it.",
        "items[0].size: 0 must be at least 1.",
        "mode: 'fst' is not allowed. Allowed: 'fast' or 'slow'.",
    ]
    assert lines(data) == expected
    short = one_line(refusal(data), Folder, whole="the folder")
    assert short == f"{expected[0]} (and 3 more)"


def test_the_caller_may_word_a_problem_itself() -> None:
    def special(problem: Problem) -> str | None:
        return "write 4." if problem["input"] == "4" else None

    error = refusal({"items": [ITEM | {"size": "4"}], "mode": "fst"})
    assert problem_lines(error, Folder, whole="the folder", special=special) == [
        "items[0].size: write 4.",
        "mode: 'fst' is not allowed. Allowed: 'fast' or 'slow'.",
    ]


def test_a_long_list_of_names_is_cut() -> None:
    names = [f"n{index}" for index in range(MOST_NAMES + 1)]
    assert did_you_mean("q", names[:-1]).endswith(f"{names[-2]}.")
    assert did_you_mean("q", names).endswith(f"{names[-2]} and 1 more.")


def test_paths_and_kinds() -> None:
    assert dotted(("a", 0, "b"), "c[1]") == "a[0].b.c[1]"
    assert dotted((), "c") == "c"
    assert [kind_of(value) for value in (None, True, 1, 0.5, "a", (), {}, b"")] == [
        "nothing",
        "true/false",
        "a whole number",
        "a number",
        "text",
        "a list",
        "a mapping",
        "bytes",
    ]

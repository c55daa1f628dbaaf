"""`validate`: what it shows of a good recipe, and all problems of a bad one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from xlstm_distill.cli.app import app
from xlstm_distill.cli.validate import MOST_CHARACTERS, printable

RECIPES = Path(__file__).parents[3] / "recipes"

OWN_DATA = f"""\
name: own
teacher: {{path: {RECIPES}/quickstart/teacher, dtype: float32}}
student: {{mixer: {{window: 32}}}}
data:
  context: 128
  domains:
    own:
      sources:
        - {{path: chat.jsonl}}
        - {{path: pairs.jsonl, prompt: question, response: answer}}
align: {{tokens: 4096, batch: 4}}
distill:
  batch: 4
  lr: 1.0e-3
  experts: {{own: {{phases: [{{domain: own, tokens: 2048}}]}}}}
evaluate:
  include: {RECIPES}/quickstart/tasks
  tasks: [{{name: qs_math_add}}, {{name: qs_chat_copy}}]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe over two small files; it is the working directory."""
    chat = {
        "messages": [
            {"role": "user", "content": "Compute 1+2."},
            {"role": "assistant", "content": "3"},
        ]
    }
    pair = {"question": "Compute 2+2.", "answer": "4"}
    for name, record in (("chat", chat), ("pairs", pair)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 4)
    (tmp_path / "own.yaml").write_text(OWN_DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def validate(*words: str) -> Result:
    return CliRunner().invoke(app, ["validate", "own.yaml", *words])


def overrides(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_a_good_recipe_shows_what_is_supervised(own: Path) -> None:
    before = sorted(own.rglob("*"))
    result = validate()
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "own: keys and files are valid; reading data and tasks."
    assert lines[-1] == "own: valid."
    assert "evaluate.tasks: qs_math_add, qs_chat_copy" in lines
    first, second = (
        next(
            number for number, line in enumerate(lines) if line.startswith(f"data.domains.own.{n}")
        )
        for n in ("sources[0]", "sources[1]")
    )
    assert lines[first].endswith("chat.jsonl (columns: messages)")
    assert lines[second].endswith("pairs.jsonl (columns: question as prompt, answer as response)")
    shown = lines[first + 1 : second]
    assert shown[0].startswith("  example 1: ")
    assert shown[0].endswith(" of them supervised")
    assert "Compute 1+2." in shown[1]
    assert shown[1].startswith("    context    | ")
    assert shown[2].startswith("    supervised | 3")
    assert sum("example" in line for line in shown) == 3
    assert "\x1b" not in result.stdout
    assert sorted(own.rglob("*")) == before


def test_json_holds_the_same(own: Path) -> None:
    result = validate("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["valid"], found["recipe"], found["problems"]) == (True, "own", [])
    assert found["tasks"] == ["qs_math_add", "qs_chat_copy"]
    assert found["teacher"]["family"] == "llama"
    example = found["sources"][1]["examples"][0]
    supervised = "".join(text for text, counts in example["pieces"] if counts)
    assert supervised.startswith("4")
    assert 0 < example["supervised"] < example["tokens"]


def test_problems_of_data_and_tasks_come_together(
    own: Path, errors_of: Callable[[Result, int], list[str]]
) -> None:
    tasks = "evaluate.tasks=[{name: qs_math_ad}, {name: qs_chat_copy}, {name: qs_chat_cpy}]"
    result = validate(*overrides("data.domains.own.sources[1].prompt=query", tasks))
    found = errors_of(result, 2)
    assert len(found) == 3, found
    assert "data.domains.own.sources[1]" in found[0]
    assert "qs_math_ad" in found[1]
    assert "qs_chat_cpy" in found[2]
    # What could be read is shown all the same.
    assert "    supervised | 3" in result.stdout


def test_problems_of_the_recipe_come_first(
    own: Path, errors_of: Callable[[Result, int], list[str]]
) -> None:
    words = overrides("align.lrr=1", "evaluate.include=gone", "student.mixer.window=128")
    found = errors_of(validate(*words), 2)
    assert [line.split(": ")[1] for line in found] == [
        "align.lrr",
        "evaluate.include",
        "student.mixer.window",
    ]
    as_json = validate(*words, "--json")
    assert (as_json.exit_code, as_json.stderr) == (2, "")
    answer = json.loads(as_json.stdout)
    assert [f"error: {line}" for line in answer["problems"]] == found


def test_a_folder_that_holds_no_teacher(own: Path, error_of: Callable[..., str]) -> None:
    (own / "empty").mkdir()
    line = error_of(validate(*overrides("teacher.path=empty")), 2)
    assert line.startswith("error: teacher.path: ")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("ä α 漢", "ä α 漢"),
        ("a" * MOST_CHARACTERS, "a" * MOST_CHARACTERS),
        ("a" * 200 + "b" * 200, "a" * 150 + " [... 100 characters ...] " + "b" * 150),
    ],
)
def test_pieces_are_shortened_and_cannot_control_a_terminal(text: str, shown: Any) -> None:
    assert printable(text) == shown

"""The tutorial's own commands, followed in order, with budgets small enough for a test."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from command_line import call_cli

ROOT = Path(__file__).parents[2]
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# The recipe's own budgets take about a minute on idle cores.
SMALL = (
    "align.tokens=16384", "evaluate.limit=6", "evaluate.speed.seconds=0", "data.validation_rows=4",
    "distill.experts={words: {phases: [{domain: words, tokens: 8192}]},"
    " numbers: {phases: [{domain: numbers, tokens: 8192}]}}",
)  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """The tutorial's `xlstm-distill` commands, as words."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [
        shlex.split(line, comments=True)[1:] for line in lines if line.startswith("xlstm-distill")
    ]


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Give every command of the tutorial; return the working folder and what each one printed."""
    folder: Path = tmp_path_factory.mktemp("tutorial")
    overrides = [word for value in SMALL for word in ("--set", value)]
    printed: dict[str, str] = {}
    for words in commands():
        more = overrides if words[0] == "run" else []
        done = call_cli(*words, *more, cwd=folder)
        assert done.returncode == 0, (words, done.stderr)
        printed[" ".join(words)] = done.stdout
        if words[:2] == ["recipes", "copy"]:
            folder = folder / words[3]  # the tutorial's next line is `cd work`
    return folder, printed


def test_every_step_of_the_tutorial_is_followed(followed):
    kinds = [words[0] for words in commands()]
    assert kinds == ["recipes", "recipes", "validate", "plan", "run", "status", "run"]


def test_the_report_is_there_and_names_the_tasks(followed):
    folder, printed = followed
    first = next(text for key, text in printed.items() if key.startswith("run"))
    assert "my_words" in first
    assert "my_sums" in first
    assert (folder / "out" / "report" / "report.html").is_file()


def test_another_weight_makes_only_the_merge_and_what_rests_on_it_again(followed):
    _, printed = followed
    again = [text for key, text in printed.items() if "merge.weights" in key]
    (said,) = re.findall(r"merge is made again: (.*)", again[0])
    changed, kept = said.rsplit("; ", 1)
    assert changed == "merge.weights.words 0.5 -> 0.7; merge.weights.numbers 0.5 -> 0.3"
    assert kept.startswith("the earlier one (")
    assert changed in TUTORIAL
    assert re.search(r"distill +already done", again[0])


def test_status_lists_the_run(followed):
    _, printed = followed
    (status,) = (text for key, text in printed.items() if key.startswith("status"))
    assert re.search(r"merge +done", status)


def test_the_python_of_the_tutorial_runs(followed, monkeypatch, capsys):
    folder, _ = followed
    (code,) = blocks("python")
    monkeypatch.chdir(folder)
    exec(compile(code, "tutorial.md", "exec"), {})
    # With so small a budget the answer may be wrong, but the student generates one.
    assert capsys.readouterr().out.strip()

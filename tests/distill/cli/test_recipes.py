"""`recipes` and `recipes copy`: the list, what a copy holds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Call = Callable[..., Result]
ErrorOf = Callable[[Result, int], str]


def test_the_list_names_teacher_and_purpose(call: Call) -> None:
    result = call("recipes")
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if "llama3.1-8b " in line)
    assert "meta-llama/Llama-3.1-8B " in row
    assert "Llama-3.1-8B (base): one student, no merge." in row


def test_the_list_as_json(call: Call, root: Path) -> None:
    rows = json.loads(call("recipes", "--json").stdout)
    assert [row["name"] for row in rows] == sorted(
        path.stem for path in (root / "recipes").glob("*.yaml")
    )
    assert all(row["teacher"] and row["summary"] for row in rows)


def test_a_copy_is_complete_and_says_how_to_run_it(call: Call, small: Path) -> None:
    result = call("recipes", "copy", "quickstart", "mine")
    assert result.exit_code == 0, result.output
    assert "xlstm-distill run mine/quickstart.yaml" in result.stdout
    assert (small / "mine" / "quickstart" / "teacher" / "model.safetensors").is_file()


def test_a_wrong_name_suggests_the_closest(call: Call, small: Path, error_of: ErrorOf) -> None:
    line = error_of(call("recipes", "copy", "quickstrat", "mine"), 2)
    assert line == "error: 'quickstrat' is not a shipped recipe. Did you mean 'quickstart'?"
    assert not (small / "mine").exists()


def test_a_second_copy_is_refused(call: Call, error_of: ErrorOf) -> None:
    call("recipes", "copy", "quickstart", "mine")
    line = error_of(call("recipes", "copy", "quickstart", "mine"), 2)
    assert line.startswith("error: mine/quickstart.yaml: exists and is not overwritten")

"""The `plan` command: its text, its JSON, its exit codes and the options it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from xlstm_distill.cli.app import app
from xlstm_distill.planning.inputs import SHARDINGS
from xlstm_distill.planning.machine import GPUS

ROOT = Path(__file__).parents[3]


def call(*arguments: str) -> Any:
    return CliRunner().invoke(
        app, ["plan", str(ROOT / "recipes" / "llama3.1-8b-instruct.yaml"), *arguments]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h100"], "--gpu: 'h100' is not in the table. Did you mean 'h100-80gb'?"),
        (["--gpu-memory", "0"], "--gpu-memory: 0 must be a number of GB above 0"),
        (["--gpus", "0"], "--gpus: 0 must be at least 1"),
        (["--sharding", "fsdp"], "--sharding: 'fsdp' is not allowed. Allowed: none, ddp, fsdp2"),
        (["--sharding", "none"], "--sharding: 'none' is for one GPU, --gpus is 8"),
        (["--backend", "cuda"], "--backend: 'cuda' is not allowed"),
        (["--mfu", "40"], "--mfu: 40 must be above 0 and at most 1"),
        (["--price", "-1"], "--price: -1 must be a number of at least 0"),
        (["--run", "nowhere"], "--run: nowhere is no directory"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_names_every_gpu_and_sharding() -> None:
    text = " ".join(
        CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "300"}).stdout.split()
    )
    assert all(name in text for name in (*GPUS, *SHARDINGS))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_text_fits_in_100_columns(backend: str) -> None:
    options = [
        "--price",
        "2.5",
        "--backend",
        backend,
        "--gpu",
        "a100-40gb",
        "--set",
        "capture.targets=stored",
        "--set",
        "evaluate.batch=64",
    ]
    lines = call(*options).stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("distill/math") for line in lines)
    assert "As it stands, this does not run:" in lines


def test_a_plan_that_does_not_fit_exits_with_1_and_its_options_make_it_fit() -> None:
    options = ["--gpus", "6", "--set", "distill.activation_checkpointing=false"]
    crowded = call(*options)
    assert crowded.exit_code == 1
    printed = crowded.stdout.partition("Every stage fits with:")[2].split()
    assert "--set" in printed
    fitting = call(*options, *printed)
    assert fitting.exit_code == 0
    assert "Every stage fits.\n" in fitting.stdout


def test_a_gpu_that_is_not_in_the_table_is_given_by_its_memory() -> None:
    small = call("--gpus", "1", "--gpu-memory", "8")
    assert small.exit_code == 1
    assert "GPU of 8 GB" in small.stdout
    assert "No change of settings that was tried makes every stage fit." in small.stdout
    assert "Hours are not known: name a GPU with --gpu" in small.stdout


def test_json_holds_every_number_and_only_finite_ones() -> None:
    crowded = ("--set", "distill.activation_checkpointing=false")
    plan = json.loads(call("--json", "--price", "2", *crowded).stdout)

    def numbers(value: Any) -> Iterator[float]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from numbers(item)
        elif isinstance(value, int | float):
            yield value

    assert all(math.isfinite(number) for number in numbers(plan))
    assert plan["fits"] is False
    assert json.loads(call("--json").stdout)["fits"] is True
    assert plan["total"]["gpu_hours"] == pytest.approx(
        sum(s["gpu_hours"] or 0 for s in plan["stages"])
    )
    distill = next(stage for stage in plan["stages"] if stage["stage"] == "distill")
    memory = distill["memory_per_gpu"]
    assert memory["total"] == pytest.approx(
        sum(value for part, value in memory.items() if part != "total")
    )

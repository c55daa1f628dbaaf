"""The table of merges reads finished runs, pairs their seeds, refuses what does not compare."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlstm_distill.artifacts import Draft, Request, Run
from xlstm_distill.benchmarks import merges
from xlstm_distill.recipe import load_recipe
from xlstm_distill.stages.outline import Outline

ITEMS = 100
TASKS = {"qs_math_add": "math", "qs_code_sorted": "code"}
RIGHT = {"teacher": (90, 80), "merged": (60, 60), "ties": (70, 60), "tuned": (66, 68)}
EXPERTS = {"math": (72, 10), "code": (20, 76), "stem": (0, 0), "chat": (1, 2)}
WEIGHTS = {"math": 0.5, "code": 0.3, "stem": 0.1, "chat": 0.1}


def scored(counts: tuple[int, int]) -> tuple[list[Any], dict[str, list[int]]]:
    """Results and items of a model that has the first items of each task right."""
    results, items = [], {}
    for (task, domain), right in zip(TASKS.items(), counts, strict=True):
        score = {"task": task, "metric": "acc,none", "samples": ITEMS, "domain": domain}
        results.append(score | {"score": right / ITEMS, "correct": right})
        items[task] = [1] * right + [0] * (ITEMS - right)
    return results, items


def finished_run(
    folder: Path,
    root: Path,
    right: Mapping[str, tuple[int, int]],
    *overrides: str,
    aligned: str = "weights",
) -> Path:
    """Publish what the table reads of a finished run: aligned student, merges, evaluations."""
    tasks = ", ".join(f"{{name: {task}, domain: {own}}}" for task, own in TASKS.items())
    recipe = load_recipe(
        root / "recipes" / "quickstart.yaml",
        [f"evaluate.tasks=[{tasks}]", *overrides],
    )
    run, outline = Run.open(folder, recipe), Outline(recipe)
    run.keep_recipe()
    made: dict[str, str] = {}

    def publish(label: str) -> None:
        stage, _, name = label.partition("/")

        def build(draft: Draft) -> None:
            if stage == "align":
                (draft.path / "model").mkdir()
                (draft.path / "model" / "model.safetensors").write_text(aligned)
            elif stage == "variant":
                draft.results["weights"] = WEIGHTS
            else:
                results, items = scored(right[name])
                draft.write_json("results.json", results)
                (draft.path / "items.json").write_text(json.dumps(items))
                draft.results |= {"requests_hash": "h", "protocol": {"seed": recipe.seed}}

        inputs = {need: made.get(need, "x") for need in outline.needs(label)}
        artifact = run.make(Request(stage, outline.settings(label), inputs, name or None), build)
        made[label] = artifact.identity

    publish("align")
    for name in recipe.merge.variants:
        publish(f"variant/{name}")
    for name in right:
        publish(f"evaluate/{name}")
    return folder


VARIANTS = "merge.variants={ties: {method: ties, density: .2}, tuned: {weights: tuned}}"
GENERALIST = (
    "distill.experts={generalist: {phases: [{domains: {math: 1, code: 1}, tokens: 800000}]}}"
)


@pytest.fixture
def runs(tmp_path: Path, root: Path) -> list[Path]:
    """Two seeds: the second has the uniform merge five items better on both tasks."""
    found = []
    for seed, better in ((0, 0), (1, 5)):
        right = RIGHT | EXPERTS | {"merged": (60 + better, 60 + better)}
        found.append(finished_run(tmp_path / f"s{seed}", root, right, f"seed={seed}", VARIANTS))
    own = {"teacher": (90, 80), "merged": (63, 64), "generalist": (63, 64)}
    found.append(finished_run(tmp_path / "g0", root, own, GENERALIST, "merge.variants={}"))
    return found


def cells(text: str, title: str, method: str) -> list[str]:
    part = text.split(f"**{title}**")[1].split("**")[0]
    (line,) = re.findall(rf"^\| {method} \|.*$", part, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_methods_stand_side_by_side_over_seeds(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert merges.main([str(run) for run in runs]) == 0
    text = capsys.readouterr().out
    title = "Recovery, % of the teacher's score"
    recovery = {
        method: [cell.split()[0] for cell in cells(text, title, method)]
        for method in ("best expert per domain", "uniform", "ties", "generalist")
    }
    # Each task's own expert: 72 of 90 and 76 of 80.
    assert recovery["best expert per domain"] == ["2", "80.0", "95.0", "87.5"]
    # Means over seeds of 60 and 65, of 90 and of 80.
    assert recovery["uniform"] == ["2", "69.4", "78.1", "73.8"]
    assert recovery["generalist"] == ["1", "70.0", "80.0", "75.0"]
    metric = cells(text, "The paper's metric, means over seeds", "ties")
    assert [cell.split()[0] for cell in metric] == ["0.00", "0.00", "0.22", "0.25", "0.25"]
    gain = cells(text, "Difference from the uniform merge, points", "ties")
    assert [cell.split()[0] for cell in gain[:3]] == ["+8.3", "-3.1", "+2.6"]
    # The seeds differ by 5 items: with two of them that is nearly all of the interval.
    low, high = (float(end) for end in re.findall(r"[-+][\d.]+", gain[0])[1:])
    spread = 12.706 * np.std([70 - 60, 70 - 65], ddof=1) / 0.9 / np.sqrt(2)
    assert low == pytest.approx(8.33 - spread, abs=1.5)
    assert high == pytest.approx(8.33 + spread, abs=1.5)
    # The generalist has seed 0 alone, and is compared with the uniform merge of seed 0.
    single = cells(text, "Difference from the uniform merge, points", "generalist")
    assert [cell.split()[0] for cell in single[:3]] == ["+3.3", "+5.0", "+4.2"]
    assert "| tuned | 1 | 0.50 | 0.30 | 0.10 | 0.10 |" in text


def test_what_does_not_compare_is_refused(
    runs: list[Path], tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*folders: Path) -> str:
        assert merges.main([str(folder) for folder in folders]) == 2
        return capsys.readouterr().err

    own = {"teacher": (90, 80), "merged": (63, 64), "generalist": (63, 64)}
    settings = (GENERALIST, "merge.variants={}")
    other = finished_run(tmp_path / "g", root, own, *settings, aligned="other")
    assert "its aligned student is not that of s0, of the same seed" in refusal(runs[0], other)
    other = finished_run(tmp_path / "t", root, own | {"teacher": (80, 90)}, *settings, "seed=1")
    assert "t: its teacher answered otherwise than that of s0" in refusal(runs[0], other)
    assert "generalist of seed 0 is there twice" in refusal(runs[2], runs[2])
    changed = (runs[1] / "recipe.yaml").read_text().replace("limit: 50", "limit: 60")
    (runs[1] / "recipe.yaml").write_text(changed)
    assert "s1: evaluate/teacher is outdated" in refusal(*runs)
    (tmp_path / "empty").mkdir()
    assert "empty: no recipe there" in refusal(tmp_path / "empty")

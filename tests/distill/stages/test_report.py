"""The stage report: only what the evaluated models were made from is counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.recipe import Recipe, load_recipe
from xlstm_distill.stages.report import ancestry, report_data, show
from xlstm_distill.training.log import LOG_FILE
from xlstm_eval.report import render


@pytest.fixture
def recipe(root: Path) -> Recipe:
    return load_recipe(root / "recipes" / "quickstart.yaml")


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> Run:
    return Run.open(tmp_path, recipe)


def made(run: Run, label: str, *built_on: Artifact, seed: int = 0) -> Artifact:
    """Publish an artifact with a log that is built on others."""
    stage, _, name = label.partition("/")
    inputs = {}
    for artifact in built_on:
        of, key = (
            artifact.manifest["stage"],
            artifact.manifest["name"] or (name if label != "report" else None),
        )
        inputs[of if of == "align" else f"{of}/{key}"] = artifact.fingerprint
    log = json.dumps({"step": 1, "relative_error": 0.5, "ce": 1.0, "kl": 0.1}) + "\n"
    score = {"task": "add", "metric": "acc,none", "score": 0.5, "samples": 10, "domain": "math"}
    request = Request(stage, {"seed": seed}, {"teacher": "t", **inputs}, name or None)

    def build(draft: Draft) -> None:
        (draft.path / LOG_FILE).write_text(log)
        draft.write_json("results.json", [score])
        draft.write_json("gates.json", [])
        draft.results["requests_hash"] = "the same for all"

    return run.make(request, build)


def pipeline(run: Run) -> dict[str, Artifact]:
    """A run of two experts, with leftovers: a removed expert, its data, and an earlier report."""
    math, chat, old = (made(run, f"data/{name}") for name in ("math", "chat", "old"))
    targets = [made(run, "capture/math", math), made(run, "capture/chat", chat)]
    made(run, "capture/old", old)
    aligned = made(run, "align", math, chat)
    experts = [
        made(run, f"distill/{n}", aligned, t)
        for n, t in zip(("math", "chat"), targets, strict=True)
    ]
    removed = made(run, "distill/old", aligned, old)
    merged = made(run, "merge", *experts)
    made(run, "evaluate/old", removed)
    made(run, "report", merged)
    return {
        "teacher": made(run, "evaluate/teacher"),
        "merged": made(run, "evaluate/merged", merged, math, chat),
        "math": made(run, "evaluate/math", experts[0], math, chat),
        "chat": made(run, "evaluate/chat", experts[1], math, chat),
    }


def test_times_are_those_of_what_the_report_rests_on_in_the_stages_order(
    run: Run, recipe: Recipe
) -> None:
    assert list(report_data(recipe, run, pipeline(run)).timings) == [
        "data/math", "data/chat", "capture/math", "capture/chat", "align",
        "distill/math", "distill/chat", "merge",
        "evaluate/teacher", "evaluate/merged", "evaluate/math", "evaluate/chat",
    ]  # fmt: skip


def test_what_was_made_anew_from_other_settings_is_not_counted(run: Run, recipe: Recipe) -> None:
    evaluated = pipeline(run)
    made(run, "capture/math", seed=1)
    made(run, "align", seed=1)
    sources = ancestry(run, evaluated)
    assert not {"capture/math", "align"} & set(sources)
    assert {"capture/chat", "data/math", "merge"} <= set(sources)
    data = report_data(recipe, run, evaluated)
    assert list(data.losses) == ["distill/math", "distill/chat"]
    assert set(data.timings) == set(sources)


def test_no_path_of_this_machine_is_shown(run: Run, recipe: Recipe, root: Path) -> None:
    data = report_data(recipe, run, pipeline(run))
    assert (data.teacher, data.provenance["teacher"]) == (
        "quickstart/teacher",
        "quickstart/teacher",
    )
    for name, text in render(data).items():
        assert str(root) not in text, name
        assert str(run.directory) not in text, name
        # In HTML a slash ends a tag: "</p>". Nowhere else may one begin a word.
        assert not re.findall(r"[\s\"'`>:]/[\w.-]+/[\w./-]+", text), name


def test_the_report_that_was_made_is_the_one_that_is_shown(tmp_path: Path) -> None:
    """Also where a process died between making and showing it, or in the middle of copying."""
    made, target, marks = tmp_path / "made", tmp_path / "report", tmp_path / ".locks"
    marks.mkdir()
    made.mkdir()
    for name in ("report.html", "report.json"):
        (made / name).write_text(f"new {name}")
    half = tmp_path / ".report.0123456789ab.partial"
    half.mkdir()
    show(made, target, marks)
    assert not half.exists()
    before = target.stat().st_ino
    show(made, target, marks)
    assert target.stat().st_ino == before  # it was there
    (made / "report.html").write_text("newer")
    show(made, target, marks)
    assert (target / "report.html").read_text() == "newer"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".locks", "made", "report"]

"""Tuned weights: the better expert is found, the same every time, on training problems alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from processes import ROOT, run_python
from stopping import StoppingConsole

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages.merge import merge
from xlstm_distill.stages.status.reading import read_status
from xlstm_distill.stages.weights.tuning import JOURNAL, Journal
from xlstm_distill.stages.weights.validation import check_held_out
from xlstm_eval.records import TaskResult

pytest.importorskip("optuna")
TUNED = {"weights": "tuned", "tuning": {"trials": 4, "items": 6}}


@pytest.fixture(scope="module")
def tuned(found_run):
    """The same search twice, the second of which is stopped after two trials and started again."""
    lineage, run = found_run({**TUNED, "variants": {"again": TUNED}})
    run.keep_recipe()
    two = shutil.copytree(run.directory, run.directory.with_name("two"))
    saved = yaml.safe_load((two / "recipe.yaml").read_text())
    saved["merge"]["variants"] = {}  # one search there is enough
    (two / "recipe.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    with pytest.raises(KeyboardInterrupt):
        merge(lineage, run, StoppingConsole("variant/again (tuning)"))
    (stopped,) = [s for s in read_status(run.directory, lineage) if s.label == "variant/again"]
    assert (stopped.state, stopped.step, stopped.steps) == ("stopped", 2, 4)
    journal = run.work_directory(lineage.request("variant/again")) / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    # A kill may tear the line that is being written: here a third trial's.
    journal.write_bytes(b"".join(lines) + lines[-1][:40])
    whole, resumed = merge(lineage, run, QuietConsole())
    return whole, resumed, len(lines), two


@pytest.mark.slow
def test_the_better_expert_is_found(tuned):
    """No item of the evaluation is read: the recipe's tasks name files that are not there."""
    whole, _, _, _ = tuned
    results = whole.manifest["results"]
    assert results["weights"] == {"good": 1.0, "broken": 0.0}
    # Not 0: some problems are longer than the window.
    assert results["tuning"]["worst_tolerance"] < results["tuning"]["uniform"]["worst_tolerance"]
    assert (results["tuning"]["trials"], results["tuning"]["seed"]) == (4, 3)
    assert results["backend"] == "torch"  # without a GPU
    trials = whole.read_json("trials.json")
    assert trials[0]["weights"] == [[0.5, 0.5]]
    assert all(sum(group) == pytest.approx(1) for t in trials for group in t["weights"])


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_and_finds_the_same(tuned):
    whole, resumed, lines, _ = tuned
    assert lines == 1 + 1 + 2  # what it is made from, the teacher and two merges
    assert resumed.read_json("trials.json") == whole.read_json("trials.json")
    assert resumed.manifest["results"] == whole.manifest["results"]


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_find_what_one_finds(tuned):
    """They share the validation items, and write the same trials and the same student."""
    whole, _, _, copy = tuned
    done = run_python(ROOT / "tests" / "helpers" / "merge_processes.py", copy, 2)
    assert done.returncode == 0, done.stderr
    merged = copy / "artifacts" / "merge"
    assert json.loads((merged / "trials.json").read_text()) == whole.read_json("trials.json")
    weights = Path("model") / "model.safetensors"
    assert (merged / weights).read_bytes() == (whole.path / weights).read_bytes()


def result(score):
    """The results of a merge on one task, as the journal keeps them."""
    items = [float(n < 10 * score) for n in range(10)]
    return [
        TaskResult(task="a", metric="acc", score=score, samples=10, items=items).model_dump(
            mode="json"
        )
    ]


def test_scores_of_other_settings_are_laid_aside_and_damaged_ones_made_again(tmp_path):
    said = []
    path = tmp_path / "trials.jsonl"

    def opened(made_from="one"):
        said.clear()
        return Journal(path, made_from, said.append)

    first = opened()
    first.add("teacher", result(0.5))
    first.add("[[1.0, 0.0]]", result(0.2))
    first.add("[[0.0, 1.0]]", result(0.4))
    assert opened().found == first.found
    assert said == ["goes on with 2 merges that were scored before"]
    # Torn at the end, and damaged in the middle: a number, a whole line, a result of another shape.
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    path.write_bytes(good + lines[-1][:40])
    assert opened().found == first.found
    assert "1 of its lines cannot be read" in said[0]
    assert path.read_bytes() == good
    for damage in (b"\xff\n", b"{}\n", b"[]\n", lines[2].replace(b'"score": 0.2', b'"score": "x"')):
        path.write_bytes(b"".join((*lines[:2], damage, lines[3])))
        assert list(opened().found) == ["teacher", "[[0.0, 1.0]]"]
        assert "1 of its lines cannot be read; those merges are scored again" in said[0]
    # Other settings, a journal of before, and one whose first line is torn.
    for content in (good.replace(b'"one"', b'"two"', 1), b"".join(lines[1:]), lines[0][:-1]):
        path.write_bytes(content)
        assert opened().found == {}
        assert "the search begins anew" in said[0]
        (aside,) = tmp_path.glob("*.old")
        assert aside.name in said[0]
        assert aside.read_bytes() == content
        aside.unlink()
        assert path.read_bytes() == lines[0]


def test_validation_tasks_that_read_the_evaluation_s_items_are_refused(found_run, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps({"prompt": "1+1", "answer": "2"}) + "\n")
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "1+2", "answer": "3"}) + "\n")
    for name, file in (("qs_math_add", "items"), ("renamed", "items"), ("mine", "other")):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{file}.jsonl"}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "exact_match"}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))

    def check(task: str) -> None:
        tuning = {"tasks": [{"name": task}], "include": str(tmp_path)}
        merged = {"weights": "tuned", "tuning": tuning}
        lineage, _ = found_run(merged, experts=("good",), include=tmp_path)
        check_held_out(lineage.recipe, lineage.recipe.merge.tuning, "merge")

    check("mine")
    with pytest.raises(UserError, match=r"merge\.tuning\.tasks: 'renamed' reads the same items"):
        check("renamed")

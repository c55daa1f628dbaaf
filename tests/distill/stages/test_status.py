"""The status of a run, read while another process writes it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from xlstm_distill.artifacts import Run
from xlstm_distill.artifacts.locks import exclusive, training_lock, working
from xlstm_distill.cli.app import app
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import load_recipe
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.status.reading import read_status


@pytest.fixture
def run(tmp_path):
    """A run with one artifact and one training at step 4 of 10."""
    done = tmp_path / "artifacts" / "data" / "math"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text(json.dumps({"wall_seconds": 61.5}))
    partial = tmp_path / "artifacts" / ".align.1.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{")
    training = tmp_path / "training" / "distill-math-0123"
    (training / "step-00000003").mkdir(parents=True)
    header = {"label": "distill/math", "steps": 10, "tokens_per_step": 100, "first_step": 0}
    (training / "training.json").write_text(json.dumps(header))
    lines = [
        json.dumps({"step": n, "loss": 1.0 / (n + 1), "tokens_per_second": 50.0}) for n in range(4)
    ]
    (training / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    return tmp_path


def test_done_and_running(run):
    data, expert = read_status(run)
    assert (data.label, data.state, data.seconds) == ("data/math", "done", 61.5)
    assert (expert.label, expert.state, expert.step, expert.steps) == (
        "distill/math",
        "running",
        4,
        10,
    )
    assert expert.seconds_left == pytest.approx(12.0)
    assert expert.checkpoint == 3
    assert expert.figures == {"loss": 0.25}


def test_silence_means_stopped(run):
    log = run / "training" / "distill-math-0123" / "log.jsonl"
    os.utime(log, (time.time() - 600, time.time() - 600))
    stage = read_status(run)[1]
    assert stage.state == "stopped"
    assert stage.seconds_left is None
    text = CliRunner().invoke(app, ["status", str(run)]).output
    # Importing what `status` needs may take seconds.
    assert re.search(r"stopped 10:\d\d ago at checkpoint 3", text)
    assert "4 of 10" in text


def test_as_json_and_wrong_directory(run, tmp_path):
    found = json.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).output)
    assert [stage["label"] for stage in found["stages"]] == ["data/math", "distill/math"]
    with pytest.raises(UserError, match="is no run directory"):
        read_status(tmp_path / "nothing")


def held(run):
    """Hold the lock of the run's training."""
    work = run / "training" / "distill-math-0123"
    return exclusive(training_lock(run, work), "distill/math", print)


HEADER = {"label": "distill/math", "steps": 10, "tokens_per_step": 100, "first_step": 0}


def write_header(run, **facts):
    (run / "training" / "distill-math-0123" / "training.json").write_text(
        json.dumps(HEADER | facts)
    )


def age(run, seconds):
    for path in (run / "training" / "distill-math-0123").glob("*.json*"):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_a_search_of_merge_weights_shows_its_trials(run):
    """While a process is at it, and after that died; no longer once the merge is there."""
    work = run / "training" / "merge-0123456789ab"
    work.mkdir(parents=True)
    (work / "search.json").write_text('{"label": "merge", "step": 3, "steps": 32}\n')
    found = {status.label: status for status in read_status(run)}["merge"]
    assert (found.state, found.step, found.steps, found.checkpoint) == ("stopped", 3, 32, 3)
    with working(run / ".locks", "merge"):
        found = {status.label: status for status in read_status(run)}["merge"]
    assert (found.state, found.step, found.steps) == ("running", 3, 32)
    (work / "search.json").write_text('{"label": "merge", "step": "x"}')
    assert {status.label: status for status in read_status(run)}[work.name].state == "unreadable"


def test_a_training_that_holds_its_lock_runs_however_long_it_is_silent(run):
    age(run, 600)
    with held(run):
        stage = read_status(run)[1]
        assert (stage.state, stage.seconds_left) == ("silent", pytest.approx(12.0))
        assert "running, silent for 10:00" in CliRunner().invoke(app, ["status", str(run)]).output
    write_header(run, host=platform.node(), pid=os.getpid())
    age(run, 0)
    assert read_status(run)[1].state == "stopped"  # at once: nobody holds the lock


def test_a_free_lock_says_nothing_about_another_machine(run):
    with held(run):
        pass
    write_header(run, host="elsewhere", pid=1)
    assert read_status(run)[1].state == "running"
    age(run, 600)
    assert read_status(run)[1].state == "stopped"


def test_where_there_are_no_locks_silence_decides(run, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    with held(run):
        monkeypatch.setattr("fcntl.flock", refuse)
        assert read_status(run)[1].state == "running"
        age(run, 600)
        assert read_status(run)[1].state == "stopped"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"label": "distill/math", "steps": null}']
)
def test_what_cannot_be_read_is_a_row(run, content):
    for path in ("training/distill-math-0123/training.json", "artifacts/data/math/manifest.json"):
        (run / path).write_text(content)
    stages = read_status(run)
    assert [(stage.state, stage.path) for stage in stages] == [
        ("unreadable", "artifacts/data/math/manifest.json"),
        ("unreadable", "training/distill-math-0123/training.json"),
    ]
    result = CliRunner().invoke(app, ["status", str(run)])
    assert result.exit_code == 0
    assert "unreadable: training/distill-math-0123/training.json" in result.output


def test_strange_names_and_damaged_lines_are_passed_over(run):
    training = run / "training" / "distill-math-0123"
    (training / "step-abc").mkdir()
    with (training / "log.jsonl").open("a") as log:
        log.write("\n[1]\n")
    stage = read_status(run)[1]
    assert (stage.state, stage.step, stage.checkpoint) == ("running", 4, 3)


def test_an_older_recipe_s_training_goes_when_the_artifact_is_published(run):
    age(run, 600)
    assert [stage.label for stage in read_status(run)] == ["data/math", "distill/math"]
    done = run / "artifacts" / "distill" / "math"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text(json.dumps({"wall_seconds": 1.0}))
    assert [(stage.label, stage.state) for stage in read_status(run)] == [
        ("data/math", "done"),
        ("distill/math", "done"),
    ]
    with held(run):  # started anew
        assert [stage.state for stage in read_status(run)] == ["done", "silent"]


# --- against the saved recipe


@pytest.fixture
def finished(tmp_path, root):
    """A run of the quickstart's recipe in which every artifact is published, without its files."""
    recipe = load_recipe(root / "recipes" / "quickstart.yaml")
    run = Run.open(tmp_path / "run", recipe)
    run.keep_recipe()
    lineage = Lineage(recipe)
    for label in lineage.labels():
        run.make(lineage.request(label), lambda draft: None)
    return run.directory


def with_recipe(run, root, *overrides):
    """Save another recipe in a run, as a command with these overrides does."""
    recipe = load_recipe(root / "recipes" / "quickstart.yaml", overrides)
    Run.open(run, recipe).keep_recipe()
    return {stage.label: stage for stage in read_status(run)}


def test_a_finished_run_is_done_in_the_stages_order(finished, root):
    stages = with_recipe(finished, root)
    assert {stage.state for stage in stages.values()} == {"done"}
    recipe = load_recipe(root / "recipes" / "quickstart.yaml")
    assert list(stages) == Lineage(recipe).labels()


def test_what_other_settings_made_is_outdated_and_so_is_what_rests_on_it(finished, root):
    stages = with_recipe(finished, root, "align.lr=0.01")
    assert (stages["align"].state, stages["align"].why) == ("outdated", "align.lr 0.02 -> 0.01")
    assert (stages["merge"].state, stages["distill/math"].why) == ("outdated", "align is outdated")
    assert stages["data/math"].state == stages["capture/math"].state == "done"
    assert stages["evaluate/teacher"].state == "done"
    text = CliRunner().invoke(app, ["status", str(finished)]).output
    assert "outdated: align.lr 0.02 -> 0.01" in text


@pytest.mark.parametrize(
    ("override", "label", "why"),
    [
        ("data.context=128", "data/math", "data.context 384 -> 128"),
        (
            "data.domains.math.sources[0].documents=20_000",
            "data/math",
            "data.domains.math.sources[0].documents 30000 -> 20000",
        ),
        ("capture.top_k=32", "capture/chat", "capture.top_k 64 -> 32"),
        ("student.mixer.sinks=2", "align", "student.mixer.sinks 4 -> 2"),
        ("evaluate.limit=5", "evaluate/teacher", "evaluate.limit 50 -> 5"),
        ("report.title=New", "report", "report.title Quickstart -> New"),
    ],
)
def test_each_stage_names_its_own_key(finished, root, override, label, why):
    stage = with_recipe(finished, root, override)[label]
    assert stage.state == "outdated"
    assert stage.why.split("; ")[0] == why


def test_more_rows_than_are_needed_are_not_outdated(finished, root):
    key = "distill.experts.math.phases[0].tokens"
    stages = with_recipe(finished, root, f"{key}=100_000")
    assert stages["data/math"].state == "done"
    assert stages["distill/math"].why == f"{key} 200000 -> 100000"


def test_what_is_not_there_is_waiting_and_what_no_recipe_names_says_so(finished, root):
    shutil.rmtree(finished / "artifacts" / "merge")
    override = "distill.experts={math: {phases: [{domain: math, tokens: 200_000}]}}"
    stages = with_recipe(finished, root, override)
    assert stages["merge"].state == "waiting"
    assert stages["distill/math"].state == "done"
    assert (stages["distill/code"].state, stages["distill/code"].why) == (
        "done",
        "not in the recipe",
    )


def test_an_input_that_was_made_again_makes_what_used_it_outdated(finished, root):
    manifest = finished / "artifacts" / "align" / "manifest.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"identity": "other"}))
    stages = with_recipe(finished, root)
    assert stages["distill/stem"].why == "align was made again"
    assert stages["evaluate/merged"].why == "merge is outdated"


@pytest.mark.parametrize("label", ["data/math", "capture/math", "evaluate/merged", "merge"])
def test_what_a_process_is_at_is_running(finished, root, label):
    with working(finished / ".locks", label):
        stage = with_recipe(finished, root)[label]
        assert (stage.state, stage.host) == ("running", None)
    assert with_recipe(finished, root)[label].state == "done"


def test_a_mark_of_a_dead_process_says_nothing(finished, root):
    mark = finished / ".locks" / "working-merge-0123456789ab.json"
    mark.parent.mkdir(exist_ok=True)
    facts = {"label": "merge", "host": platform.node(), "pid": 1, "started": time.time()}
    # Killed before it locked the mark, or in the middle of writing it.
    for written in (json.dumps(facts), json.dumps(facts)[:20], ""):
        mark.write_text(written)
        stages = with_recipe(finished, root)
        assert stages["merge"].state == "done"
        assert not [label for label in stages if label.startswith("working")]
    mark.write_text(json.dumps(facts | {"host": "elsewhere"}))
    os.utime(mark, (time.time() - 600, time.time() - 600))
    stage = with_recipe(finished, root)["merge"]
    assert (stage.state, stage.host) == ("running", "elsewhere")
    with working(finished / ".locks", "merge"):  # the next process removes what nobody holds
        assert not mark.exists()


def test_a_recipe_that_cannot_be_read_leaves_the_rest(finished):
    (finished / "recipe.yaml").write_text("name: [")
    first, *rest = read_status(finished)
    assert (first.state, first.path) == ("unreadable", "recipe.yaml")
    assert {stage.state for stage in rest} == {"done"}


def test_status_loads_no_torch(finished):
    code = (
        "import sys; from pathlib import Path\n"
        "from xlstm_distill.stages.status.reading import read_status\n"
        "from xlstm_distill.stages.status.table import to_json\n"
        f"to_json(read_status(Path({str(finished)!r})))\n"
        "sys.exit(', '.join({'torch', 'transformers', 'pyarrow'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("override", "label", "why"),
    [
        (
            "data.domains.extra.sources=[{generator: math, documents: 100}]",
            "align",
            "data/extra is new",
        ),
        (
            "distill.experts={math: {phases: [{domain: math, tokens: 200_000}]}}",
            "merge",
            "merge.weights",
        ),
        ("teacher.dtype=bfloat16", "align", "teacher.dtype float32 -> bfloat16"),
        ("teacher.dtype=bfloat16", "capture/math", "teacher.dtype float32 -> bfloat16"),
        ("data.validation_rows=8", "align", "data/math changed: data.validation_rows 16 -> 8"),
        ("data.validation_rows=8", "evaluate/merged", "merge is outdated"),
    ],
)
def test_what_a_run_would_make_again_is_outdated(finished, root, override, label, why):
    stage = with_recipe(finished, root, override)[label]
    assert stage.state == "outdated"
    assert why in stage.why


@pytest.mark.parametrize(
    "override",
    [
        "align.lr=0.01",
        "align.tokens=3_000_000",
        "teacher.dtype=bfloat16",
        "data.validation_rows=8",
        "data.domains.extra.sources=[{generator: math, documents: 100}]",
        "distill.experts.math.phases[0].tokens=100_000",
        "distill.experts.math.phases[0].tokens=20_000_000",
        "distill.experts.math.phases[0].domain=code",
        "capture.top_k=32",
        "merge.weights={math: 0.4, code: 0.2, stem: 0.2, chat: 0.2}",
        "evaluate.limit=5",
        "align.micro_batch=2",
    ],
)
def test_status_says_outdated_exactly_where_the_fingerprint_is_another(finished, root, override):
    recipe = load_recipe(root / "recipes" / "quickstart.yaml", [override])
    run, lineage = Run.open(finished, recipe), Lineage(recipe)
    truth = set()
    for label in lineage.labels():
        published = run.load(label)
        if published is not None and lineage.request(label).changes_since(published):
            truth.add(label)
    told = with_recipe(finished, root, override)
    # More rows than are needed stay: their request is another, and nothing is made again.
    enough = {label for label in truth if label.startswith("data/") and told[label].state == "done"}
    for label in enough:
        rows = run.load(label).manifest["recipe"]["rows"]
        assert rows >= lineage.settings(label)["rows"]
    assert {label for label, stage in told.items() if stage.state == "outdated"} == truth - enough


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("artifacts/align/manifest.json", '{"recipe": [], "wall_seconds": 1}'),
        ("artifacts/align/manifest.json", '{"recipe": null, "wall_seconds": 1}'),
        ("artifacts/align/manifest.json", '{"wall_seconds": 1e400}'),
        ("artifacts/align/manifest.json", '{"wall_seconds": NaN}'),
        ("artifacts/align/manifest.json", "[" * 100_000),
        (".locks/working-merge-0123456789ab.json", '{"label": ["a"], "host": "h", "started": 1}'),
        (
            ".locks/working-merge-0123456789ab.json",
            '{"label": "x", "host": "[/red]", "started": 1}',
        ),
        (".locks/working-merge-0123456789ab.json", '{"label": "x", "host": "h", "started": 1e999}'),
    ],
)
def test_a_damaged_file_is_one_row_and_hides_no_other(finished, root, file, content):
    (finished / file).parent.mkdir(exist_ok=True)
    (finished / file).write_text(content)
    stages = with_recipe(finished, root)
    assert len(stages) >= 21
    assert stages["data/math"].state == "done"
    assert CliRunner().invoke(app, ["status", str(finished)]).exit_code == 0

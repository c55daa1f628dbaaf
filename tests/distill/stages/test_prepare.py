"""`prepare`: shares of domains, without the teacher's weights, found by every later stage."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from xlstm_distill.artifacts import Run
from xlstm_distill.data import preparation
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import prepare as stage
from xlstm_distill.stages.choices import deal
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.prepare import prepare, prepare_rows
from xlstm_distill.stages.status.reading import read_status
from xlstm_distill.stages.status.table import status_table

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"
DOMAINS = ("math", "code", "chat")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Three domains, and a teacher's folder without weights."""
    teacher = tmp_path_factory.mktemp("teacher") / "teacher"
    shutil.copytree(TEACHER, teacher, ignore=shutil.ignore_patterns("*.safetensors*"))
    sources = {name: {"sources": [{"generator": name, "documents": 400}]} for name in DOMAINS}
    phase = {"domain": "math", "tokens": 64 * 60}
    return Recipe.model_validate(
        {
            "name": "test",
            "teacher": {"path": str(teacher), "dtype": "float32"},
            "student": {"mixer": {"window": 32}},
            "data": {"context": 64, "validation_rows": 4, "domains": sources},
            "align": {"tokens": 64 * 30, "batch": 1, "warmup_steps": 0},
            "distill": {"lr": 1e-3, "batch": 1, "experts": {"math": {"phases": [phase]}}},
            "evaluate": {"tasks": [{"name": "t"}]},
        }
    )


def files_of(artifact):
    return {p.name: p.read_bytes() for p in artifact.path.iterdir() if p.suffix != ".json"}


def test_shares_make_the_rows_of_one_process_and_later_stages_find_them(recipe, tmp_path):
    whole = Run.open(tmp_path / "whole", recipe)
    console = QuietConsole()
    alone = prepare(Lineage(recipe), whole, console)
    assert [artifact.manifest["name"] for artifact in alone] == list(DOMAINS)
    for artifact in alone:
        results = artifact.manifest["results"]
        line = f"data/{artifact.manifest['name']}: {results['rows']} rows, "
        assert any(said.startswith(line) and "fill" in said for said in console.lines)
    shared = Run.open(tmp_path / "shared", recipe)
    made = []
    said = []
    for part in range(2):
        heard = QuietConsole()
        made += prepare(Lineage(recipe), shared, heard, f"{part}/2")
        said.append(heard.lines[0])
    assert said[0].startswith("prepare: share 0/2 is math of 3 domains. A share is whole domains;")
    assert "is code, chat of 3" in said[1]
    assert Counter(artifact.manifest["name"] for artifact in made) == Counter(DOMAINS)
    found = prepare_rows(Lineage(recipe), shared, DOMAINS, QuietConsole())
    for artifact in alone:
        other = found[artifact.manifest["name"]]
        assert other.reused
        assert other.fingerprint == artifact.fingerprint
        assert files_of(other) == files_of(artifact)


def test_rows_of_earlier_settings_are_put_back_and_not_made_again(recipe, tmp_path, monkeypatch):
    run = Run.open(tmp_path, recipe)
    (first,) = prepare_rows(Lineage(recipe), run, ["math"], QuietConsole()).values()
    content = files_of(first)
    changed = recipe.model_copy(update={"seed": recipe.seed + 1})
    prepare_rows(Lineage(changed), run, ["math"], QuietConsole())
    assert files_of(first) != content
    monkeypatch.setattr(
        preparation.Preparation, "gather", lambda self: pytest.fail("prepared again")
    )
    # With --replace too: these rows are read, and those of the other seed stay.
    back = Run.open(tmp_path, recipe, QuietConsole(), drop_replaced=True)
    (again,) = prepare_rows(Lineage(recipe), back, ["math"], QuietConsole()).values()
    assert (again.fingerprint, files_of(again)) == (first.fingerprint, content)
    assert "put back" in back.console.lines[0]
    assert len(back.kept("data/math")) == 1


def test_gpus_that_would_wait_long_are_said(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "prepare_domain", lambda *_: None)
    monkeypatch.setattr(stage, "rows_there", lambda *_: 0)

    def said(gpus, names=DOMAINS, **options):
        monkeypatch.setattr(stage, "_waiting", lambda: gpus)
        console = QuietConsole()
        prepare_rows(Lineage(recipe), Run.open(tmp_path, recipe), names, console, **options)
        return console.lines

    assert not said(64)  # few tokens
    # The other domains have 34 rows each.
    monkeypatch.setattr(stage, "MUCH", 64 * 60)
    (line,) = said(64)
    assert "64 " in line
    assert "run `xlstm-distill prepare RECIPE` on a CPU machine" in line
    assert not said(0)  # one process on a CPU
    assert not said(64, asked_for=True)
    assert not said(64, ["code"])
    monkeypatch.setattr(stage, "rows_there", lambda *_: 100)
    assert not said(64)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
def test_every_domain_is_in_one_share_and_shares_are_even(parts):
    rows = {"a": 50, "b": 10, "c": 40, "d": 30, "e": 20}
    shares = deal(rows, parts)
    assert sorted(name for share in shares for name in share) == list(rows)
    totals = [sum(rows[name] for name in share) for share in shares]
    assert max(totals) <= max(sum(rows.values()) / parts + max(rows.values()) / 2, 50)


def test_status_says_how_far_the_rows_are(recipe, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    run = Run.open(tmp_path, recipe)
    run.keep_recipe()
    states = []

    def save(self):
        saved(self)
        states.append({status.label: status for status in read_status(tmp_path)}["data/math"])
        raise Killed

    saved = preparation.Preparation.save
    monkeypatch.setattr("xlstm_distill.data.shards.SHARD_TOKENS", 64 * 20)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(preparation.Preparation, "save", save)
        prepare(Lineage(recipe), run, QuietConsole())
    assert (states[0].state, states[0].step, states[0].steps) == ("running", 20, 64)
    stopped = {status.label: status for status in read_status(tmp_path)}["data/math"]
    assert (stopped.state, stopped.step, stopped.checkpoint) == ("stopped", 20, 20)
    assert status_table([stopped]).row_count == 1
    prepare(Lineage(recipe), run, QuietConsole())
    done = {status.label: status for status in read_status(tmp_path)}["data/math"]
    manifest = json.loads((run.path("data/math") / "manifest.json").read_text())
    assert done.state == "done"
    assert done.figures["rows"] == manifest["results"]["rows"] == 64
    assert 0.9 < done.figures["fill"] <= 1

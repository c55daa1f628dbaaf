"""Preparing a domain: the same rows, killed or not, by any number of workers; and its figures."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlstm_distill.artifacts import Draft, Run, files, shelf
from xlstm_distill.data import preparation, shards
from xlstm_distill.data.budget import rows_needed
from xlstm_distill.data.prepare import data_identity, prepare_domain, tokenizer_hash
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.errors import UserError
from xlstm_distill.models.teacher import load_tokenizer
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import QuietConsole

TEACHER = Path(__file__).parents[3] / "recipes" / "quickstart" / "teacher"
SHARD = 64 * 40


def recipe_of(*sources, rows=300, context=64, **data):
    """A recipe with one domain `x` that reads `rows` rows, 4 of them held out."""
    budget = (rows - 4) * context
    phase = {"domain": "x", "tokens": context}
    return Recipe.model_validate(
        {
            "name": "test",
            "teacher": {"path": str(TEACHER), "dtype": "float32"},
            "student": {"mixer": {"window": 32}},
            "data": {
                "context": context,
                "validation_rows": 4,
                "domains": {"x": {"sources": sources}},
                **data,
            },
            "align": {"tokens": budget, "batch": 1, "warmup_steps": 0},
            "distill": {"lr": 1e-3, "batch": 1, "experts": {"x": {"phases": [phase]}}},
            "evaluate": {"tasks": [{"name": "t"}]},
        }
    )


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(recipe_of({"generator": "math", "documents": 1}).teacher)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_TOKENS", SHARD)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def sources(tmp_path):
    """Two files with a document longer than many rows among short ones, and chats."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for part in range(2):
        write(
            folder / f"{part}.jsonl",
            [f"sun {n} " * (400 if n == 100 else n % 30 + 1) for n in range(400)],
        )
    return {"path": str(folder), "weight": 2.0}, {"generator": "chat", "documents": 900}


def prepared(recipe, tokenizer, directory, console=None):
    run, own_hash = Run.open(directory, recipe), tokenizer_hash(tokenizer)
    return prepare_domain(recipe, run, "x", tokenizer, own_hash, console or QuietConsole())


def content(artifact):
    """Names and hashes of all files but the manifest, whose times differ."""
    files = sorted(p for p in artifact.path.iterdir() if p.name != "manifest.json")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def leftovers(directory):
    return [
        p
        for p in Path(directory).rglob("*")
        if p.name.endswith(".partial") or p.parent.name.startswith("data-x-")
    ]


class Killed(BaseException):
    """Stands for a signal: nothing in between handles it."""


@pytest.mark.parametrize("shard", [1, 2, 5])
@pytest.mark.parametrize(
    "moment", ["before the shard", "before the checkpoint", "after the checkpoint"]
)
def test_an_interrupted_preparation_ends_with_the_same_rows(
    moment, shard, sources, tokenizer, tmp_path, monkeypatch
):
    recipe = recipe_of(*sources)
    whole = prepared(recipe, tokenizer, tmp_path / "whole")
    assert len(content(whole)) > 6
    saves, made = [], shards.RowShardWriter.end_shard

    def save(self):
        saves.append(1)
        if moment == "before the checkpoint" and len(saves) == shard:
            raise Killed
        original(self)
        if moment == "after the checkpoint" and len(saves) == shard:
            raise Killed

    def end_shard(self):
        if moment == "before the shard" and len(saves) == shard - 1:
            raise Killed
        made(self)

    original = preparation.Preparation.save
    with monkeypatch.context() as patched:
        patched.setattr(preparation.Preparation, "save", save)
        patched.setattr(shards.RowShardWriter, "end_shard", end_shard)
        with pytest.raises(Killed):
            prepared(recipe, tokenizer, tmp_path / "cut")
    for work in (tmp_path / "cut").rglob("data-x-*/"):  # a signal would leave a file half written
        (work / ".rows-00009.arrow.0123456789ab.partial").write_bytes(b"half a shard")
    console = QuietConsole()
    resumed = prepared(recipe, tokenizer, tmp_path / "cut", console)
    done = shard if moment == "after the checkpoint" else shard - 1
    assert any("going on after" in line for line in console.lines) == (done > 0)
    assert content(resumed) == content(whole)
    assert resumed.manifest["results"] == whole.manifest["results"]
    assert not leftovers(tmp_path / "cut")


@pytest.mark.parametrize("moment", ["the manifest", "the rename"])
def test_rows_that_are_all_there_survive_a_kill_while_they_are_published(
    moment, sources, tokenizer, tmp_path, monkeypatch
):
    recipe = recipe_of(*sources)
    whole = prepared(recipe, tokenizer, tmp_path / "whole")

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        if moment == "the manifest":
            patched.setattr(Draft, "write_json", killed)
        else:
            patched.setattr(shelf, "replace_directory", killed)
        prepared(recipe, tokenizer, tmp_path / "cut")
    # No row is made again.
    monkeypatch.setattr(preparation.Preparation, "_fill", killed)
    published = prepared(recipe, tokenizer, tmp_path / "cut")
    assert content(published) == content(whole)
    assert published.manifest["results"] == whole.manifest["results"]
    assert not leftovers(tmp_path / "cut")


@pytest.mark.multi_process
def test_a_killed_process_is_gone_on_from_with_other_workers(sources, tokenizer, tmp_path):
    recipe = recipe_of(*sources, rows=600)
    whole = prepared(recipe, tokenizer, tmp_path / "whole")
    code = f"""
        import sys, time
        from xlstm_distill.data import preparation, shards
        from xlstm_distill.artifacts import Run
        from xlstm_distill.runtime.console import QuietConsole
        from xlstm_distill.data.prepare import prepare_domain, tokenizer_hash
        from xlstm_distill.recipe import Recipe
        from xlstm_distill.models.teacher import load_tokenizer
        shards.SHARD_TOKENS = {SHARD}
        save = preparation.Preparation.save
        def slow(self):
            save(self)
            print(len(self.writer.shards), flush=True)
            time.sleep(0.2)
        preparation.Preparation.save = slow
        recipe = Recipe.model_validate_json(sys.stdin.read())
        run, tokenizer = Run.open(sys.argv[1], recipe), load_tokenizer(recipe.teacher)
        prepare_domain(recipe, run, "x", tokenizer, tokenizer_hash(tokenizer), QuietConsole())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "cut")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(recipe.model_dump_json())
    process.stdin.close()
    while int(process.stdout.readline()) < 4:
        pass
    time.sleep(0.25)
    process.send_signal(signal.SIGKILL)
    process.wait()
    console = QuietConsole()
    other = recipe_of(*sources, rows=600, workers=2)
    resumed = prepared(other, tokenizer, tmp_path / "cut", console)
    assert any("going on after" in line for line in console.lines)
    assert resumed.fingerprint == whole.fingerprint  # workers are no part of it
    assert content(resumed) == content(whole)
    assert resumed.manifest["results"] == whole.manifest["results"]


def test_a_damaged_checkpoint_starts_over(sources, tokenizer, tmp_path, monkeypatch):
    recipe = recipe_of(*sources)
    whole = prepared(recipe, tokenizer, tmp_path / "whole")
    original = preparation.Preparation.save

    def save(self):
        original(self)
        if len(self.writer.shards) == 2:
            raise Killed

    for number, damage in enumerate(("checkpoint.npz", "rows-00001.arrow")):
        directory = tmp_path / str(number)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(preparation.Preparation, "save", save)
            prepared(recipe, tokenizer, directory)
        (file,) = directory.rglob(damage)
        file.write_bytes(file.read_bytes()[:-10])
        console = QuietConsole()
        assert content(prepared(recipe, tokenizer, directory, console)) == content(whole)
        assert any("starting over" in line for line in console.lines)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said_and_what_was_finished_is_kept(
    sources, tokenizer, tmp_path, monkeypatch
):
    recipe = recipe_of(*sources)
    whole = prepared(recipe, tokenizer, tmp_path / "whole")
    original = preparation.Preparation.save

    def save(self):
        original(self)
        if len(self.writer.shards) == 3:
            (self.folder / f".rows-00003.arrow.{0:012}.partial").symlink_to("/dev/full")

    with monkeypatch.context() as patched, pytest.raises(OSError) as caught:
        # A partial file gets a random name: fix it, to have a full device there.
        patched.setattr(files.uuid, "uuid4", lambda: uuid.UUID(int=0))
        patched.setattr(preparation.Preparation, "save", save)
        prepared(recipe, tokenizer, tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "full").rglob("*.partial"))
    console = QuietConsole()
    assert content(prepared(recipe, tokenizer, tmp_path / "full", console)) == content(whole)
    assert any("going on after" in line for line in console.lines)


def test_fewer_rows_are_the_first_of_more_and_are_not_made_again(sources, tokenizer, tmp_path):
    few, many = recipe_of(*sources, rows=100), recipe_of(*sources, rows=300)
    short, long = (
        prepared(few, tokenizer, tmp_path / "few"),
        prepared(many, tokenizer, tmp_path / "many"),
    )
    rows, more = DomainRows("x", short, 0), DomainRows("x", long, 0)
    assert (len(rows), len(more)) == (100, 300)
    for n in range(100):
        assert (rows.row(n).ids == more.row(n).ids).all()
        assert (rows.row(n).supervised == more.row(n).supervised).all()
    own_hash = tokenizer_hash(tokenizer)
    assert data_identity(few, "x", own_hash) == data_identity(many, "x", own_hash)
    again = prepared(few, tokenizer, tmp_path / "many")
    assert (again.reused, again.fingerprint) == (True, long.fingerprint)
    grown = prepared(many, tokenizer, tmp_path / "few")
    assert (grown.reused, content(grown)) == (False, content(long))


@pytest.fixture(scope="module")
def most_rows(tokenizer, tmp_path_factory):
    """A source, and all the rows that it fills; the last are those that were left open."""
    folder = tmp_path_factory.mktemp("many")
    texts = [f"sun {n} fog " * (n * 7 % 23 + 1) for n in range(1200)]
    source = {"path": write(folder / "many.jsonl", texts)}
    whole = prepared(recipe_of(source, rows=10_000), tokenizer, folder)
    rows = DomainRows("x", whole, 0)
    return source, [rows.row(n) for n in range(len(rows))]


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_any_number_of_rows_are_the_first_of_any_larger_number(most_rows, tokenizer, data):
    source, rows = most_rows
    needed = data.draw(st.integers(5, len(rows) + 20))
    with tempfile.TemporaryDirectory() as folder:
        few = DomainRows("x", prepared(recipe_of(source, rows=needed), tokenizer, folder), 0)
        assert len(few) == min(needed, len(rows))
        for number in range(len(few)):
            assert (few.row(number).ids == rows[number].ids).all()
            assert few.row(number).lengths == rows[number].lengths


def test_figures_count_what_was_read(sources, tokenizer, tmp_path):
    recipe = recipe_of(*sources)
    artifact = prepared(recipe, tokenizer, tmp_path)
    results = artifact.manifest["results"]
    rows = DomainRows("x", artifact, 4)
    packed = [rows.row(n) for n in range(len(rows))]
    assert results["rows"] == len(rows) == rows_needed(recipe, "x") == 300
    assert results["tokens"] == sum(row.used for row in packed)
    assert results["fill"] == pytest.approx(results["tokens"] / (300 * 64))
    assert results["supervised_share"] == pytest.approx(
        sum(r.supervised.sum() for r in packed) / results["tokens"]
    )
    on_disk = sum(p.stat().st_size for p in artifact.path.glob("*.arrow"))
    assert results["bytes_per_token"] == pytest.approx(on_disk / results["tokens"])
    assert results["documents_read"]["split"] > 0
    assert sum(results["documents_read"].values()) == sum(
        s["documents"] for s in results["sources"]
    )
    assert [s["weight_share"] for s in results["sources"]] == pytest.approx([2 / 3, 1 / 3])
    assert sum(s["share"] for s in results["sources"]) == pytest.approx(1)


def test_policies_for_long_documents_reach_the_rows_and_the_fingerprint(tokenizer, tmp_path):
    texts = {"path": write(tmp_path / "d.jsonl", ["sun " * 8, "fog " * 200] * 200)}
    made = {
        policy: prepared(
            recipe_of(texts, rows=20, long_documents=policy), tokenizer, tmp_path / policy
        )
        for policy in ("split", "truncate", "drop")
    }
    read = {
        policy: artifact.manifest["results"]["documents_read"] for policy, artifact in made.items()
    }
    assert read["split"]["split"] > 0
    assert read["truncate"]["truncated"] > 0
    assert read["drop"]["dropped"] == pytest.approx(read["drop"]["kept"], abs=1)
    assert len({artifact.fingerprint for artifact in made.values()}) == 3
    with pytest.raises(
        UserError, match=r"x.sources\[0\]: record 2 of .* more than data.context \(64\)"
    ):
        prepared(recipe_of(texts, rows=20, long_documents="error"), tokenizer, tmp_path / "error")
    assert not leftovers(tmp_path / "error")


def test_a_source_that_runs_dry_is_said_with_its_real_share(tokenizer, tmp_path):
    small = {"path": write(tmp_path / "d.jsonl", ["sun fog"] * 20), "weight": 1.0}
    console = QuietConsole()
    artifact = prepared(
        recipe_of(small, {"generator": "math", "documents": 900}),
        tokenizer,
        tmp_path / "r",
        console,
    )
    first, second = artifact.manifest["results"]["sources"]
    assert (first["ran_out"], second["ran_out"]) == (True, False)
    assert first["share"] < 0.05
    (line,) = [line for line in console.lines if "ran out" in line]
    share = f"{first['share']:.1%}"
    assert line == (
        f"data.domains.x.sources[0]: ran out after 20 documents and gives {share} of the tokens, "
        "not 50.0%."
    )


def test_too_little_text_is_said_or_refused(tokenizer, tmp_path):
    few = {"path": write(tmp_path / "few.jsonl", ["sun fog " * 20] * 20)}
    console = QuietConsole()
    artifact = prepared(recipe_of(few, rows=500), tokenizer, tmp_path / "r", console)
    rows = artifact.manifest["results"]["rows"]
    assert (
        f"data/x: {rows} rows of the 500 that the recipe reads; they will be read more than once."
        in console.lines
    )
    none = {"path": write(tmp_path / "none.jsonl", ["", "sun", None])}
    with pytest.raises(
        UserError,
        match=r"data.domains.x: its documents fill 1 rows .* of 3 documents 2 empty left out",
    ):
        prepared(recipe_of(none), tokenizer, tmp_path / "n")


def test_one_process_prepares_and_the_other_waits(tokenizer, tmp_path):
    import fcntl
    import threading

    recipe = recipe_of({"generator": "math", "documents": 900})
    run, console = Run.open(tmp_path, recipe), QuietConsole()
    (tmp_path / "training").mkdir()
    with (tmp_path / "training" / "data-x.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        settings = (recipe, run, "x", tokenizer, tokenizer_hash(tokenizer), console)
        waiting = threading.Thread(target=prepare_domain, args=settings)
        waiting.start()
        while not console.lines:
            time.sleep(0.01)
        assert console.lines == ["data/x: another process prepares it; waiting."]
        assert not (tmp_path / "artifacts" / "data" / "x").exists()
    waiting.join()
    assert run.load("data/x") is not None


def test_what_other_settings_left_behind_is_removed(sources, tokenizer, tmp_path, monkeypatch):
    def killed(self):
        original(self)
        raise Killed

    original = preparation.Preparation.save
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(preparation.Preparation, "save", killed)
        prepared(recipe_of(*sources), tokenizer, tmp_path)
    assert leftovers(tmp_path)
    console = QuietConsole()
    prepared(recipe_of(*sources, rows=310), tokenizer, tmp_path, console)
    assert not leftovers(tmp_path)
    (line,) = [said for said in console.lines if "removed" in said]
    assert re.search(r"data-x-\w+: unfinished rows of other settings, removed \(.*B\)$", line)


def test_workers_are_as_many_as_the_text_and_the_machine_call_for(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    def workers(rows, **data):
        recipe = recipe_of({"generator": "math", "documents": 1}, rows=rows, **data)
        return preparation.Preparation(
            recipe, "x", rows, tokenizer, tmp_path, QuietConsole()
        ).workers()

    assert workers(1000) == 0
    assert workers(10_000_000) == preparation.MOST_WORKERS
    assert workers(10_000_000, workers=3) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert workers(10_000_000) == 1

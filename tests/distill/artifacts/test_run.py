"""Artifacts are found by what they were made from, and never half-written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from xlstm_distill.artifacts import Request, Run
from xlstm_distill.artifacts import run as artifacts
from xlstm_distill.artifacts.hashing import _hash_files, digest, hash_path
from xlstm_distill.errors import RunError, UserError


class Recipe:
    seed = 3


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", Recipe())


def request_(value=1, name=None, **inputs):
    return Request("stage", parts={"value": value}, inputs=inputs, name=name)


def write(text):
    return lambda draft: (draft.path / "file.txt").write_text(text)


def test_made_once_then_found(run):
    first = run.make(request_(), write("a"))
    again = run.make(request_(), lambda draft: pytest.fail("built twice"))
    assert (first.reused, again.reused) == (False, True)
    assert again.fingerprint == first.fingerprint
    assert (again.path / "file.txt").read_text() == "a"


def test_manifest_tells_what_it_was_made_from(run):
    manifest = run.make(request_(7, name="x", teacher="abc"), write("a")).manifest
    assert manifest["recipe"] == {"value": 7}
    assert manifest["inputs"] == {"teacher": "abc"}
    assert (manifest["stage"], manifest["name"], manifest["seed"]) == ("stage", "x", 3)
    assert manifest["arithmetic"]["threads"] == 1
    assert manifest["wall_seconds"] >= 0
    assert manifest["versions"]["torch"]
    assert json.loads((run.path("stage/x") / "manifest.json").read_text()) == manifest


def test_time_spent_before_counts(run):
    def build(draft):
        draft.earlier_seconds = 100.0

    assert 100 <= run.make(request_(), build).manifest["wall_seconds"] < 110


@pytest.mark.parametrize("changed", [request_(2), request_(1, teacher="other")])
def test_a_changed_part_or_input_builds_anew(run, changed):
    run.make(request_(1), write("a"))
    assert not run.make(changed, write("b")).reused
    assert (run.path("stage") / "file.txt").read_text() == "b"


def test_a_failed_build_leaves_the_earlier_artifact_and_no_litter(run):
    run.make(request_(1), write("a"))

    def fail(draft):
        write("half")(draft)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run.make(request_(2), fail)
    assert (run.path("stage") / "file.txt").read_text() == "a"
    assert [p.name for p in (run.directory / "artifacts").iterdir()] == ["stage"]
    assert run.find(request_(1)) is not None


def test_a_killed_process_leaves_no_draft_for_good(run):
    folder = run.path("stage/x").parent
    for name in (".x.0123456789ab.partial", ".x.0123456789ab.old", ".xy.0123456789ab.partial"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file.txt").write_text("half")
    seen = []

    def build(draft):
        other = Run.open(run.directory, Recipe())
        other.make(
            request_(2, name="x"), write("other")
        )  # its drafts are its own, and it leaves ours
        seen.extend(sorted(p.name for p in folder.iterdir()))
        assert draft.path.is_dir()
        write("a")(draft)

    run.make(request_(1, name="x"), build)
    assert len(seen) == 3  # the other's artifact, our draft, and what belongs to another label
    assert sorted(p.name for p in folder.iterdir()) == [".xy.0123456789ab.partial", "x"]
    assert (run.path("stage/x") / "file.txt").read_text() == "a"
    assert [p.name for p in (run.directory / ".locks").iterdir()] == ["stage-x"]


def test_a_training_is_held_until_it_is_published_and_its_checkpoints_are_gone(run, monkeypatch):
    other, removed = Run.open(run.directory, Recipe()), []

    def refused():
        with pytest.raises(
            RunError,
            match=r"stage-.*: another process \(.*\) is at this training; wait for it, or stop it",
        ):
            other.make(
                request_(), lambda draft: pytest.fail("built at the same time"), together=True
            )

    def remove(path, ignore_errors=False):
        removed.append(path)
        if path == run.work_directory(request_()):
            assert other.make(
                request_(), lambda draft: pytest.fail("built again"), together=True
            ).reused
        rmtree(path, ignore_errors=ignore_errors)

    def build(draft):
        refused()
        write("a")(draft)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert not run.make(request_(), build, together=True).reused
    assert run.work_directory(request_()) in removed


def test_a_run_that_was_waiting_for_the_lock_looks_again(run, monkeypatch):
    """The other run publishes between our look and our lock."""
    taken = artifacts.exclusive

    def late(path, what, say):
        Run.open(run.directory, Recipe()).make(request_(), write("other"))
        return taken(path, what, say)

    monkeypatch.setattr(artifacts, "exclusive", late)
    assert run.make(request_(), lambda draft: pytest.fail("built twice"), together=True).reused


def test_needing_what_is_missing_or_stale_names_the_stage(run):
    with pytest.raises(RunError, match="run the stage 'stage' first"):
        run.need(request_(1))
    run.make(request_(1), write("a"))
    with pytest.raises(
        RunError, match=r"made from other settings .*\(value 1 -> 2\); run 'stage' again"
    ):
        run.need(request_(2))


def test_a_damaged_manifest_is_one_line(run):
    run.make(request_(), write("a"))
    (run.path("stage") / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="not a manifest; delete"):
        run.find(request_())


def test_a_run_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--run: .* cannot be used as a run directory"):
        Run.open(tmp_path / "file", Recipe())


def test_digest_ignores_key_order_and_hash_path_sees_content(tmp_path):
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    (tmp_path / "a").write_text("one")
    before = hash_path(tmp_path)
    (tmp_path / "a").write_text("two")
    assert hash_path(tmp_path) != before


def test_a_change_anywhere_in_a_large_file_is_seen(tmp_path):
    file = tmp_path / "weights"
    with file.open("wb") as stream:
        stream.truncate(80 * 2**20)
    before = hash_path(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(40 * 2**20)
        stream.write(b"changed")
    assert hash_path(tmp_path) != before


def test_beyond_the_limit_times_stand_for_the_middle_of_files(tmp_path, monkeypatch):
    file = tmp_path / "data"
    file.write_bytes(b"a" * 5 * 2**20)
    whole = hash_path(file)
    monkeypatch.setattr("xlstm_distill.artifacts.hashing.WHOLE_HASH_BYTES", 1)
    _hash_files.cache_clear()
    ends = hash_path(file)
    assert ends != whole
    (tmp_path / "copy").mkdir()
    assert hash_path(Path(shutil.copy2(file, tmp_path / "copy"))) == ends
    with file.open("r+b") as stream:
        stream.seek(2 * 2**20)
        stream.write(b"b")
    os.utime(file, ns=(0, 1))
    assert hash_path(file) != ends

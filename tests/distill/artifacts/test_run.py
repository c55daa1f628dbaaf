"""Artifacts are found by what they were made from, and never half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from xlstm_distill.artifacts import Request, Run, hashing
from xlstm_distill.artifacts import run as artifacts
from xlstm_distill.artifacts.hashing import digest, hash_path
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime.console import QuietConsole


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
    kept = run.kept_path("stage/x", request_(2, name="x").fingerprint).name
    assert sorted(p.name for p in folder.iterdir()) == [".xy.0123456789ab.partial", "x", kept]
    assert (run.path("stage/x") / "file.txt").read_text() == "a"
    assert [p.name for p in (run.directory / ".locks").iterdir()] == ["stage-x"]


def test_a_training_is_held_until_it_is_published_and_its_checkpoints_are_gone(run, monkeypatch):
    other, removed = Run.open(run.directory, Recipe()), []

    def refused():
        with pytest.raises(
            RunError,
            match=r"^stage: another process \(pid \d+ on .*\) is at it; wait for it, or stop it",
        ):
            other.make(
                request_(), lambda draft: pytest.fail("built at the same time"), together=True
            )

    def remove(path, ignore_errors=False):
        first = path not in removed
        removed.append(path)
        if first and path == run.work_directory(request_()):
            assert other.make(
                request_(), lambda draft: pytest.fail("built again"), together=True
            ).reused
        rmtree(path, ignore_errors=ignore_errors)

    def build(draft):
        refused()
        run.work_directory(request_()).mkdir(parents=True)
        write("a")(draft)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove)
    assert not run.make(request_(), build, together=True).reused
    assert run.work_directory(request_()) in removed


def test_checkpoints_and_marks_that_a_killed_process_left_go_with_the_next_look(run):
    """It died between the rename that published its artifact and the removal of the rest."""
    made = run.make(request_(), write("a"))
    work, mark = run.work_directory(request_()), run.locks / ".stage.0123456789ab.partial"
    for look in (lambda: run.need(request_()), lambda: run.make(request_(), write("b"))):
        (work / "step-00000002").mkdir(parents=True)
        assert look().fingerprint == made.fingerprint
        assert not work.exists()
    mark.touch()
    run.make(request_(2), write("b"))
    assert not mark.exists()


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


def published(run, value=1, text="a", **options):
    return run.make(request_(value, **options), write(text))


def test_the_manifest_knows_every_file(run):
    def build(draft):
        draft.self_checked = ("store/*.bin",)
        (draft.path / "store").mkdir()
        (draft.path / "store" / "rows.bin").write_bytes(b"12345")
        write("a")(draft)

    expected = {"size": 1, "sha256": hashlib.sha256(b"a").hexdigest()}
    artifact = run.make(request_(), build)
    assert artifact.files == {"file.txt": expected, "store/rows.bin": {"size": 5}}
    assert artifact.bytes == 6


def test_a_missing_or_cut_file_names_itself_when_the_artifact_is_found(run):
    file = published(run, text="abc").path / "file.txt"
    file.write_text("ab")
    with pytest.raises(RunError, match=r"file\.txt: 2 bytes; it was published with 3\. .*delete"):
        run.find(request_())
    file.unlink()
    with pytest.raises(RunError, match=r"file\.txt: missing; it was published with 3 bytes"):
        run.make(request_(), lambda draft: pytest.fail("made again in silence"))


def test_a_changed_file_names_itself_when_it_is_loaded(run):
    artifact = published(run, text="abc")
    (artifact.path / "file.txt").write_text("abd")
    found = run.need(request_())  # reads nothing
    with pytest.raises(RunError, match=r"file\.txt: its content changed: SHA-256 \w+\.{3}, it"):
        found.check_content()
    found.check_content("model")  # it lies elsewhere


def test_a_file_that_changes_after_it_was_checked_is_checked_again(run):
    artifact = published(run, text="abc")
    artifact.check_content()
    file = artifact.path / "file.txt"
    before = file.stat()
    file.write_text("abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(RunError, match="its content changed"):
        artifact.check_content()


def test_a_file_that_stays_is_read_once(run, monkeypatch):
    artifact = published(run, text="abc")
    artifact.check_content()
    monkeypatch.setattr(
        "xlstm_distill.artifacts.manifest.sha256_of_all", lambda *_: pytest.fail("read again")
    )
    artifact.check_content()


def test_an_artifact_of_other_settings_is_kept_and_put_back(run):
    run.console = console = QuietConsole()
    published(run, 1, "first")
    second = published(run, 2, "second")
    kept = run.kept_path("stage", request_(1).fingerprint)
    assert (kept / "file.txt").read_text() == "first"
    assert f"value 1 -> 2; the earlier one (5 bytes) will be kept in {kept}" in console.lines[0]
    assert [artifact.fingerprint for artifact in run.kept("stage")] == [request_(1).fingerprint]
    again = run.make(request_(1), lambda draft: pytest.fail("made again"))
    assert (again.reused, (again.path / "file.txt").read_text()) == (True, "first")
    kept_now = run.kept_path("stage", second.fingerprint)
    ending = f"put back (5 bytes from {kept.name}); the one of other settings is kept in {kept_now}"
    assert console.lines[-1].endswith(ending)
    assert not kept.exists()
    assert run.kept("stage")[0].fingerprint == second.fingerprint


def test_what_is_replaced_goes_where_the_user_says_so(run):
    published(run, 1)
    other = Run.open(run.directory, Recipe(), QuietConsole(), drop_replaced=True)
    published(other, 2)
    assert other.kept("stage") == []
    assert "will be removed (--replace)" in other.console.lines[0]
    assert [path.name for path in (run.directory / "artifacts").iterdir()] == ["stage"]


def test_what_is_only_read_never_goes(run):
    """--replace is for what a command makes: here it puts back what it reads."""
    published(run, 1, "first")
    published(run, 2, "second")
    other = Run.open(run.directory, Recipe(), QuietConsole(), drop_replaced=True)
    assert (other.need(request_(1)).path / "file.txt").read_text() == "first"
    assert [artifact.fingerprint for artifact in other.kept("stage")] == [request_(2).fingerprint]
    kept = other.kept_path("stage", request_(2).fingerprint)
    assert (kept / "file.txt").read_text() == "second"
    assert other.console.lines[-1].endswith(f"; the one of other settings is kept in {kept}")


def test_rows_of_which_there_are_more_now_are_not_kept_twice(run):
    def rows(count):
        return Request("stage", parts={"rows": count}, inputs={}, identity="rows")

    run.make(rows(1), write("a"))
    run.make(rows(2), write("ab"))
    assert run.kept("stage") == []
    run.make(rows(1), write("a"))
    assert len(run.kept("stage")) == 1


def test_all_is_flushed_before_and_after_the_rename(run, monkeypatch):
    """Every file and folder of the draft, then the name, and only then the checkpoints go."""
    events = []

    def fsync(descriptor):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    rename, rmtree = Path.rename, shutil.rmtree
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", lambda a, b: events.append(("rename", b)) or rename(a, b))
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **kw: events.append(("remove", path)) or rmtree(path, **kw)
    )

    def build(draft):
        run.work_directory(request_()).mkdir(parents=True)
        (draft.path / "model").mkdir()
        (draft.path / "model" / "weights").write_text("a")

    run.make(request_(), build)
    final, work = run.path("stage"), run.work_directory(request_())
    published_at, gone = events.index(("rename", final)), events.index(("remove", work))
    before = [path.name for kind, path in events[:published_at] if kind == "flush"]
    assert {"weights", "model", "manifest.json"} <= set(before)
    assert before.index("weights") < before.index("model")
    after = [path for kind, path in events[published_at:gone] if kind == "flush"]
    assert {final.parent, run.directory} <= set(after)


def test_checkpoints_that_a_killed_process_left_go_when_the_artifact_is_found(run):
    published(run)
    work = run.work_directory(request_())
    work.mkdir(parents=True)
    run.need(request_())
    assert not work.exists()


def test_a_failed_rename_leaves_the_earlier_artifact(run, monkeypatch):
    published(run, 1)
    rename = Path.rename

    def fail(source, target):
        if source.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        published(run, 2)
    assert run.find(request_(1)) is not None


@pytest.mark.parametrize("key", ["fingerprint", "identity", "files"])
def test_a_manifest_that_lacks_a_key_is_one_line(run, key):
    published(run)
    path = run.path("stage") / "manifest.json"
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"manifest\.json: lacks the key '{key}'.* delete"):
        run.find(request_())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "3"),
        ("stage", None),
        ("fingerprint", 7),
        ("identity", ["a"]),
        ("recipe", []),
        ("inputs", "none"),
        ("notes", None),
        ("results", [1]),
        ("wall_seconds", "1.0"),
        ("wall_seconds", True),
        ("finished", 5),
        ("files", {"file.txt": {"size": "1"}}),
        ("files", {"file.txt": {"size": 1, "sha256": 5}}),
    ],
)
def test_a_manifest_whose_value_has_the_wrong_type_is_one_line(run, key, value):
    path = published(run).path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"manifest\.json: its key '{key}' must .* delete"):
        run.find(request_())


def test_an_artifact_of_an_earlier_version_says_so(run):
    path = published(run).path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": 2, "fingerprint": "0" * 32}))
    with pytest.raises(RunError, match=r"another version of the program made it \(format 2, now 3"):
        run.need(request_())


def test_what_is_missing_is_looked_for_again(run):
    other = Run.open(run.directory, Recipe(), QuietConsole(), patience=20.0)
    thread = threading.Timer(0.2, lambda: published(run))
    thread.start()
    started = time.monotonic()
    assert other.need(request_()).reused
    assert time.monotonic() - started < 10
    thread.join()
    assert "not there yet; looking again for 20 s" in other.console.lines[0]
    other.patience = 0.1
    with pytest.raises(RunError, match=r"made from other settings .*run 'stage' again"):
        other.need(request_(2))


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


def test_a_copy_elsewhere_has_the_same_hash_whatever_its_times(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seconds in ((one, 1), (other, 2)):
        folder.mkdir()
        (folder / "weights").write_bytes(b"abc")
        os.utime(folder / "weights", (seconds, seconds))
    assert hash_path(one) == hash_path(other)
    (other / "weights").rename(other / "weight")
    assert hash_path(one) != hash_path(other)


def test_hashes_of_large_files_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file, memory = tmp_path / "weights", tmp_path / "hashes.json"
    with file.open("wb") as stream:
        stream.truncate(2**20)
    monkeypatch.setattr(hashing, "SETTLED_SECONDS", -1.0)
    reads = []
    whole = hashing.sha256
    monkeypatch.setattr(hashing, "sha256", lambda path: reads.append(path) or whole(path))
    monkeypatch.setattr(hashing, "_MEMORY", hashing._Memory())
    hashing.remember_hashes(memory)
    before = hash_path(file)
    monkeypatch.setattr(hashing, "_MEMORY", hashing._Memory())  # another process
    hashing.remember_hashes(memory)
    assert hash_path(file) == before
    assert reads == [file]
    times = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"b")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    assert hash_path(file) != before
    memory.write_text("{")  # damaged: hashed anew
    hashing.remember_hashes(memory)
    assert hash_path(file) != before

"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xlstm_distill.artifacts import files
from xlstm_distill.artifacts.files import (
    flush,
    flush_directory,
    flush_tree,
    remove_partials,
    replace_directory,
    write_text,
    written_whole,
)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "rows.bin"
    with written_whole(path) as file:
        file.write(b"first half, ")
        file.flush()
        assert not path.exists()
        file.write(b"second half")
    assert path.read_bytes() == b"first half, second half"
    assert names(tmp_path) == ["rows.bin"]


def test_an_earlier_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "index.json"
    write_text(path, "old")
    with written_whole(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "index.json"
    write_text(path, "old")
    with pytest.raises(ValueError, match="broken"), written_whole(path) as file:
        file.write(b"half")
        raise ValueError("broken")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["index.json"]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, written_whole(tmp_path / "file.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "file.txt")


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "shard.bin"
    with written_whole(path) as one, written_whole(path) as other:
        one.write(b"one")
        other.write(b"other, and longer")
    assert path.read_bytes() == b"one"  # it ended last
    assert names(tmp_path) == ["shard.bin"]


def test_text_is_utf8(tmp_path):
    write_text(tmp_path / "text", "α* = 0.05\n")
    assert (tmp_path / "text").read_bytes() == "α* = 0.05\n".encode()


KILLED = """
import os, signal, sys
from pathlib import Path
from xlstm_distill.artifacts.files import written_whole
with written_whole(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_leaves_is_not_the_file_and_can_be_removed(tmp_path):
    path = tmp_path / "index.json"
    (tmp_path / ".draft.partial").mkdir()  # a folder is somebody else's
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert len(names(tmp_path)) == 2
    remove_partials(tmp_path)
    assert names(tmp_path) == [".draft.partial"]


def test_flushing_changes_nothing(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    flush(path)
    flush_directory(tmp_path)
    assert path.read_bytes() == b"abc"


@pytest.mark.parametrize(("name", "is_lost"), [(".a.1f.partial", False), ("a", True)])
def test_a_draft_that_another_process_removes_meanwhile_is_no_loss(
    tmp_path, monkeypatch, name, is_lost
):
    (tmp_path / name).touch()
    real = files.flush

    def removed_before(path):
        path.unlink()
        real(path)

    monkeypatch.setattr(files, "flush", removed_before)
    with pytest.raises(FileNotFoundError) if is_lost else contextlib.nullcontext():
        flush_tree(tmp_path)


def test_a_directory_replaces_another_whole(tmp_path):
    source, final = tmp_path / "draft", tmp_path / "align"
    for folder, name in ((source, "new"), (final, "old")):
        folder.mkdir()
        (folder / name).touch()
    replace_directory(source, final)
    assert names(tmp_path) == ["align"]
    assert names(final) == ["new"]

"""Locks: one run at a time, also where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re

import pytest

from xlstm_distill.artifacts.locks import exclusive, marked, wait_for
from xlstm_distill.errors import RunError


def test_a_training_belongs_to_one_run_at_a_time(tmp_path):
    lock, said = tmp_path / ".lock", []

    def held():
        return exclusive(lock, "align", said.append)

    me = re.escape(f"another process (pid {os.getpid()} on {platform.node()}) is at it")
    with held(), pytest.raises(RunError, match=me), held():
        pass
    with held():
        pass
    assert not said


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_does_not_stop_a_training(
    number, tmp_path, monkeypatch
):
    def flock(stream, flags):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with exclusive(tmp_path / ".lock", "align", said.append):
        pass
    assert len(said) == 1
    assert f"{tmp_path / '.lock'}: cannot be locked" in said[0]


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "fifo", "folder"])
@pytest.mark.parametrize("take", [wait_for, marked, lambda path: exclusive(path, "align", print)])
def test_a_lock_that_is_no_plain_file_is_refused_and_harms_nothing(tmp_path, kind, take):
    lock, behind = tmp_path / "lock", tmp_path / "precious"
    if kind == "fifo":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    elif kind == "hard link":
        behind.write_text("precious")
        lock.hardlink_to(behind)
    else:
        lock.symlink_to(behind)
    if kind == "link":
        behind.write_text("precious")
    with pytest.raises((RunError, FileExistsError), match=r"lock"), take(lock):
        pass
    assert behind.exists() == (kind in ("link", "hard link"))
    if behind.exists():
        assert behind.read_text() == "precious"

"""Locks: one run at a time, also where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import re

import pytest

from xlstm_distill.artifacts.locks import exclusive
from xlstm_distill.errors import RunError


def test_a_training_belongs_to_one_run_at_a_time(tmp_path):
    lock, said = tmp_path / ".lock", []

    def held():
        return exclusive(lock, tmp_path, said.append)

    me = re.escape(f"another process (pid {os.getpid()} on {platform.node()}) is at this")
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
    with exclusive(tmp_path / ".lock", tmp_path, said.append):
        pass
    assert len(said) == 1
    assert f"{tmp_path / '.lock'}: cannot be locked" in said[0]

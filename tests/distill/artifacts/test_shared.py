"""Folders that several machines write to are told from local ones by the kernel's mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_distill.artifacts.shared import is_shared

MOUNTS = """\
22 1 254:0 / / rw - ext4 /dev/vda rw
23 22 0:21 / /scratch rw master:1 - nfs4 server:/scratch rw
24 23 0:22 / /scratch/my\\040disk rw - xfs /dev/vdb rw
25 22 0:23 / /lustre rw - lustre mds:/l rw
"""


@pytest.mark.parametrize(
    ("folder", "shared"),
    [
        ("/home/run", False),
        ("/scratch/run", True),
        ("/scratch/my disk/run", False),
        ("/lustre", True),
        ("/lustreless", False),
    ],
)
def test_the_deepest_mount_decides(tmp_path, folder, shared):
    (tmp_path / "mounts").write_text(MOUNTS)
    assert is_shared(Path(folder), tmp_path / "mounts") == shared


def test_where_nothing_tells_it_is_local(tmp_path):
    assert not is_shared(tmp_path, tmp_path / "none")

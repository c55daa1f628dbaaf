"""Whether other machines write to a folder too: network file systems show their files late."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
LOCAL = (
    *("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "reiserfs", "xfs", "zfs"),
    *("aufs", "overlay", "ramfs", "rootfs", "tmpfs", "vfat"),
)
"""File systems of one machine. What is not among these is taken for shared."""


def is_shared(folder: Path, mounts: Path = MOUNTS) -> bool:
    """Whether a folder lies on a file system that several machines can write to.

    Only Linux tells (`mounts`); elsewhere the answer is no.
    """
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return False
    where, best, kind = folder.resolve(), -1, ""
    for line in lines:
        # 36 35 98:0 /root /mount/point rw,noatime master:1 - ext3 /dev/root rw
        left, _, right = line.partition(" - ")
        fields, after = left.split(), right.split()
        if len(fields) < 5 or not after:
            continue
        mount = Path(_unescaped(fields[4]))
        depth = len(mount.parts)
        # The last of equals: a mount hides what was mounted there before.
        if depth >= best and where.is_relative_to(mount):
            best, kind = depth, after[0]
    return bool(kind) and kind not in LOCAL


def _unescaped(text: str) -> str:
    """Undo the octal escapes of blanks and the like in a mount point."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

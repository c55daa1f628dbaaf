"""Checksums of files, to tell damage."""

from __future__ import annotations

import zlib
from pathlib import Path

BLOCK = 2**24


def crc32(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            value = zlib.crc32(block, value)
    return value

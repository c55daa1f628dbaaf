"""In which order the files of a source are read: in lanes, in proportion to their sizes.

However much of a source is read, its files then have about the shares that they have of the whole.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_distill.data.files.readers import COMPRESSED, Reader, format_of

LANES = 8
"""Lanes of a source: as many files are open at once. Each holds a buffer, or a row group."""
STOPS = (1 / 16, 1 / 4)
"""Shares of a file after which the other files of its lane are read up to the same share."""
MANY = 1024
"""Files from which the last stop is left out: a random order of so many keeps their shares."""
TEXT_OF_COMPRESSED = 3
TEXT_OF_PARQUET = 2
"""Characters of text that a byte holds, about. Errors move all stops of a source alike."""
SIZE_UNKNOWN = 2**26
"""Size (bytes) that every file counts as where sizes cannot be had."""


@dataclass(frozen=True)
class SourceFile:
    """A part of a source that is read in one go: a file, or a shard of hub data.

    text: characters of text that it holds, by its size.
    """

    label: str
    read: Reader
    text: int = 1
    remote: bool = False


@dataclass(frozen=True)
class Visit:
    """Reading of a file: the records that begin from `first` up to `stop` (None: the end).

    Both are counted in characters of the file's text.
    """

    file: SourceFile
    first: int = 0
    stop: int | None = None

    def takes(self, start: int) -> bool:
        """Whether a record that begins here belongs to this visit."""
        return self.first <= start and (self.stop is None or start < self.stop)


@dataclass(frozen=True)
class Lane:
    """Visits that are read one after the other, and the text of their files (characters)."""

    visits: tuple[Visit, ...]
    text: int


@dataclass(frozen=True)
class Place:
    """A place between two records of a lane, as JSON values.

    visit: number of the visit in its lane.
    record, text: records and characters of the visit's file before the place.
    given: characters that the lane has given before it.
    state: state of the file's reader.
    """

    visit: int = 0
    record: int = 0
    text: int = 0
    given: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Position:
    """A place between two documents of a source; reading goes on from it exactly.

    read: documents of the source before it.
    lanes: the place in each lane; none at the beginning, and for a generator.
    """

    read: int = 0
    lanes: tuple[Place, ...] = ()

    @classmethod
    def restored(cls, content: Mapping[str, Any]) -> Position:
        """Make a position again of what `asdict` made of it.

        Raises:
            ValueError: another version of this package wrote it.
        """
        try:
            lanes = tuple(Place(**place) for place in content["lanes"])
            return cls(content["read"], lanes)
        except (KeyError, TypeError):
            raise ValueError(
                "another version of this package wrote how far the sources are read"
            ) from None


def text_size(document: Mapping[str, Any]) -> int:
    """Characters of a document's text and messages, and one for the document."""
    size = 1
    for value in document.values():
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, list):
            messages = [message for message in value if isinstance(message, dict)]
            # An estimate will do: it weighs files, and bounds what waits in memory.
            size += sum(len(str(message.get("content"))) for message in messages)
    return size


def text_of(name: str, size: int | None) -> int:
    """Characters of text that a file of this name holds, about, by its size (bytes)."""
    if size is None:
        return SIZE_UNKNOWN
    factor = 1
    if name.lower().endswith(COMPRESSED):
        factor = TEXT_OF_COMPRESSED
    elif format_of(Path(name)) == "parquet":
        factor = TEXT_OF_PARQUET
    return max(1, size * factor)


def listed_sizes(addresses: Sequence[str]) -> list[int | None]:
    """Sizes of remote files (bytes), from one listing of their folder.

    All are None where the address knows no listing (`http`, a file in an archive) or the listing
    has not all sizes. If the listing fails, so does this: the order must not depend on the network.
    """
    from fsspec.core import url_to_fs

    unknown: list[int | None] = [None] * len(addresses)
    if not addresses or any("::" in one or one.startswith("http") for one in addresses):
        return unknown
    system, _ = url_to_fs(addresses[0])
    paths = [str(system._strip_protocol(address)) for address in addresses]
    folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    # One request for about 1,000 files, where asking for each would be one for every file.
    found = system.find(folder, detail=True)
    sizes = [found[path].get("size") if path in found else None for path in paths]
    return unknown if None in sizes else sizes


def lanes_of(files: Sequence[SourceFile], seed: int) -> list[Lane]:
    """Share files out to lanes, in an order drawn from the seed.

    All lanes are read at once, each in proportion to its text. A large file has a lane to itself.
    The others of a lane are neighbours in the listing, so that folders keep their shares too.
    """
    # From the seed alone, so that reading goes on in the same order after a restart.
    generator = np.random.default_rng(seed)
    groups = _groups(files)
    stops = STOPS if len(files) < MANY else STOPS[:1]
    found = []
    for number in generator.permutation(len(groups)):
        group = groups[number]
        shuffled = [group[n] for n in generator.permutation(len(group))]
        found.append(Lane(_visits(shuffled, stops), sum(file.text for file in group)))
    return found


def _groups(files: Sequence[SourceFile]) -> list[list[SourceFile]]:
    """Cut a listing into at most LANES groups of about equal text."""
    if len(files) <= LANES:
        return [[file] for file in files]
    total = sum(file.text for file in files)
    alone = [file for file in files if file.text * LANES >= total]
    others = [file for file in files if file.text * LANES < total]
    count = max(1, LANES - len(alone))
    rest = sum(file.text for file in others)
    cut: list[list[SourceFile]] = [[] for _ in range(count)]
    before = 0
    for file in others:
        # By the middle of the file, in whole numbers: (before + text / 2) / rest * count.
        cut[(2 * before + file.text) * count // (2 * rest)].append(file)
        before += file.text
    return [*([file] for file in alone), *filter(None, cut)]


def _visits(files: Sequence[SourceFile], stops: Sequence[float]) -> tuple[Visit, ...]:
    """Read every file of a lane up to the first stop, then every one up to the next."""
    # A file alone waits for no other.
    stops = stops if len(files) > 1 else ()
    found = []
    for begin, end in zip((0.0, *stops), (*stops, None), strict=True):
        for file in files:
            stop = None if end is None else int(end * file.text)
            found.append(Visit(file, int(begin * file.text), stop))
    return tuple(found)

"""Which files a source has: local ones, those of saved data, or those of a hub data set."""

from __future__ import annotations

import errno
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from xlstm_distill.data.files.order import SourceFile, listed_sizes, text_of
from xlstm_distill.data.files.readers import (
    FORMATS,
    dataset_reader,
    file_reader,
    format_of,
    hub_file_reader,
)
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Source

LIST_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    pa.ArrowException,
)
"""What `datasets` raises, besides its own errors, on a data set or folder that it cannot read."""


def source_files(source: Source, field: str) -> list[SourceFile]:
    """List a source's files; of hub data that `datasets` reads, its shards.

    Raises:
        UserError: there are none, or they cannot be listed or read.
    """
    return _Listing(source, field).files()


def unreadable(field: str, name: str, where: str, error: Exception) -> Exception:
    """Make the error for a file, or a whole source, of this name that cannot be read."""
    # A full disk (the hub's cache) is no fault of the source.
    if is_full_disk(error):
        return error
    return UserError(f"{field}.path: {name}: {where} cannot be read: {reason_of(error)}")


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that a disk, or a quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def reason_of(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class _Listing:
    """A source whose files are listed; `field` is its dotted path, for messages."""

    def __init__(self, source: Source, field: str) -> None:
        self.source, self.field = source, field

    def files(self) -> list[SourceFile]:
        """List them, by what the source's path is."""
        import datasets

        assert self.source.path is not None
        path = Path(self.source.path)
        try:
            if not path.exists():
                return self._hub_files()
            # Files that `save_to_disk` writes: such a folder is one data set, not loose files.
            if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                return self._saved(datasets.load_from_disk(str(path)))
        except (*LIST_ERRORS, datasets.exceptions.DatasetsError) as error:
            raise unreadable(self.field, repr(self.source.path), "it", error) from error
        self._refuse_split("plain files have no splits")
        return self._plain_files(path)

    def _plain_files(self, path: Path) -> list[SourceFile]:
        """List a local file, or the files of a folder; all must have one format."""
        if path.is_file():
            files = [path]
        else:
            # Files of other kinds, such as a README.md, may lie beside the data.
            below = sorted(path.rglob("*"))
            files = [file for file in below if file.is_file() and format_of(file)]
        formats = Counter(format_of(file) for file in files)
        if not files or None in formats:
            raise UserError(
                f"{self.field}.path: {path} holds no file that ends in {', '.join(FORMATS)}."
            )
        if len(formats) > 1:
            found = ", ".join(f"{count} {name}" for name, count in formats.items())
            raise UserError(
                f"{self.field}.path: {path} holds files of several formats ({found}); name a "
                "folder with one."
            )
        sample_by = self.source.sample_by
        others = set(formats) - {"text"}
        if sample_by != "line" and others:
            raise UserError(
                f"{self.field}.sample_by: does not apply to {others.pop()} files; leave it out."
            )
        # Empty files have no format to check, and some libraries refuse them.
        sized = [file for file in files if file.stat().st_size]
        return [
            SourceFile(
                str(file), file_reader(file, sample_by), text_of(file.name, file.stat().st_size)
            )
            for file in sized
        ]

    def _hub_files(self) -> list[SourceFile]:
        """List the files of hub data that our readers read, else the shards of `datasets`."""
        import datasets

        source, name = self.source, repr(self.source.path)
        # Downloaded whole: `datasets` keeps it on the disk as one table, which is read from there.
        if not source.streaming:
            data = datasets.load_dataset(
                source.path, source.name, split=source.split, revision=source.revision
            )
            return [SourceFile(name, dataset_reader(data.to_iterable_dataset), remote=True)]
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
        reader = hub_file_reader(builder)
        listed = (builder.config.data_files or {}).get(source.split) or ()
        addresses = [str(address) for address in listed]
        # File by file, so that a bad record is named by its file and line.
        if reader and addresses:
            labels = [f"{name}, {address}" for address in addresses]
            reads = [reader(address) for address in addresses]
        else:
            data = builder.as_streaming_dataset(split=source.split)
            count = data.num_shards
            labels = [f"{name}, shard {number} of {count}," for number in range(1, count + 1)]
            reads = [
                dataset_reader(functools.partial(data.shard, count, number))
                for number in range(count)
            ]
        texts = self._hub_texts(addresses, len(reads))
        return [
            SourceFile(label, read, text, remote=True)
            for label, read, text in zip(labels, reads, texts, strict=True)
        ]

    def _hub_texts(self, addresses: Sequence[str], count: int) -> list[int]:
        """Characters of text of each file or shard of hub data, about."""
        # `datasets` may make other shards than one of each file; their sizes are not known.
        if len(addresses) != count:
            return [text_of("", None)] * count
        try:
            sizes = listed_sizes(addresses)
        # Each file system and network library has errors of its own.
        except Exception as error:
            raise unreadable(self.field, repr(self.source.path), "it", error) from error
        return [text_of(*both) for both in zip(addresses, sizes, strict=True)]

    def _saved(self, data: Any) -> list[SourceFile]:
        """List a data set that `save_to_disk` wrote, with or without splits."""
        if not isinstance(data, Mapping):
            self._refuse_split("this saved data set has no splits")
        elif self.source.split not in data:
            raise UserError(
                f"{self.field}.split: {self.source.path} has no split {self.source.split!r}; it "
                f"has {', '.join(data)}."
            )
        else:
            data = data[self.source.split]
        return [SourceFile(str(self.source.path), dataset_reader(data.to_iterable_dataset))]

    def _refuse_split(self, reason: str) -> None:
        if self.source.split != "train":
            raise UserError(
                f"{self.field}.split: {self.source.split!r} does not apply, {reason}; leave it out."
            )

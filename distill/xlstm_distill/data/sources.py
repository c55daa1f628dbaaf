"""Where a domain's documents come from: the hub, local files, or the embedded generators."""

from __future__ import annotations

import errno
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xlstm_distill import embedded
from xlstm_distill.artifacts.hashing import digest, hash_if_there
from xlstm_distill.data.readers import (
    BATCH_RECORDS,
    FORMATS,
    BadRecord,
    Reader,
    RecordBatch,
    dataset_reader,
    file_reader,
    format_of,
    hub_file_reader,
)
from xlstm_distill.data.tokenization import Chunk
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Source

STYLES = (("messages",), ("prompt", "response"), ("text",))
"""Roles of the columns of each style, in the order in which they are looked for."""
ROLES = ("messages", "system", "prompt", "response", "text")
NAME_COLUMNS = "Name the right ones with messages, prompt and response, or text."
TABLES = {"parquet", "arrow"}
"""Formats that are read a row group at a time."""
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
Document = Mapping[str, Any]
HEAD_RECORDS = 1024
"""Records at the start of each file that are read before any file is read whole."""
HEAD_RECORDS_OF_TABLES = 8192
"""The same of Parquet and Arrow, which are read a row group at a time: often 1,000 rows to all."""


@dataclass(frozen=True)
class Position:
    """A place between two documents of a source, as JSON values; reading goes on from it exactly.

    visit: number of the visit to a file, in the order of reading.
    record: records of its file before the place.
    read: documents of the source before the place.
    state: state of the file's reader.
    """

    visit: int = 0
    record: int = 0
    read: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class _File:
    """A part of a source that is read in one go: a file, or a shard of hub data."""

    label: str
    read: Reader
    remote: bool = False
    head: int = HEAD_RECORDS_OF_TABLES


@dataclass(frozen=True)
class _Visit:
    """Records of a file that are read in one go: from `first` up to `stop`, or to the end."""

    file: _File
    first: int = 0
    stop: int | None = None

    def take(self, records: list[Document], number: int) -> list[Document]:
        """Take this visit's share of records, the first of which has this number."""
        stop = None if self.stop is None else self.stop - number
        return records[max(0, self.first - number) : stop]


def _visits(files: Sequence[_File], seed: int) -> list[_Visit]:
    """Order the reading of files: first the head of every file, then the rest of every file.

    Both in the same order, drawn from the seed. A few percent of a large data set thus come from
    files from everywhere, where whole files would be a handful.
    """
    if len(files) == 1:
        return [_Visit(files[0])]
    # From the seed alone, so that reading goes on in the same order after a restart.
    order = np.random.default_rng(seed).permutation(len(files))
    shuffled = [files[number] for number in order]
    heads = [_Visit(file, stop=file.head) for file in shuffled]
    return heads + [_Visit(file, first=file.head) for file in shuffled]


def identity(source: Source) -> dict[str, Any]:
    """Return what a source's content depends on, for fingerprints.

    That is its settings, and a hash of local files or of a generator's code.
    """
    settings = source.model_dump(mode="json")
    if source.generator is not None:
        settings["code"] = generators_hash()
    elif source.path is not None and (content := hash_if_there(Path(source.path))):
        settings["path"] = content
    return settings


@functools.cache
def generators_hash() -> str:
    """Hash the files that decide what the embedded generators write."""
    folder = Path(embedded.__file__).parent
    texts = [(folder / name).read_text(encoding="utf-8") for name in embedded.GENERATOR_FILES]
    return digest(texts)


class SourceReader:
    """Read a source in chunks of documents.

    A document has the columns `messages`; `prompt`, `response` and perhaps `system`; or `text`.
    Of several files, the head of each is read first, then the rest of each, in an order drawn from
    the seed: a budget that ends early has then seen files from everywhere. `field` is the source's
    dotted path, for messages.
    """

    def __init__(self, source: Source, field: str, seed: int) -> None:
        self.source, self.field, self.seed = source, field, seed
        self._columns: dict[str, str] = {}

    @property
    def columns(self) -> dict[str, str]:
        """The column that was chosen for each role; empty until documents have been read."""
        return dict(self._columns)

    def chunks(self, start: Position) -> Iterator[tuple[Position, Chunk]]:
        """Yield chunks and where they begin, from a position on.

        Raises:
            UserError: the source is missing, empty, unreadable or lacks a column.
            RunError: hub data stopped coming.
        """
        if self.source.generator is not None:
            yield from self._generated(start)
            return
        visits = _visits(self._files(), self.seed)
        self._columns = self._named_columns()
        # The file to go on with may have other columns than the one that the choice was made by.
        if start.read and not self._columns:
            self._settle_columns(visits)
        here, read = start, start.read
        for visit in visits[start.visit :]:
            for position, documents in self._records(visit, here):
                if self.source.documents is not None:
                    documents = documents[: self.source.documents - position.read]
                if not documents:
                    return
                number = max(position.record, visit.first)
                yield position, Chunk(documents, self.field, visit.file.label, number)
                read = position.read + len(documents)
            here = Position(visit=here.visit + 1, read=read)
        if read == 0:
            raise UserError(
                f"{self.field}: {self.source.path!r}, split {self.source.split!r}, has no "
                "documents."
            )

    def _generated(self, start: Position) -> Iterator[tuple[Position, Chunk]]:
        assert self.source.generator is not None
        assert self.source.documents is not None
        self._columns = {"messages": "messages"}
        label = f"generator {self.source.generator!r}"
        stream = embedded.documents(self.source.generator, self.source.documents, self.seed)
        # All documents come from one random stream, so those before the start are made again.
        rest = itertools.islice(stream, start.record, None)
        position = start
        while batch := list(itertools.islice(rest, BATCH_RECORDS)):
            documents = [{"messages": document["messages"]} for document in batch]
            yield position, Chunk(documents, self.field, label, position.record)
            done = position.record + len(batch)
            position = Position(record=done, read=done)

    def _records(self, visit: _Visit, start: Position) -> Iterator[tuple[Position, list[Document]]]:
        """Yield a visit's documents in batches, and where they begin."""
        position, file = start, visit.file
        batches = file.read(start.state)
        while visit.stop is None or position.record < visit.stop:
            try:
                found = next(batches, None)
            # Each format and decompressor has errors of its own. Nothing but reading can fail here.
            except Exception as error:
                raise self._unreadable(file, position, error) from error
            if found is None:
                return
            batch, state = found
            records = self._documents(batch, file, position)
            documents = visit.take(records, position.record)
            if documents:
                yield position, documents
            position = Position(
                visit=position.visit,
                record=position.record + len(records),
                read=position.read + len(documents),
                state=state,
            )

    def _unreadable(self, file: _File | None, position: Position, error: Exception) -> Exception:
        """Make the error for a file that cannot be read, or without a file for the whole source.

        It names the file and the place in it. Hub data that stops after its first documents is a
        RunError, because the same command can go on later.
        """
        # A full disk (the hub's cache) is no fault of the source.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"record {position.record + 1} or one soon after it" if position.record else "it"
        if isinstance(error, BadRecord):
            where = error.where
        elif file and file.remote and position.read:
            return RunError(
                f"{self.field}: {file.label} stopped at {where}: {reason}. Run the command again "
                "to go on from the last finished shard."
            )
        name = file.label if file else repr(self.source.path)
        return UserError(f"{self.field}.path: {name}: {where} cannot be read: {reason}")

    def _documents(self, batch: RecordBatch, file: _File, position: Position) -> list[Document]:
        """Take the columns that the recipe names, else those with the usual names.

        Where a record lacks one (JSON has no schema), it has null.
        """
        columns = self._columns or self._choose_columns(batch)
        missing = [column for column in columns.values() if column not in batch]
        # Later records of a file may lack a column, but a whole file without it is a mistake.
        if missing and not position.record:
            raise UserError(
                f"{self.field}: {file.label} has no column {missing[0]!r} "
                f"(record {position.record + 1}); it has {', '.join(sorted(batch))}. {NAME_COLUMNS}"
            )
        self._columns = columns
        nulls = [None] * len(next(iter(batch.values()), []))
        values = [batch.get(column, nulls) for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def _named_columns(self) -> dict[str, str]:
        named = {role: getattr(self.source, role) for role in ROLES}
        return {role: column for role, column in named.items() if column is not None}

    def _choose_columns(self, batch: RecordBatch) -> dict[str, str]:
        if columns := self._named_columns():
            return columns
        for style in STYLES:
            if all(role in batch for role in style):
                return {role: role for role in style}
        raise UserError(
            f"{self.field}: {self.source.path!r} has none of the columns messages, prompt + "
            f"response, text; it has {', '.join(sorted(batch))}. {NAME_COLUMNS}"
        )

    def _settle_columns(self, visits: Sequence[_Visit]) -> None:
        """Choose columns by the first file with a record, as reading from the beginning does."""
        for visit in visits:
            # `_documents` has kept the choice by then.
            if next(self._records(visit, Position()), None):
                return

    def _files(self) -> list[_File]:
        """List the source's files; of hub data, its shards."""
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
            raise self._unreadable(None, Position(), error) from error
        self._refuse_split("plain files have no splits")
        return self._plain_files(path)

    def _plain_files(self, path: Path) -> list[_File]:
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
        head = HEAD_RECORDS_OF_TABLES if formats.keys() & TABLES else HEAD_RECORDS
        return [_File(str(file), file_reader(file, sample_by), head=head) for file in sized]

    def _hub_files(self) -> list[_File]:
        """List the files of hub data that our readers read, else the shards of `datasets`."""
        import datasets

        source, name = self.source, repr(self.source.path)
        # Downloaded whole: `datasets` keeps it on the disk as one table, which is read from there.
        if not source.streaming:
            data = datasets.load_dataset(
                source.path, source.name, split=source.split, revision=source.revision
            )
            return [_File(name, dataset_reader(data.to_iterable_dataset), remote=True)]
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
        reader = hub_file_reader(builder)
        addresses = (builder.config.data_files or {}).get(source.split)
        # File by file, so that a bad record is named by its file and line.
        if reader and addresses:
            return [
                _File(f"{name}, {address}", reader(str(address)), remote=True, head=HEAD_RECORDS)
                for address in addresses
            ]
        data = builder.as_streaming_dataset(split=source.split)
        count = data.num_shards
        found = []
        for number in range(count):
            label = f"{name}, shard {number + 1} of {count},"
            shard = functools.partial(data.shard, count, number)
            found.append(_File(label, dataset_reader(shard), remote=True))
        return found

    def _saved(self, data: Any) -> list[_File]:
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
        return [_File(str(self.source.path), dataset_reader(data.to_iterable_dataset))]

    def _refuse_split(self, reason: str) -> None:
        if self.source.split != "train":
            raise UserError(
                f"{self.field}.split: {self.source.split!r} does not apply, {reason}; leave it out."
            )

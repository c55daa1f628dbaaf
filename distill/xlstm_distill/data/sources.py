"""Where a domain's documents come from: the hub, local files, or the embedded generators."""

from __future__ import annotations

import errno
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xlstm_distill import embedded
from xlstm_distill.artifacts.hashing import digest, hash_path
from xlstm_distill.data.readers import (
    BATCH_RECORDS,
    BadRecord,
    Reader,
    RecordBatch,
    csv_reader,
    dataset_reader,
    json_reader,
)
from xlstm_distill.data.tokenization import Chunk
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Source

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".csv": "csv",
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
STYLES = (("messages",), ("prompt", "response"), ("text",))
ROLES = ("messages", "system", "prompt", "response", "text")
LIST_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    pa.ArrowException,
)
"""What `datasets` raises, besides its own errors, on a data set or folder that it cannot make out."""
OWN_READERS: Mapping[str, Callable[[str], Reader]] = {"json": json_reader, "csv": csv_reader}
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Position:
    """A place between two documents of a source, as JSON values, from which reading goes on exactly.

    `file` counts in the order of reading; `state` is that of the file's data set, `record` the records of the file
    before it, `read` all documents before it.
    """

    file: int = 0
    record: int = 0
    read: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class _File:
    """A part of a source that is read in one go: a file, or a shard of hub data."""

    label: str
    read: Reader
    remote: bool = False


def identity(source: Source) -> dict[str, Any]:
    """What a source's content depends on, for fingerprints: its settings and a hash of local files or a generator."""
    settings = source.model_dump(mode="json")
    if source.generator is not None:
        settings["code"] = _generators_hash()
    elif source.path is not None and (path := Path(source.path)).exists():
        settings["path"] = hash_path(path)
    return settings


@functools.cache
def _generators_hash() -> str:
    """Hash of the files that decide what the embedded generators write."""
    folder = Path(embedded.__file__).parent
    return digest(
        [(folder / name).read_text(encoding="utf-8") for name in embedded.GENERATOR_FILES]
    )


class SourceReader:
    """Reads a source in chunks of documents with the columns `messages`, `prompt` and `response`, or `text`.

    Files are read in an order drawn from the seed, so that a budget that ends early has seen files from everywhere.
    `field` is the source's dotted path, for messages.
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
        files = self._files()
        order = np.random.default_rng(self.seed).permutation(len(files))
        self._columns = self._named_columns()
        if start.read and not self._columns:
            self._settle_columns([files[number] for number in order])
        here, read = start, start.read
        for number in order[start.file :]:
            for position, documents in self._records(files[number], here):
                if self.source.documents is not None:
                    documents = documents[: self.source.documents - position.read]
                if not documents:
                    return
                yield position, Chunk(documents, self.field, files[number].label, position.record)
                read = position.read + len(documents)
            here = Position(file=here.file + 1, read=read)
        if read == 0:
            raise UserError(
                f"{self.field}: {self.source.path!r}, split {self.source.split!r}, has no documents."
            )

    def _generated(self, start: Position) -> Iterator[tuple[Position, Chunk]]:
        assert self.source.generator is not None
        assert self.source.documents is not None
        self._columns = {"messages": "messages"}
        label = f"generator {self.source.generator!r}"
        stream = embedded.documents(self.source.generator, self.source.documents, self.seed)
        rest = itertools.islice(stream, start.record, None)
        position = start
        while batch := list(itertools.islice(rest, BATCH_RECORDS)):
            documents = [{"messages": document["messages"]} for document in batch]
            yield position, Chunk(documents, self.field, label, position.record)
            done = position.record + len(batch)
            position = Position(record=done, read=done)

    def _records(self, file: _File, start: Position) -> Iterator[tuple[Position, list[Document]]]:
        """Yield a file's documents in batches, and where they begin."""
        position, batches = start, file.read(start.state)
        while True:
            try:
                found = next(batches, None)
            except Exception as error:  # each format and decompressor has errors of its own; here is nothing but reading
                raise self._unreadable(file, position, error) from error
            if found is None:
                return
            documents = self._documents(found[0], file, position)
            yield position, documents
            count = len(documents)
            position = Position(
                position.file, position.record + count, position.read + count, found[1]
            )

    def _unreadable(self, file: _File | None, position: Position, error: Exception) -> Exception:
        """Say which file could not be read, and where in it; without a file, that the source could not be listed."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"record {position.record + 1} or one soon after it" if position.record else "it"
        if isinstance(error, BadRecord):
            where = error.where
        elif file and file.remote and position.read:
            return RunError(
                f"{self.field}: {file.label} stopped at {where}: {reason}. Run the command again to go on from the "
                "last finished shard."
            )
        return UserError(
            f"{self.field}.path: {file.label if file else repr(self.source.path)}: {where} cannot be read: {reason}"
        )

    def _documents(self, batch: RecordBatch, file: _File, position: Position) -> list[Document]:
        """Take the columns that the recipe names, else those with the usual names.

        A file has its columns from the first batch on; what lacks one later (JSON has no schema) has null there.
        """
        columns = self._columns or self._choose_columns(batch)
        missing = [column for column in columns.values() if column not in batch]
        if missing and not position.record:
            raise UserError(
                f"{self.field}: {file.label} has no column {missing[0]!r} (record {position.record + 1}); it has "
                f"{', '.join(sorted(batch))}. Name the right ones with messages, prompt and response, or text."
            )
        self._columns = columns
        nulls = [None] * len(next(iter(batch.values()), []))
        rows = zip(*(batch.get(column, nulls) for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

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
            f"{self.field}: {self.source.path!r} has none of the columns messages, prompt + response, text; it has "
            f"{', '.join(sorted(batch))}. Name the right ones with messages, prompt and response, or text."
        )

    def _settle_columns(self, files: Sequence[_File]) -> None:
        """Choose columns as reading from the beginning does, by the first file that has a record."""
        for file in files:
            if next(self._records(file, Position()), None):
                return

    def _files(self) -> list[_File]:
        """List the source's files; of hub data, its shards."""
        import datasets

        assert self.source.path is not None
        path = Path(self.source.path)
        try:
            if not path.exists():
                return self._hub_files()
            if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
                return self._saved(datasets.load_from_disk(str(path)))
        except (*LIST_ERRORS, datasets.exceptions.DatasetsError) as error:
            raise self._unreadable(None, Position(), error) from error
        self._refuse_split("plain files have no splits")
        files = (
            [path]
            if path.is_file()
            else sorted(p for p in path.rglob("*") if p.is_file() and _builder(p))
        )
        formats = Counter(_builder(file) for file in files)
        if not files or None in formats:
            raise UserError(
                f"{self.field}.path: {path} holds no file that ends in {', '.join(BUILDERS)}."
            )
        if len(formats) > 1:
            found = ", ".join(f"{count} {name}" for name, count in formats.items())
            raise UserError(
                f"{self.field}.path: {path} holds files of several formats ({found}); name a folder with one."
            )
        if self.source.sample_by != "line" and (others := set(formats) - {"text"}):
            raise UserError(
                f"{self.field}.sample_by: does not apply to {others.pop()} files; leave it out."
            )
        return [_File(str(file), self._reader(file)) for file in files if file.stat().st_size]

    def _reader(self, file: Path) -> Reader:
        """How a local file is read."""
        builder = str(_builder(file))
        if builder in OWN_READERS:
            return OWN_READERS[builder](str(file))
        options = {"sample_by": self.source.sample_by} if builder == "text" else {}
        return dataset_reader(functools.partial(_open_file, file, builder, options))

    def _hub_files(self) -> list[_File]:
        """List hub data by files where these are read here, else by the shards that `datasets` makes of it."""
        import datasets

        source, name = self.source, repr(self.source.path)
        if not source.streaming:
            data = datasets.load_dataset(
                source.path, source.name, split=source.split, revision=source.revision
            )
            return [_File(name, dataset_reader(data.to_iterable_dataset), remote=True)]
        builder = datasets.load_dataset_builder(source.path, source.name, revision=source.revision)
        reader, addresses = (
            _own_reader(builder),
            (builder.config.data_files or {}).get(source.split),
        )
        if reader and addresses:
            return [
                _File(f"{name}, {address}", reader(str(address)), remote=True)
                for address in addresses
            ]
        data = builder.as_streaming_dataset(split=source.split)
        count = data.num_shards
        shards = [functools.partial(data.shard, count, n) for n in range(count)]
        return [
            _File(f"{name}, shard {n + 1} of {count},", dataset_reader(shard), remote=True)
            for n, shard in enumerate(shards)
        ]

    def _saved(self, data: Any) -> list[_File]:
        """A data set that `save_to_disk` wrote, with or without splits."""
        if not isinstance(data, Mapping):
            self._refuse_split("this saved data set has no splits")
        elif self.source.split not in data:
            raise UserError(
                f"{self.field}.split: {self.source.path} has no split {self.source.split!r}; it has {', '.join(data)}."
            )
        else:
            data = data[self.source.split]
        return [_File(str(self.source.path), dataset_reader(data.to_iterable_dataset))]

    def _refuse_split(self, reason: str) -> None:
        if self.source.split != "train":
            raise UserError(
                f"{self.field}.split: {self.source.split!r} does not apply, {reason}; leave it out."
            )


def _builder(file: Path) -> str | None:
    """The format of a file by its name, compressed or not."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return BUILDERS.get(Path(name).suffix)


def _open_file(file: Path, builder: str, options: Mapping[str, Any]) -> Any:
    """Open a file as a streaming data set; None if it has no record."""
    import datasets

    try:
        return datasets.load_dataset(
            builder, data_files=[str(file)], split="train", streaming=True, **options
        )
    except StopIteration:  # what datasets raises on a file without a record
        return None


def _own_reader(builder: Any) -> Callable[[str], Reader] | None:
    """The reader of this project that does what a hub data set's builder does, but without a schema; None if none."""
    from datasets.packaged_modules.csv.csv import Csv, CsvConfig
    from datasets.packaged_modules.json.json import Json

    config = builder.config
    if isinstance(builder, Json) and (config.field, config.encoding, config.encoding_errors) == (
        None,
        "utf-8",
        None,
    ):
        return json_reader
    if isinstance(builder, Csv) and config.pd_read_csv_kwargs == CsvConfig().pd_read_csv_kwargs:
        return csv_reader
    return None

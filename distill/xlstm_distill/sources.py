"""Where a domain's documents come from: the hub, local files, or the embedded generators."""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from xlstm_distill import embedded
from xlstm_distill.artifacts import hash_path
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Source
from xlstm_distill.tokenization import Chunk

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".csv": "csv"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
STYLES = (("messages",), ("prompt", "response"), ("text",))
READ_ERRORS = (OSError, ValueError, EOFError, ImportError, zlib.error, lzma.LZMAError, pa.ArrowException)
CHUNK_DOCUMENTS = 64
WHOLE_HASH_BYTES, END_BYTES = 2**30, 2**20
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
    """A part of a source that is read in one go: a file, a shard of hub data, or a generator's output."""

    label: str
    path: Path | None
    open: Callable[[], Any]


def identity(source: Source) -> dict[str, Any]:
    """What a source's content depends on, for fingerprints: its settings and, for local files, a hash."""
    settings = source.model_dump(mode="json")
    if source.path is not None and (path := Path(source.path)).exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        stamps = tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
        settings["path"] = _content_hash(path, stamps)
    return settings


@functools.lru_cache(maxsize=256)
def _content_hash(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Hash a file or folder; above 1 GiB in all, of each file the name, the size and both ends.

    Every stage asks, so the answer is kept for as long as sizes and times of change stay.
    """
    if sum(size for _, size, _ in stamps) <= WHOLE_HASH_BYTES:
        return hash_path(path)
    total = hashlib.sha256()
    for name, size, _ in stamps:
        total.update(f"{os.path.relpath(name, path)}\0{size}\0".encode())
        with open(name, "rb") as stream:
            total.update(stream.read(END_BYTES))
            stream.seek(max(0, size - END_BYTES))
            total.update(stream.read())
    return total.hexdigest()[:32]


class SourceReader:
    """Reads a source in chunks of documents with the columns `messages`, `prompt` and `response`, or `text`.

    Files are read in an order drawn from the seed, so that a budget that ends early has seen files from everywhere.
    `field` is the source's dotted path, for messages.
    """

    def __init__(self, source: Source, field: str, seed: int) -> None:
        self.source, self.field, self.seed = source, field, seed
        self._columns: dict[str, str] = {}

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
        here, read = start, start.read
        for number in np.random.default_rng(self.seed).permutation(len(files))[start.file :]:
            for position, documents in self._records(files[number], here):
                if self.source.documents is not None:
                    documents = documents[: self.source.documents - position.read]
                if not documents:
                    return
                yield position, Chunk(documents, self.field, files[number].label, position.record)
                read = position.read + len(documents)
            here = Position(file=here.file + 1, read=read)
        if read == 0:
            raise UserError(f"{self.field}: {self.source.path!r}, split {self.source.split!r}, has no documents.")

    def _generated(self, start: Position) -> Iterator[tuple[Position, Chunk]]:
        assert self.source.generator is not None
        assert self.source.documents is not None
        label = f"generator {self.source.generator!r}"
        stream = embedded.documents(self.source.generator, self.source.documents, self.seed)
        rest = itertools.islice(stream, start.record, None)
        position = start
        while batch := list(itertools.islice(rest, CHUNK_DOCUMENTS)):
            documents = [{"messages": document["messages"]} for document in batch]
            yield position, Chunk(documents, self.field, label, position.record)
            done = position.record + len(batch)
            position = Position(record=done, read=done)

    def _records(self, file: _File, start: Position) -> Iterator[tuple[Position, list[Document]]]:
        """Yield a file's documents in batches, and where they begin."""
        import datasets

        position = start
        try:
            data = file.open()
            if data is None:
                return
            if start.state is not None:
                data.load_state_dict(start.state)
            for batch in data.iter(CHUNK_DOCUMENTS):
                documents = self._documents(batch, file, position)
                yield position, documents
                position = Position(
                    file=position.file,
                    record=position.record + len(documents),
                    read=position.read + len(documents),
                    state=data.state_dict(),
                )
        except (*READ_ERRORS, datasets.exceptions.DatasetsError) as error:
            raise self._unreadable(file, position, error) from error

    def _unreadable(self, file: _File, position: Position, error: Exception) -> Exception:
        """Say which file could not be read, and where in it."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"record {position.record + 1} or one soon after it"
        if file.path is None and position.read:
            return RunError(
                f"{self.field}: {file.label} stopped at {where}: {reason}. Run the command again to go on from the "
                "last finished shard."
            )
        if file.path is not None and (line := _bad_json_line(file.path)) is not None:
            where, reason = f"line {line[0]}", line[1]
        elif not position.record:
            where = "it"
        return UserError(f"{self.field}.path: {file.label}: {where} cannot be read: {reason}")

    def _documents(self, batch: Mapping[str, list[Any]], file: _File, position: Position) -> list[Document]:
        """Take the columns that the recipe names, else those with the usual names."""
        columns = self._columns or self._choose_columns(batch)
        if missing := [column for column in columns.values() if column not in batch]:
            raise UserError(
                f"{self.field}: {file.label} has no column {missing[0]!r} (record {position.record + 1}); it has "
                f"{', '.join(sorted(batch))}. Name the right ones with messages, prompt and response, or text."
            )
        self._columns = columns
        rows = zip(*(batch[column] for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _choose_columns(self, batch: Mapping[str, Any]) -> dict[str, str]:
        named = {role: getattr(self.source, role) for style in STYLES for role in style}
        if columns := {role: column for role, column in named.items() if column is not None}:
            return columns
        for style in STYLES:
            if all(role in batch for role in style):
                return {role: role for role in style}
        raise UserError(
            f"{self.field}: {self.source.path!r} has none of the columns messages, prompt + response, text; it has "
            f"{', '.join(sorted(batch))}. Name the right ones with messages, prompt and response, or text."
        )

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
        except (*READ_ERRORS, datasets.exceptions.DatasetsError) as error:
            raise self._unreadable(_File(repr(self.source.path), None, lambda: None), Position(), error) from error
        self._refuse_split("plain files have no splits")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _builder(p))
        formats = Counter(_builder(file) for file in files)
        if not files or None in formats:
            raise UserError(f"{self.field}.path: {path} holds no file that ends in {', '.join(BUILDERS)}.")
        if len(formats) > 1:
            found = ", ".join(f"{count} {name}" for name, count in formats.items())
            raise UserError(
                f"{self.field}.path: {path} holds files of several formats ({found}); name a folder with one."
            )
        return [_File(str(file), file, functools.partial(_open_file, file)) for file in files if file.stat().st_size]

    def _hub_files(self) -> list[_File]:
        import datasets

        source = self.source
        data = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=source.streaming
        )
        if isinstance(data, datasets.Dataset):
            return [_File(f"{source.path!r}", None, data.to_iterable_dataset)]
        count = data.num_shards
        return [
            _File(f"{source.path!r}, shard {n + 1} of {count},", None, functools.partial(data.shard, count, n))
            for n in range(count)
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
        return [_File(str(self.source.path), None, data.to_iterable_dataset)]

    def _refuse_split(self, reason: str) -> None:
        if self.source.split != "train":
            raise UserError(f"{self.field}.split: {self.source.split!r} does not apply, {reason}; leave it out.")


def _builder(file: Path) -> str | None:
    """The format of a file by its name, compressed or not."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return BUILDERS.get(Path(name).suffix)


def _open_file(file: Path) -> Any:
    """Open a file as a streaming data set; None if it has no record."""
    import datasets

    try:
        return datasets.load_dataset(str(_builder(file)), data_files=[str(file)], split="train", streaming=True)
    except StopIteration:  # what datasets raises on a file without a record
        return None


def _bad_json_line(file: Path) -> tuple[int, str] | None:
    """Find the first line of a JSON-lines file that is no JSON; None where lines are not the trouble."""
    if file.suffix != ".jsonl":
        return None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line or b"null")
            except ValueError as error:
                return number, str(error)
    return None

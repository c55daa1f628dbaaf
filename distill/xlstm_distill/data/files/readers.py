"""Readers of data files: records in batches of columns, each with the state after it.

A reader goes on from a state exactly where it stopped.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

BATCH_RECORDS = 64
AHEAD_RECORDS = 1000
"""Records at the start of a JSON file whose keys are its columns."""
CSV_RECORDS = 4096
BLOCK_BYTES = 2**20
FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".csv": "csv",
}
"""File endings and their formats, as `datasets` names them."""
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
Item = TypeVar("Item")
RecordBatch = Mapping[str, list[Any]]
State = dict[str, Any]
Reader = Callable[[State | None], Iterator[tuple[RecordBatch, State]]]
"""Yields batches of a file, from its beginning (None) or from a state, which is a JSON value."""


class BadRecord(ValueError):
    """A record that cannot be read; `where` names it by line or number."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where = where


def format_of(file: Path) -> str | None:
    """Return a file's format by its name, compressed or not; None if it is not known."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return FORMATS.get(Path(name).suffix)


def file_reader(file: Path, sample_by: str) -> Reader:
    """Return the reader of a local file; `sample_by` says what a document of a text file is."""
    form = format_of(file)
    assert form is not None, f"{file} was listed without a known ending"
    if form == "json":
        return json_reader(str(file))
    # `datasets` would read CSV by guessed types: "007" would become 7.
    if form == "csv":
        return csv_reader(str(file))
    options = {"sample_by": sample_by} if form == "text" else {}
    return dataset_reader(functools.partial(_open_dataset, file, form, options))


def hub_file_reader(builder: Any) -> Callable[[str], Reader] | None:
    """Return our own reader for the files of a hub data set, or None if `datasets` must read them.

    Ours does what the data set's builder does, but without a schema. It knows no options, so it is
    not used where the data set sets some.
    """
    from datasets.packaged_modules.csv.csv import Csv, CsvConfig
    from datasets.packaged_modules.json.json import Json

    config = builder.config
    if isinstance(builder, Json):
        options = (config.field, config.encoding, config.encoding_errors)
        return json_reader if options == (None, "utf-8", None) else None
    if isinstance(builder, Csv):
        default = CsvConfig().pd_read_csv_kwargs
        return csv_reader if config.pd_read_csv_kwargs == default else None
    return None


def dataset_reader(load: Callable[[], Any]) -> Reader:
    """Read what `datasets` reads, with the schema it finds.

    `load` returns a streaming data set, or None if it has no record.
    """

    def batches(state: State | None) -> Iterator[tuple[RecordBatch, State]]:
        data = load()
        if data is None:
            return
        if state is not None:
            data.load_state_dict(state)
        for batch in data.iter(BATCH_RECORDS):
            # The state after the batch: where reading goes on.
            yield batch, data.state_dict()

    return batches


def _open_dataset(file: Path, form: str, options: Mapping[str, Any]) -> Any:
    """Open a file as a streaming data set; None if it has no record."""
    import datasets

    try:
        return datasets.load_dataset(
            form, data_files=[str(file)], split="train", streaming=True, **options
        )
    except StopIteration:  # what `datasets` raises on a file without a record
        return None


def json_reader(path: str) -> Reader:
    """Read JSON: one object per line, or one list of objects or texts; compressed or not.

    The path is local or on the hub. Each record is taken as it is. `datasets` would fix the types
    of all columns by the first 10 MB; a later record with another type would then be an error, even
    in a column that nobody asked for.
    """
    return functools.partial(_json_batches, path)


def csv_reader(path: str) -> Reader:
    """Read CSV, every value as text: `NA` and `5` are texts too."""
    return functools.partial(_csv_batches, path)


def open_bytes(path: str) -> BinaryIO:
    """Open a local file or a hub address for reading, decompressed."""
    import datasets
    from datasets.utils.file_utils import xopen

    file = xopen(datasets.StreamingDownloadManager().extract(path), "rb")
    if not isinstance(file, io.BufferedReader):
        file = io.BufferedReader(_Raw(file), BLOCK_BYTES)
    return cast(BinaryIO, file)


class _Raw(io.RawIOBase):
    """A file to buffer. Reading goes through `read` alone.

    `datasets` tries a `read` of a remote file again when the connection breaks, but no other way of
    reading.
    """

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._file.seek(offset, whence)
        return int(self._file.tell())

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def _json_batches(path: str, state: State | None) -> Iterator[tuple[RecordBatch, State]]:
    with open_bytes(path) as file:
        records = _json_records(file, state or {})
        # A column that only some records have must be known from the first batch on. A file that is
        # gone on with needs no look ahead: its columns have been chosen.
        ahead = deque(itertools.islice(records, 0 if state else AHEAD_RECORDS))
        known = _keys(ahead)
        # Emptied as it is read: several files are open at once.
        rest = itertools.chain(_emptied(ahead), records)
        while batch := list(itertools.islice(rest, BATCH_RECORDS)):
            names = known | _keys(batch)
            columns = {}
            for name in names:
                columns[name] = [record.get(name) for record, _ in batch]
            _, after = batch[-1]
            yield columns, after


def _emptied(waiting: deque[Item]) -> Iterator[Item]:
    while waiting:
        yield waiting.popleft()


def _keys(batch: Iterable[tuple[dict[str, Any], State]]) -> dict[str, None]:
    """Collect the keys of records in the order in which they first appear."""
    return dict.fromkeys(name for record, _ in batch for name in record)


def _json_records(file: BinaryIO, state: State) -> Iterator[tuple[dict[str, Any], State]]:
    """Yield records, each with the state after it.

    The state is the next line's place (bytes) and number, or the record's number in a list.
    """
    offset, number = state.get("offset", 0), state.get("line", 0)
    _skip(file, offset)
    for line in file:
        offset += len(line)
        number += 1
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if text.startswith(b"["):
            listed = _parsed(text + file.read(), "its list")
            yield from itertools.islice(_listed(listed), state.get("record", 0), None)
            return
        if text:
            where = f"line {number}"
            yield _object(_parsed(text, where), where), {"offset": offset, "line": number}


def _listed(values: Iterable[Any]) -> Iterator[tuple[dict[str, Any], State]]:
    """Yield the records of a JSON list; a text is a record with the column `text`."""
    for number, value in enumerate(values, 1):
        record = {"text": value} if isinstance(value, str) else _object(value, f"record {number}")
        yield record, {"record": number}


def _parsed(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        hint = ""
        if where == "line 1":
            hint = " (a JSON file holds one object per line, or one list of them)"
        raise BadRecord(where, f"{error}{hint}") from None
    # An escape such as \\ud83d alone is half a character, which no tokenizer takes. It becomes "?".
    if b"\\ud" in text or b"\\uD" in text:
        whole = json.dumps(value, ensure_ascii=False)
        value = json.loads(whole.encode("utf-8", "replace"))
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(where, f"it is {type(value).__name__}; an object with columns is needed")
    return value


def _skip(file: BinaryIO, count: int) -> None:
    """Go forward from the beginning (bytes)."""
    if count == 0:
        return
    with contextlib.suppress(OSError, ValueError):
        file.seek(count)
        return
    # Some decompressors and remote files cannot seek: read what is to be skipped.
    while count > 0 and (block := file.read(min(count, BLOCK_BYTES))):
        count -= len(block)


def _csv_batches(path: str, state: State | None) -> Iterator[tuple[RecordBatch, State]]:
    import pandas

    done = (state or {}).get("record", 0)
    seen = 0
    with open_bytes(path) as file:
        # By default pandas reads "NA", "null" and "" as missing values, and digits as numbers.
        frames = pandas.read_csv(
            file, dtype=str, keep_default_na=False, na_filter=False, chunksize=CSV_RECORDS
        )
        for frame in frames:
            columns = {str(name): values for name, values in frame.to_dict("list").items()}
            # A CSV record can span lines, so there is no place to go on from: earlier records are
            # parsed again and passed over.
            for start in range(max(0, done - seen), len(frame), BATCH_RECORDS):
                stop = min(start + BATCH_RECORDS, len(frame))
                batch = {name: values[start:stop] for name, values in columns.items()}
                yield batch, {"record": seen + stop}
            seen += len(frame)

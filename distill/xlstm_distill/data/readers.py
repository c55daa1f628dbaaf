"""Readers of data files: records in batches of columns, each with the state from which reading goes on after it."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, cast

BATCH_RECORDS = 64
AHEAD_RECORDS = 1000
"""Records from whose keys a JSON file's columns are known."""
CSV_RECORDS = 4096
BLOCK_BYTES = 2**20
RecordBatch = Mapping[str, list[Any]]
State = dict[str, Any]
Reader = Callable[[State | None], Iterator[tuple[RecordBatch, State]]]
"""Yields batches of a file, from its beginning or from a state on, which is a JSON value."""


class BadRecord(ValueError):
    """A record that is no record; `where` names it by line or number."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where = where


def dataset_reader(load: Callable[[], Any]) -> Reader:
    """Read what `datasets` reads, with the schema it finds; `load` gives a streaming data set, or None if empty."""

    def batches(state: State | None) -> Iterator[tuple[RecordBatch, State]]:
        data = load()
        if data is None:
            return
        if state is not None:
            data.load_state_dict(state)
        for batch in data.iter(BATCH_RECORDS):
            yield batch, data.state_dict()

    return batches


def json_reader(path: str) -> Reader:
    """Read JSON: one object per line, or one list of objects or texts, compressed or not, local or on the hub.

    Each record is taken as it is. `datasets` would fix the types of all columns by the first 10 MB and fail on a later
    record that differs, be it in a column that nobody asked for.
    """
    return functools.partial(_json_batches, path)


def csv_reader(path: str) -> Reader:
    """Read CSV, every value as the text that it is: `NA` and `5` are texts too."""
    return functools.partial(_csv_batches, path)


def open_bytes(path: str) -> BinaryIO:
    """Open a local file or a hub address for reading, decompressed."""
    import datasets
    from datasets.utils.file_utils import xopen

    file = xopen(datasets.StreamingDownloadManager().extract(path), "rb")
    return cast(
        BinaryIO,
        file if isinstance(file, io.BufferedReader) else io.BufferedReader(_Raw(file), BLOCK_BYTES),
    )


class _Raw(io.RawIOBase):
    """A file to buffer, of which only `read` is used: it is what `datasets` tries again when a connection breaks."""

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
        ahead = list(itertools.islice(records, 0 if state else AHEAD_RECORDS))
        known = dict.fromkeys(name for record, _ in ahead for name in record)
        rest = itertools.chain(ahead, records)
        while batch := list(itertools.islice(rest, BATCH_RECORDS)):
            names = known | dict.fromkeys(name for record, _ in batch for name in record)
            yield {name: [record.get(name) for record, _ in batch] for name in names}, batch[-1][1]


def _json_records(file: BinaryIO, state: State) -> Iterator[tuple[dict[str, Any], State]]:
    """Yield records, each with the state after it: the next line's place in bytes, or a number in a list."""
    offset, number = state.get("offset", 0), state.get("line", 0)
    _skip(file, offset)
    for line in file:
        offset, number = offset + len(line), number + 1
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if text.startswith(b"["):
            listed = _parsed(text + file.read(), "its list")
            yield from itertools.islice(_listed(listed), state.get("record", 0), None)
            return
        if text:
            yield (
                _object(_parsed(text, f"line {number}"), f"line {number}"),
                {"offset": offset, "line": number},
            )


def _listed(values: Iterable[Any]) -> Iterator[tuple[dict[str, Any], State]]:
    for number, value in enumerate(values, 1):
        record = {"text": value} if isinstance(value, str) else _object(value, f"record {number}")
        yield record, {"record": number}


def _parsed(text: bytes, where: str) -> Any:
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        hint = (
            " (a JSON file holds one object per line, or one list of them)"
            if where == "line 1"
            else ""
        )
        raise BadRecord(where, f"{error}{hint}") from None
    if b"\\ud" in text or b"\\uD" in text:  # perhaps half a character, which no tokenizer takes
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(where, f"it is {type(value).__name__}; an object with columns is needed")
    return value


def _skip(file: BinaryIO, count: int) -> None:
    """Go forward by bytes from the beginning, also where a decompressor or a remote file cannot seek."""
    if count == 0:
        return
    with contextlib.suppress(OSError, ValueError):
        file.seek(count)
        return
    while count > 0 and (block := file.read(min(count, BLOCK_BYTES))):
        count -= len(block)


def _csv_batches(path: str, state: State | None) -> Iterator[tuple[RecordBatch, State]]:
    import pandas

    done, seen = (state or {}).get("record", 0), 0
    with open_bytes(path) as file:
        for frame in pandas.read_csv(
            file, dtype=str, keep_default_na=False, na_filter=False, chunksize=CSV_RECORDS
        ):
            columns = {str(name): values for name, values in frame.to_dict("list").items()}
            for start in range(max(0, done - seen), len(frame), BATCH_RECORDS):
                stop = min(start + BATCH_RECORDS, len(frame))
                yield (
                    {name: values[start:stop] for name, values in columns.items()},
                    {"record": seen + stop},
                )
            seen += len(frame)

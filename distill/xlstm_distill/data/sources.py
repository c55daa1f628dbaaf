"""Where a domain's documents come from: the hub, local files, or the embedded generators."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlstm_distill import embedded
from xlstm_distill.artifacts.hashing import digest, hash_if_there
from xlstm_distill.data.files.listing import is_full_disk, reason_of, source_files, unreadable
from xlstm_distill.data.files.order import (
    Lane,
    Place,
    Position,
    SourceFile,
    Visit,
    lanes_of,
    text_size,
)
from xlstm_distill.data.files.readers import BATCH_RECORDS, BadRecord, RecordBatch
from xlstm_distill.data.tokenization import Chunk
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Source

STYLES = (("messages",), ("prompt", "response"), ("text",))
"""Roles of the columns of each style, in the order in which they are looked for."""
ROLES = ("messages", "system", "prompt", "response", "text")
NAME_COLUMNS = "Name the right ones with messages, prompt and response, or text."
Document = Mapping[str, Any]


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
    Of several files, all are read side by side, each in proportion to its size, in an order drawn
    from the seed (`lanes_of`). `field` is the source's dotted path, for messages.
    """

    def __init__(self, source: Source, field: str, seed: int) -> None:
        self.source, self.field, self.seed = source, field, seed
        self._columns: dict[str, str] = {}
        # Whether documents have come, in this process or before.
        self._begun = False
        # By file: a place shortly before the end of its last visit, from where the next one reads.
        self._left: dict[str, Place] = {}
        # Files whose end has been seen, by label.
        self._ended: set[str] = set()

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
        self._begun = start.read > 0
        if self.source.generator is not None:
            yield from self._generated(start)
            return
        lanes = lanes_of(source_files(self.source, self.field), self.seed)
        self._columns = self._named_columns()
        # The files to go on with may have other columns than the one that the choice was made by.
        if start.read and not self._columns:
            # As reading from the beginning does; `_documents` keeps the choice.
            next(self._side_by_side(lanes, Position()), None)
            self._left.clear()
            self._ended.clear()
        for position, chunk in self._side_by_side(lanes, start):
            if self.source.documents is not None:
                left = max(0, self.source.documents - position.read)
                chunk = replace(chunk, documents=chunk.documents[:left])
            if not chunk.documents:
                return
            self._begun = True
            yield position, chunk
        if not self._begun:
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
        rest = itertools.islice(stream, start.read, None)
        position = start
        while batch := list(itertools.islice(rest, BATCH_RECORDS)):
            documents = [{"messages": document["messages"]} for document in batch]
            yield position, Chunk(documents, self.field, label, position.read)
            position = Position(position.read + len(batch))

    def _side_by_side(
        self, lanes: Sequence[Lane], start: Position
    ) -> Iterator[tuple[Position, Chunk]]:
        """Yield chunks of all lanes, each lane in proportion to its text."""
        places = list(start.lanes) or [Place()] * len(lanes)
        if len(places) != len(lanes):
            raise UserError(
                f"{self.field}: {self.source.path!r} has other files than when these rows were "
                "begun; set revision to the commit of then, or to another to begin anew."
            )
        streams = [self._lane(*both) for both in zip(lanes, places, strict=True)]
        live, read = set(range(len(lanes))), start.read

        def given_of_text(number: int) -> tuple[float, int]:
            # The number decides a tie, so that nothing but the texts decides the order.
            return places[number].given / lanes[number].text, number

        while live:
            turn = min(live, key=given_of_text)
            found = next(streams[turn], None)
            if found is None:
                live.discard(turn)
                continue
            chunk, after = found
            yield Position(read, tuple(places)), chunk
            read += len(chunk.documents)
            places[turn] = after

    def _lane(self, lane: Lane, start: Place) -> Iterator[tuple[Chunk, Place]]:
        """Yield a lane's chunks from a place on, and the place after each."""
        here = start
        for visit in lane.visits[start.visit :]:
            for chunk, after in self._visit(visit, here):
                yield chunk, after
                here = after
            here = Place(visit=here.visit + 1, given=here.given)

    def _visit(self, visit: Visit, start: Place) -> Iterator[tuple[Chunk, Place]]:
        """Yield a visit's documents in chunks, and the place after each."""
        file, here = visit.file, start
        if file.label in self._ended:
            return
        left = self._left.pop(file.label, None)
        # What an earlier visit read need not be read again, where it was in this process.
        if left is not None and not start.record:
            here = replace(start, record=left.record, text=left.text, state=left.state)
        batches = file.read(here.state)
        while visit.stop is None or here.text < visit.stop:
            try:
                found = next(batches, None)
            # Each format and decompressor has errors of its own. Nothing but reading can fail here.
            except Exception as error:
                raise self._unreadable(file, here.record, error) from error
            if found is None:
                self._ended.add(file.label)
                return
            batch, state = found
            records = self._documents(batch, file, here.record)
            # Where each record begins in the file's text, and where the last one ends.
            starts = list(itertools.accumulate(map(text_size, records), initial=here.text))
            mine = [n for n in range(len(records)) if visit.takes(starts[n])]
            after = Place(here.visit, here.record + len(records), starts[-1], here.given, state)
            if visit.stop is not None and after.text >= visit.stop:
                self._left[file.label] = here
            if mine:
                first, stop = mine[0], mine[-1] + 1
                after = replace(after, given=here.given + starts[stop] - starts[first])
                chunk = Chunk(records[first:stop], self.field, file.label, here.record + first)
                yield chunk, after
            here = after

    def _unreadable(self, file: SourceFile, record: int, error: Exception) -> Exception:
        """Make the error for a file that cannot be read; it names the file and the place in it.

        Hub data that stops after its first documents is a RunError, because the same command can go
        on later.
        """
        where = f"record {record + 1} or one soon after it" if record else "it"
        if isinstance(error, BadRecord):
            where = error.where
        elif file.remote and self._begun and not is_full_disk(error):
            return RunError(
                f"{self.field}: {file.label} stopped at {where}: {reason_of(error)}. Run the "
                "command again to go on from the last finished shard."
            )
        return unreadable(self.field, file.label, where, error)

    def _documents(self, batch: RecordBatch, file: SourceFile, first: int) -> list[Document]:
        """Take the columns that the recipe names, else those with the usual names.

        Where a record lacks one (JSON has no schema), it has null. `first` is the number of the
        batch's first record.
        """
        columns = self._columns or self._choose_columns(batch)
        missing = [column for column in columns.values() if column not in batch]
        # Later records of a file may lack a column, but a whole file without it is a mistake.
        if missing and not first:
            raise UserError(
                f"{self.field}: {file.label} has no column {missing[0]!r} "
                f"(record {first + 1}); it has {', '.join(sorted(batch))}. {NAME_COLUMNS}"
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

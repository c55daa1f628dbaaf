"""Items and documents as files: made once for a tokenizer, then read with their checksum.

A file is one kind and length. Its first line says what it was made from, and holds the SHA-256 of
the other lines, which are JSON each. So a longer list of lengths makes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xlstm_eval.long_context.documents import make_documents
from xlstm_eval.long_context.haystack import open_haystack
from xlstm_eval.long_context.items import Item, ItemMaker
from xlstm_eval.long_context.prompts import Prompter
from xlstm_eval.long_context.settings import VERSION, LongContextSettings
from xlstm_eval.records import EvalError

Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """Hold what all models of a comparison are asked.

    ``items`` by length, shortest first; ``documents`` of ``longest`` tokens. ``skipped`` lengths do
    not fit the model's context. ``identity`` is equal where all texts are.
    """

    identity: str
    items: Mapping[int, Sequence[Item]]
    documents: Sequence[str]
    longest: int
    skipped: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Say for whom items are made: a tokenizer and its hash, and whether prompts are chats."""

    tokenizer: Any
    tokenizer_hash: str
    chat: bool
    context: int


def usable_lengths(settings: LongContextSettings, context: int) -> list[int]:
    """Return the lengths that a model of this context (tokens) can be asked; raises EvalError."""
    found = [length for length in settings.lengths if length <= context]
    if not found:
        raise EvalError(
            f"lengths: {settings.lengths[0]} is more than the model's context, {context}. "
            "Give a shorter one."
        )
    return found


def check(settings: LongContextSettings, source: Source) -> None:
    """Raise EvalError where items could not be made: in seconds, and nothing is written."""
    shortest = usable_lengths(settings, source.context)[0]
    haystack = open_haystack(settings.haystack)
    maker = ItemMaker(Prompter(source.tokenizer, source.chat), haystack, settings.seed)
    for kind in settings.kinds:
        maker.make(kind, shortest, 1)


def prepare(settings: LongContextSettings, source: Source, folder: Path) -> Prepared:
    """Read items and documents from a folder; make what is missing.

    Raises EvalError: no length fits, a length has no room for a kind, an unreadable text, a file
    that is damaged or belongs to another tokenizer.
    """
    lengths = usable_lengths(settings, source.context)
    haystack = open_haystack(settings.haystack)
    prompter = Prompter(source.tokenizer, source.chat)
    maker = ItemMaker(prompter, haystack, settings.seed)
    common = {
        "version": VERSION,
        "tokenizer": source.tokenizer_hash,
        "haystack": haystack.identity,
        "seed": settings.seed,
    }
    sums: list[str] = []
    items: dict[int, list[Item]] = {}
    for length in lengths:
        items[length] = []
        for kind in settings.kinds:
            made_from = {**common, "chat": source.chat, "kind": kind, "length": length}

            def make_items(kind: Any = kind, length: int = length) -> list[Row]:
                return [asdict(item) for item in maker.make(kind, length, settings.items)]

            rows, found = _read_or_make(folder, made_from, settings.items, make_items)
            items[length] += [Item(**row) for row in rows]
            sums.append(found)
    documents: list[str] = []
    if settings.documents:
        made_from = {**common, "kind": "documents", "length": lengths[-1]}

        def make_texts() -> list[Row]:
            texts = make_documents(
                prompter, haystack, settings.seed, lengths[-1], settings.documents
            )
            return [{"text": text} for text in texts]

        rows, found = _read_or_make(folder, made_from, settings.documents, make_texts)
        documents = [row["text"] for row in rows]
        sums.append(found)
    return Prepared(
        identity=hashlib.sha256("".join(sums).encode()).hexdigest(),
        items=items,
        documents=documents,
        longest=lengths[-1],
        skipped=tuple(set(settings.lengths) - set(lengths)),
    )


def _read_or_make(
    folder: Path, made_from: Row, count: int, make: Callable[[], list[Row]]
) -> tuple[list[Row], str]:
    """Return a file's rows and their checksum; write it first if it is not there."""
    identity = {**made_from, "count": count}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    path = folder / f"{made_from['kind']}-{made_from['length']}-{name}.jsonl"
    if not path.is_file():
        write(path, identity, make())
    # Also what was written just now: what is asked is what the file holds.
    return read(path, identity)


def write(path: Path, identity: Row, rows: Sequence[Row]) -> None:
    """Write a file whole; of several processes at once, the last counts, and all write the same."""
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    header = {"identity": identity, "sha256": hashlib.sha256(body).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with partial.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, identity: Row) -> tuple[list[Row], str]:
    """Return a file's rows and their checksum; raises EvalError: other items, or a damaged file."""
    header, _, body = path.read_bytes().partition(b"\n")
    try:
        found = json.loads(header)
        own, expected = found["identity"], found["sha256"]
    except (ValueError, KeyError, TypeError):
        raise EvalError(f"{path}: damaged. Remove the file; it is made again.") from None
    different = [key for key in identity if own.get(key) != identity[key]]
    if different:
        raise EvalError(
            f"{path}: was made for another {', '.join(different)}. "
            "Remove the file, or give another folder."
        )
    if hashlib.sha256(body).hexdigest() != expected:
        raise EvalError(f"{path}: damaged (its checksum differs). Remove it; it is made again.")
    return [json.loads(line) for line in body.splitlines()], expected

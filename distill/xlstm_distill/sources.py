"""Where a domain's documents come from: the hub, local files, or the embedded generators; mixed by tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xlstm_distill import embedded
from xlstm_distill.artifacts import hash_path
from xlstm_distill.errors import UserError
from xlstm_distill.packing import DocumentTokenizer, Tokens
from xlstm_distill.recipe import Domain, Source

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".csv": "csv"}


def identity(source: Source) -> dict[str, Any]:
    """What a source's content depends on, for fingerprints: its settings and, for local files, a hash."""
    settings = source.model_dump(mode="json")
    if source.path is not None and Path(source.path).exists():
        settings["path"] = hash_path(Path(source.path))
    return settings


def mixed_documents(domain: Domain, tokenizer: Any, *, field: str, seed: int) -> Iterator[Tokens]:
    """Interleave a domain's sources so that tokens keep to their weights at every point; deterministic.

    A source that runs out stops; the others go on. `field` is the domain's dotted path, for messages.
    """
    tokenize = DocumentTokenizer(tokenizer)
    streams = [_documents(s, f"{field}.sources[{n}]", seed) for n, s in enumerate(domain.sources)]
    weights = [source.weight for source in domain.sources]
    spent = [0.0] * len(streams)
    live = set(range(len(streams)))
    while live:
        turn = min(live, key=lambda n: (spent[n], n))
        document = next(streams[turn], None)
        if document is None:
            live.remove(turn)
            continue
        tokens = tokenize(document)
        spent[turn] += len(tokens.ids) / weights[turn]
        if any(tokens.supervised):
            yield tokens


def _documents(source: Source, field: str, seed: int) -> Iterator[Mapping[str, Any]]:
    """Yield documents with the columns `messages`, `prompt` and `response`, or `text`."""
    if source.generator is not None:
        assert source.documents is not None
        yield from embedded.documents(source.generator, source.documents, seed)
        return
    select: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    for count, record in enumerate(_load(source, field)):
        if source.documents is not None and count >= source.documents:
            return
        select = select or _column_selector(source, record, field)
        yield select(record)
    if select is None:
        raise UserError(f"{field}: {source.path!r}, split {source.split!r}, has no documents.")


def _load(source: Source, field: str) -> Any:
    """Open a source as an iterable of records."""
    import datasets

    path = Path(source.path or "")
    try:
        if not path.exists():
            return datasets.load_dataset(
                source.path, source.name, split=source.split, revision=source.revision, streaming=True
            )
        if (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in BUILDERS)
        if not files or files[0].suffix not in BUILDERS:
            raise UserError(f"{field}.path: {path} holds no file that ends in {', '.join(BUILDERS)}.")
        names = [str(p) for p in files if p.suffix == files[0].suffix]
        return datasets.load_dataset(BUILDERS[files[0].suffix], data_files=names, split="train", streaming=True)
    except StopIteration:  # what datasets raises on a file without a record
        return ()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{field}.path: {source.path!r} cannot be loaded as a data set: {reason}") from error


def _column_selector(
    source: Source, record: Mapping[str, Any], field: str
) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """Choose the columns by the recipe, else by their usual names, and check that they are there."""
    named = {
        role: column
        for role, column in (
            ("messages", source.messages), ("prompt", source.prompt), ("response", source.response),
            ("text", source.text),
        )
        if column is not None
    }  # fmt: skip
    if not named:
        for roles in (("messages",), ("prompt", "response"), ("text",)):
            if all(role in record for role in roles):
                named = {role: role for role in roles}
                break
    missing = [column for column in named.values() if column not in record]
    if missing or not named:
        wanted = f"no column {missing[0]!r}" if missing else "none of the columns messages, prompt + response, text"
        raise UserError(
            f"{field}: {source.path!r} has {wanted}; it has {', '.join(sorted(record))}. "
            "Name the right ones with messages, prompt and response, or text."
        )
    return lambda record: {role: record[column] for role, column in named.items()}

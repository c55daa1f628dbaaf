"""Show what a recipe's sources become, without a run: examples, what is left out, and problems."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from xlstm_distill.data.files.order import Position
from xlstm_distill.data.mixture import HOPELESS, SourceProgress
from xlstm_distill.data.sources import SourceReader
from xlstm_distill.data.tokenization import (
    ChunkTokenizer,
    DocumentOutcome,
    DocumentTokenizer,
    Tokens,
)
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.recipe import Recipe, Source

DOCUMENTS = 64
"""Documents of a source that are read at least, so that a bad record near the start is found."""


@dataclass(frozen=True)
class Example:
    """A prepared document: its text in pieces, each with whether it is supervised.

    `tokens` and `supervised` count the tokens of the whole document, and those that are supervised.
    """

    pieces: tuple[tuple[str, bool], ...]
    tokens: int
    supervised: int


@dataclass(frozen=True)
class SourcePreview:
    """What the first documents of a source become.

    field: the source's place in the recipe, `data.domains.math.sources[0]`.
    origin: where its documents come from, `data/math.jsonl` or `generator 'math'`.
    columns: the column that was chosen for each role (`messages`; or `prompt`, `response` and
        perhaps `system`; or `text`); empty if reading failed before columns could be chosen.
    examples: the first documents that are kept.
    left_out: how many of the documents read are left out or cut, and why; None if there are none.
    problem: the first error of this source, as a run would report it; None if there is none.
    """

    field: str
    origin: str
    columns: dict[str, str]
    examples: tuple[Example, ...]
    left_out: str | None
    problem: str | None


def preview_sources(recipe: Recipe, tokenizer: Any, examples: int = 3) -> list[SourcePreview]:
    """Prepare the first documents of every source of every domain, in the recipe's order.

    The reader, the tokenizer and the policy for long documents are those of a run. Errors in a
    source are collected in its `problem`; they do not stop the preview.
    """
    data = recipe.data
    prepare = ChunkTokenizer(DocumentTokenizer(tokenizer), data.context, data.long_documents)
    found = []
    for name, domain in data.domains.items():
        for number, source in enumerate(domain.sources):
            place = f"data.domains.{name}.sources[{number}]"
            reader = SourceReader(source, place, recipe.seed)
            found.append(_preview(source, reader, prepare, examples))
    return found


def _preview(
    source: Source, reader: SourceReader, prepare: ChunkTokenizer, examples: int
) -> SourcePreview:
    kept: list[Tokens] = []
    progress = SourceProgress()
    problem = None
    try:
        for tokens in _one_by_one(reader, prepare):
            progress.count(tokens)
            if len(tokens):
                kept.append(tokens)
            enough = len(kept) >= examples and progress.documents >= DOCUMENTS
            # The same limit as a run has, so that the preview refuses what a run would refuse.
            if enough or progress.documents >= HOPELESS:
                break
    except (UserError, RunError, OSError) as error:
        problem = str(error)
    if problem is None and not kept:
        problem = f"{reader.field}: {progress.losses()}; nothing of it can be used."
    decode = prepare.tokenize.tokenizer.decode
    return SourcePreview(
        field=reader.field,
        origin=source.path or f"generator {source.generator!r}",
        columns=reader.columns,
        examples=tuple(_example(tokens, decode) for tokens in kept[:examples]),
        left_out=_left_out(progress, prepare.context),
        problem=problem,
    )


def _one_by_one(reader: SourceReader, prepare: ChunkTokenizer) -> Iterator[Tokens]:
    """Prepare each document alone, so that those before a bad one can still be shown."""
    for _, chunk in reader.chunks(Position()):
        for index, document in enumerate(chunk.documents):
            yield from prepare(replace(chunk, documents=[document], first=chunk.first + index))


def _example(tokens: Tokens, decode: Any) -> Example:
    """Decode a document in stretches of supervised and other tokens."""
    pieces = []
    before, stop = "", 0
    for supervised, stretch in groupby(tokens.supervised.tolist()):
        stop += len(list(stretch))
        # Some tokenizers drop a leading space when they decode a part of a text. A piece is
        # therefore what the tokens up to its end add to the text of those before it.
        text = decode(tokens.ids[:stop], clean_up_tokenization_spaces=False)
        pieces.append((text[len(before) :], supervised))
        before = text
    return Example(tuple(pieces), len(tokens), int(tokens.supervised.sum()))


def _left_out(progress: SourceProgress, context: int) -> str | None:
    said = [progress.losses()] if progress.lost() else []
    if cut := progress.outcomes[DocumentOutcome.TRUNCATED.label]:
        said.append(f"{cut} cut to {context} tokens (data.context)")
    return "; ".join(said) or None

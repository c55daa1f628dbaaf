"""The sections for the text: sources, domains and rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from xlstm_distill.recipe.fields import (
    SUM_TOLERANCE,
    Count,
    CountOrZero,
    FieldError,
    Flag,
    HubOrPath,
    Name,
    Positive,
    Section,
    Text,
)

# A generator writes chat messages without reading anything. Only these fields mean something to it.
USED_BY_GENERATORS = ("generator", "documents", "weight")
# `split` is not here: a folder that `save_to_disk` wrote is local and has splits. The reader
# refuses the split of plain files.
HUB_ONLY = ("name", "revision", "streaming")

LongDocuments = Literal["split", "truncate", "drop", "error"]


class Source(Section):
    """Documents from the hub, a local file or folder, or an embedded generator.

    Without column names, the first of these that the data has is used: `messages`; `prompt` and
    `response`; `text`.
    """

    path: HubOrPath | None = Field(
        default=None, description="Hub id, local file or folder; paths are relative to the recipe."
    )
    generator: Literal["math", "code", "stem", "chat"] | None = Field(
        default=None, description="Embedded generator of documents, in place of `path`."
    )
    name: Text | None = Field(default=None, description="Configuration (subset) of the data set.")
    split: Text = Field(default="train", description="Split of the data set.")
    revision: Text | None = Field(
        default=None,
        description="Branch, tag or commit on the hub. A commit makes a run reproducible.",
    )
    streaming: Flag = Field(
        default=True,
        description="Read hub data as it is needed. `false` downloads all of it first, so that "
        "later runs find it offline.",
    )
    weight: Positive = Field(
        default=1.0, description="Share of the domain's tokens, relative to its other sources."
    )
    documents: Count | None = Field(
        default=None, description="Maximum number of documents to read; required for a generator."
    )
    text: Text | None = Field(default=None, description="Column that holds plain text.")
    prompt: Text | None = Field(
        default=None, description="Column that holds the prompt; needs `response`."
    )
    response: Text | None = Field(
        default=None, description="Column that holds the response; needs `prompt`."
    )
    system: Text | None = Field(
        default=None,
        description="Column that holds a system message, which comes before `prompt`. An empty "
        "value means no system message.",
    )
    messages: Text | None = Field(
        default=None, description="Column that holds chat messages (role, content)."
    )
    sample_by: Literal["line", "paragraph", "document"] = Field(
        default="line",
        description="What one document is in local `.txt` files: a line, a paragraph (ends at an "
        "empty line), or a whole file.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield errors of the origin, of settings that do not apply to it, and of the columns."""
        yield from self._origin_errors()
        yield from self._column_errors()

    def _origin_errors(self) -> Iterator[FieldError]:
        if (self.path is None) == (self.generator is None):
            found = "neither" if self.path is None else "both"
            yield FieldError("", f"has {found} of 'path' and 'generator'; give exactly one.")
        elif self.path is None:
            yield from self._generator_errors()
        # Validation has made local paths absolute, so a path that is still relative is a hub id.
        elif Path(self.path).is_absolute():
            for field in HUB_ONLY:
                if self._differs(field):
                    yield FieldError(
                        field, f"does not apply to the local path {self.path}; leave it out."
                    )
        elif self.sample_by != "line":
            yield FieldError(
                "sample_by",
                f"does not apply to {self.path!r} on the hub, only to local files; leave it out.",
            )

    def _generator_errors(self) -> Iterator[FieldError]:
        if self.documents is None:
            yield FieldError(
                "documents", "missing; a generator needs the number of documents to make."
            )
        for field in type(self).model_fields:
            if field not in USED_BY_GENERATORS and self._differs(field):
                yield FieldError(field, "does not apply to a generator; leave it out.")

    def _differs(self, field: str) -> bool:
        """Whether a field differs from its default; a recipe may name a default too."""
        # Compared by value and not by `model_fields_set`: a run's saved recipe names every field,
        # and must load again.
        return getattr(self, field) != type(self).model_fields[field].default

    def _column_errors(self) -> Iterator[FieldError]:
        if self.generator is not None:
            return
        if (self.prompt is None) != (self.response is None):
            # A prompt alone has nothing to train on, and a response alone has nothing to answer.
            missing = "prompt" if self.prompt is None else "response"
            yield FieldError(missing, "missing; 'prompt' and 'response' go together.")
        if self.system is not None and self.prompt is None:
            yield FieldError(
                "system", "given without 'prompt' and 'response'; it comes before a prompt."
            )
        styles = [
            name for name in ("text", "prompt", "messages") if getattr(self, name) is not None
        ]
        for style in styles[1:]:
            yield FieldError(
                style, f"given beside '{styles[0]}'; name the columns of one style only."
            )


class Domain(Section):
    """A named kind of text, mixed from sources by tokens."""

    sources: tuple[Source, ...] = Field(min_length=1, description="Where the documents come from.")
    weights_sum: Positive | None = Field(
        default=None,
        description="Number that the sources' weights must sum to, for example 1 or 100, to catch "
        "a wrong weight; null means that weights are relative.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error if the weights do not sum to `weights_sum`."""
        if self.weights_sum is None:
            return
        total = math.fsum(source.weight for source in self.sources)
        # The paper's tables give percentages. A column that was copied wrong does not sum to 100.
        if abs(total - self.weights_sum) > SUM_TOLERANCE * self.weights_sum:
            yield FieldError(
                "weights_sum",
                f"the sources' weights sum to {total:.6g}, not {self.weights_sum:.6g}; correct "
                "them, or leave weights_sum out to make them relative.",
            )


class Data(Section):
    """The text: domains, packed into rows of a fixed number of tokens."""

    # From 2 on: a row of one token has no next token to predict.
    context: int = Field(strict=True, ge=2, description="Length of a packed row (tokens).")
    domains: dict[Name, Domain] = Field(min_length=1, description="Domains by name.")
    # They count as rows of the domain, so the row budgets add them to what training reads.
    validation_rows: Count = Field(
        default=64, description="Rows of each domain held out for validation (rows)."
    )
    long_documents: LongDocuments = Field(
        default="split",
        description="What happens to a document longer than `context`: `split` cuts it into "
        "several rows and keeps all of it; `truncate` keeps its first `context` tokens; `drop` "
        "leaves it out; `error` stops.",
    )
    workers: CountOrZero | None = Field(
        default=None,
        description="Processes that tokenise beside the main one; 0 means none. null means one "
        "per free core (at most 16) if there is enough text. The rows are the same for any "
        "number.",
    )

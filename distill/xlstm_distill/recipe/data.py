"""The sections for the text: sources, domains and rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

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

USED_BY_GENERATORS = ("generator", "documents", "weight")

LongDocuments = Literal["split", "truncate", "drop", "error"]


class Source(Section):
    """Documents from the hub, a local file or folder, or an embedded generator.

    Without column names the first of these that the data has is used: `messages`; `prompt` and `response`; `text`.
    """

    path: HubOrPath | None = Field(
        default=None, description="Hub id, local file or folder; paths are relative to the recipe."
    )
    generator: Literal["math", "code", "stem", "chat"] | None = Field(
        default=None, description="An embedded domain instead."
    )
    name: Text | None = Field(default=None, description="Configuration (subset) of the data set.")
    split: Text = Field(default="train", description="Split of the data set.")
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit on the hub; pin it to reproduce a run."
    )
    streaming: Flag = Field(
        default=True,
        description="Read hub data as it is needed; false downloads all of it first, and finds it again offline.",
    )
    weight: Positive = Field(
        default=1.0, description="Share of the domain's tokens, relative to its other sources."
    )
    documents: Count | None = Field(
        default=None, description="Documents to read at most; a generator needs it."
    )
    text: Text | None = Field(default=None, description="Column that holds plain text.")
    prompt: Text | None = Field(
        default=None, description="Column that holds the prompt; with `response`."
    )
    response: Text | None = Field(
        default=None, description="Column that holds the response; with `prompt`."
    )
    system: Text | None = Field(
        default=None,
        description="Column that holds a system message, to stand before `prompt`; empty means none.",
    )
    messages: Text | None = Field(
        default=None, description="Column that holds chat messages (role, content)."
    )
    sample_by: Literal["line", "paragraph", "document"] = Field(
        default="line",
        description="What a document is in local `.txt` files: a line, a paragraph (up to an empty line), or a file.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.generator is None):
            found = "neither" if self.path is None else "both"
            raise FieldError("", f"has {found} of 'path' and 'generator'; give exactly one.")
        if self.generator is None:
            return self
        if self.documents is None:
            raise FieldError(
                "documents", "missing; a generator needs the number of documents to make."
            )
        fields = {
            name: field
            for name, field in type(self).model_fields.items()
            if name not in USED_BY_GENERATORS
        }
        if unused := [
            name for name, field in fields.items() if getattr(self, name) != field.default
        ]:
            raise FieldError(unused[0], "does not apply to a generator; leave it out.")
        return self

    @model_validator(mode="after")
    def _hub_settings(self) -> Self:
        """A local path comes absolute from validation; what only the hub has must not be ignored there."""
        if self.path is not None and Path(self.path).is_absolute():
            for field in ("name", "revision", "streaming"):
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise FieldError(
                        field, f"does not apply to the local path {self.path}; leave it out."
                    )
        elif self.path is not None and self.sample_by != "line":
            raise FieldError(
                "sample_by", f"does not apply to {self.path!r} on the hub, only to local files."
            )
        return self

    @model_validator(mode="after")
    def _one_style(self) -> Self:
        if (self.prompt is None) != (self.response is None):
            missing = "prompt" if self.prompt is None else "response"
            raise FieldError(missing, "missing; 'prompt' and 'response' go together.")
        if self.system is not None and self.prompt is None:
            raise FieldError(
                "system", "given without 'prompt' and 'response'; it stands before a prompt."
            )
        styles = [
            name for name in ("text", "prompt", "messages") if getattr(self, name) is not None
        ]
        if len(styles) > 1:
            raise FieldError(
                styles[1], f"given beside '{styles[0]}'; name the columns of one style only."
            )
        return self


class Domain(Section):
    """A named kind of text, mixed from sources by tokens."""

    sources: tuple[Source, ...] = Field(min_length=1, description="Where the documents come from.")
    weights_sum: Positive | None = Field(
        default=None,
        description="What the sources' weights must sum to where they are meant as shares: 1 or 100, say; null lets "
        "them be relative.",
    )

    @model_validator(mode="after")
    def _weights_add_up(self) -> Self:
        total = math.fsum(source.weight for source in self.sources)
        if (
            self.weights_sum is not None
            and abs(total - self.weights_sum) > SUM_TOLERANCE * self.weights_sum
        ):
            raise FieldError(
                "weights_sum",
                f"the sources' weights sum to {total:.6g}, not {self.weights_sum:.6g}; mend them, or leave weights_sum "
                "out to have them relative.",
            )
        return self


class Data(Section):
    """The text: domains, packed into rows of a fixed number of tokens."""

    context: int = Field(strict=True, ge=2, description="Length of a packed row (tokens).")
    domains: dict[Name, Domain] = Field(min_length=1, description="Domains by name.")
    validation_rows: Count = Field(
        default=64, description="Rows of each domain held out for validation (rows)."
    )
    long_documents: LongDocuments = Field(
        default="split",
        description="What happens to a document longer than `context`: `split` into rows of its own, nothing lost; "
        "`truncate` to its first `context` tokens; `drop`; or `error`.",
    )
    workers: CountOrZero | None = Field(
        default=None,
        description="Processes that tokenise beside the main one; 0 means none, null one per free core (at most 16) "
        "where there is enough text. The rows are the same for any number.",
    )

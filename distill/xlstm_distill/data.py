"""Packed rows of each domain, made once and memory-mapped, and the order in which training reads them."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.arrow_writer import ArrowWriter
from torch import Tensor

from xlstm_distill import sources
from xlstm_distill.artifacts import Artifact, Draft, Request, Run, digest
from xlstm_distill.console import Console
from xlstm_distill.documents import positions_in_documents
from xlstm_distill.errors import UserError
from xlstm_distill.packing import pack
from xlstm_distill.recipe import Recipe

IGNORE_INDEX = -100
ROWS_FILE = "rows.arrow"
ROW_COLUMNS = {"input_ids": "int32", "supervised": "bool", "segment_ids": "int32"}
Row = tuple[str, int]
"""A row's domain and its index there."""


@dataclass(frozen=True)
class Batch:
    """Rows ready for a model; all (B, T) int64 but `real`, which is False on padding.

    `labels` holds the next token where it is supervised and of the same document, else IGNORE_INDEX.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    labels: Tensor
    real: Tensor
    rows: tuple[Row, ...]

    def to(self, device: torch.device) -> Batch:
        """Move all tensors."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if name != "rows"}
        return replace(self, **moved)


class DomainRows:
    """The packed rows of one domain; the first `validation` of them are never trained on."""

    def __init__(self, name: str, artifact: Artifact, validation: int) -> None:
        self.name, self.validation = name, validation
        self.dataset = datasets.Dataset.from_file(str(artifact.path / ROWS_FILE)).with_format("numpy")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def context(self) -> int:
        """Tokens per row."""
        return self.dataset.features["input_ids"].length

    @property
    def train_rows(self) -> int:
        """Rows that may be trained on."""
        return len(self) - self.validation


def rows_needed(recipe: Recipe, domain: str) -> int:
    """Rows of a domain that the longest of its uses reads once, and its validation rows."""
    uses = [recipe.align.tokens * _share(recipe.align.domains or dict.fromkeys(recipe.data.domains, 1.0), domain)]
    for expert in recipe.distill.experts.values():
        uses.append(sum(phase.tokens * _share(phase.domains, domain) for phase in expert.phases))
    return math.ceil(max(uses) / recipe.data.context) + recipe.data.validation_rows


def _share(weights: Mapping[str, float], domain: str) -> float:
    return weights.get(domain, 0.0) / sum(weights.values())


def prepare_domain(recipe: Recipe, run: Run, name: str, tokenizer: Any, console: Console) -> Artifact:
    """Tokenise and pack a domain's documents into rows, once; the artifact is `data/<domain>`."""
    domain, context, needed = recipe.data.domains[name], recipe.data.context, rows_needed(recipe, name)
    validation = recipe.data.validation_rows
    field = f"data.domains.{name}"
    request = Request(
        "data",
        name=name,
        parts={
            "sources": [sources.identity(s) for s in domain.sources],
            "context": context,
            "rows": needed,
            "validation_rows": validation,
            "seed": recipe.seed,
        },
        inputs={"tokenizer": tokenizer_hash(tokenizer)},
    )

    def build(draft: Draft) -> None:
        documents = sources.mixed_documents(domain, tokenizer, field=field, seed=recipe.seed)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        packed = itertools.islice(pack(documents, context, pad), needed)
        with console.progress(f"data/{name}", needed * context) as progress:
            count = _write_rows(packed, draft.path / ROWS_FILE, context, lambda: progress.update(context))
        if count <= validation:
            raise UserError(
                f"{field}: its documents fill {count} rows of {context} tokens and data.validation_rows holds back "
                f"{validation} of them; give more documents or hold back fewer."
            )
        draft.results |= {"rows": count, "rows_needed": needed}

    return run.make(request, build)


def _write_rows(rows: Iterator[dict[str, Any]], file: Path, context: int, written: Callable[[], None]) -> int:
    """Write rows as an Arrow stream, one at a time; returns how many there were."""
    features = datasets.Features(
        {name: datasets.Sequence(datasets.Value(kind), length=context) for name, kind in ROW_COLUMNS.items()}
        | {"length": datasets.Value("int32")}
    )
    count = 0
    with ArrowWriter(path=str(file), features=features) as writer:
        for row in rows:
            writer.write(row)
            written()
            count += 1
        writer.finalize()
    return count


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer does: its vocabulary and rules, chat template and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:  # padding and truncation are set by the last call, not by the tokenizer's files
        rules = [part for part in json.loads(backend.to_str()).items() if part[0] not in ("padding", "truncation")]
    return digest([rules, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id])


class RowSchedule:
    """Which rows the n-th step reads: a pure function of seed and step, so that a resumed run reads the same.

    Domains alternate so that each keeps to its weight at every point; within a domain every epoch is a new
    permutation of its training rows.
    """

    def __init__(self, domains: Mapping[str, DomainRows], weights: Mapping[str, float], seed: int, total: int) -> None:
        self.domains, self.seed = domains, seed
        self.names = [name for name, weight in weights.items() if weight > 0]
        share = np.array([weights[name] for name in self.names]) / sum(weights[name] for name in self.names)
        order, drawn = np.empty(total, dtype=np.int32), np.zeros(len(share))
        self.draws = np.empty(total, dtype=np.int64)
        for n in range(total):
            order[n] = choice = int(np.argmax(share * (n + 1) - drawn))
            self.draws[n] = drawn[choice]
            drawn[choice] += 1
        self.order = order
        self.permutations: dict[tuple[str, int], np.ndarray] = {}

    def rows(self, step: int, batch: int) -> list[Row]:
        """The rows of a step, with `batch` rows a step."""
        return [self._row(n) for n in range(step * batch, (step + 1) * batch)]

    def _row(self, n: int) -> Row:
        name = self.names[self.order[n]]
        rows = self.domains[name]
        epoch, index = divmod(int(self.draws[n]), rows.train_rows)
        if (name, epoch) not in self.permutations:
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode()), epoch])
            self.permutations[name, epoch] = generator.permutation(rows.train_rows)
        return name, rows.validation + int(self.permutations[name, epoch][index])


def load_batch(domains: Mapping[str, DomainRows], rows: Sequence[Row]) -> Batch:
    """Read rows and make the labels."""
    records = [domains[name].dataset[index] for name, index in rows]
    columns = {name: torch.from_numpy(np.stack([r[name] for r in records])) for name in ROW_COLUMNS}
    input_ids, segments = columns["input_ids"].long(), columns["segment_ids"].long()
    lengths = torch.tensor([int(r["length"]) for r in records])
    return Batch(
        input_ids=input_ids,
        position_ids=positions_in_documents(segments),
        segment_ids=segments,
        labels=next_token_labels(input_ids, columns["supervised"], segments),
        real=torch.arange(input_ids.shape[1]) < lengths[:, None],
        rows=tuple(rows),
    )


def next_token_labels(input_ids: Tensor, supervised: Tensor, segment_ids: Tensor) -> Tensor:
    """Label each token with the next one where that is supervised and of the same document; all (B, T)."""
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    keep = supervised[:, 1:] & (segment_ids[:, 1:] == segment_ids[:, :-1])
    labels[:, :-1] = torch.where(keep, input_ids[:, 1:], IGNORE_INDEX)
    return labels

"""Packed rows of each domain, made once and memory-mapped, and the order in which training reads them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlstm_distill import sources
from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.models.segments import positions_in_documents
from xlstm_distill.packing import PackedRow
from xlstm_distill.preparation import Preparation, clean, exclusive
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import is_main_process
from xlstm_distill.shards import ShardReader

IGNORE_INDEX = -100
ROWS_FORMAT = 3
"""Raised when rows change meaning, so that those made before are made anew."""
HELD_OUT_SPREAD = 16
"""Held-out rows lie evenly over so many times as many rows at the start, whatever comes after them."""
BLOCK = 4096.0
"""Rows that a schedule puts in order at a time."""
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
    """The first `limit` packed rows of one domain; the first `validation` of them are never trained on.

    Validation rows lie evenly over the first `span` rows: they trade places with the rows that come first on the disk.
    Without span and limit all rows count.
    """

    def __init__(
        self, name: str, artifact: Artifact, validation: int, span: int | None = None, limit: int | None = None
    ) -> None:
        self.name, self.validation, self.limit = name, validation, limit
        self._shards = ShardReader(artifact.path)
        self._traded: dict[int, int] = {}
        stored = len(self._shards)
        span = stored if span is None else min(span, stored)
        for first in range(min(validation, span)):
            other = first * span // validation
            here, there = self._traded.get(first, first), self._traded.get(other, other)
            self._traded[first], self._traded[other] = there, here

    def __len__(self) -> int:
        stored = len(self._shards)
        return stored if self.limit is None else min(self.limit, stored)

    @property
    def context(self) -> int:
        """Tokens per row."""
        return self._shards.context

    @property
    def train_rows(self) -> int:
        """Rows that may be trained on."""
        return len(self) - self.validation

    def row(self, index: int) -> PackedRow:
        """Read a row, memory-mapped."""
        return self._shards.row(self._traded.get(index, index))


def rows_needed(recipe: Recipe, domain: str) -> int:
    """Rows of a domain that the longest of its uses reads once, and its validation rows."""
    return max(rows_to_align(recipe, domain), captured_rows(recipe).get(domain, 0))


def rows_to_align(recipe: Recipe, domain: str) -> int:
    """Rows of a domain that alignment reads once, and its validation rows."""
    aligned_on = recipe.align.domains or dict.fromkeys(recipe.data.domains, 1.0)
    read = _rows_read(recipe.align.tokens, recipe.align.batch, recipe) * _share(aligned_on, domain)
    return math.ceil(read) + recipe.data.validation_rows


def expert_rows(recipe: Recipe, expert: str) -> dict[str, int]:
    """Rows of each of its domains that an expert reads once, and validation rows; in the recipe's order."""
    phases = recipe.distill.experts[expert].phases
    steps = [(phase, _rows_read(phase.tokens, recipe.distill.batch, recipe)) for phase in phases]
    return {
        name: math.ceil(sum(rows * _share(phase.domains, name) for phase, rows in steps)) + recipe.data.validation_rows
        for name in recipe.data.domains
        if any(name in phase.domains for phase in phases)
    }


def captured_rows(recipe: Recipe) -> dict[str, int]:
    """Rows of each domain that some expert reads, in the recipe's order."""
    seen = [expert_rows(recipe, expert) for expert in recipe.distill.experts]
    return {
        name: max(rows[name] for rows in seen if name in rows)
        for name in recipe.data.domains
        if any(name in rows for rows in seen)
    }


def held_out_span(recipe: Recipe, domain: str) -> int:
    """Rows at the start of a domain over which its validation rows lie."""
    return min(rows_needed(recipe, domain), HELD_OUT_SPREAD * recipe.data.validation_rows)


def _rows_read(tokens: int, batch: int, recipe: Recipe) -> int:
    """Rows of a budget, rounded up to whole optimiser steps."""
    return math.ceil(tokens / (batch * recipe.data.context)) * batch


def _share(weights: Mapping[str, float], domain: str) -> float:
    return weights.get(domain, 0.0) / sum(weights.values())


def prepare_domain(recipe: Recipe, run: Run, name: str, tokenizer: Any, console: Console) -> Artifact:
    """Tokenise and pack a domain's documents into rows, once; the artifact is `data/<domain>`.

    A preparation that was killed goes on from its last finished shard and ends with the same rows. Of several runs of
    the command on one run directory the first prepares and the others wait.
    """
    needed = max(rows_needed(recipe, name), _rows_there(recipe, run, name, tokenizer))
    request = replace(
        _data_request(recipe, name, tokenizer, rows=needed), identity=data_identity(recipe, name, tokenizer)
    )
    folder = run.work_directory(request)

    def build(draft: Draft) -> None:
        Preparation(recipe, name, needed, tokenizer, folder, console).build(draft)

    if not is_main_process() or run.find(request):
        return run.make(request, build)
    with exclusive(folder.with_name(f"data-{name}.lock"), request.label, console):
        artifact = run.make(request, build)
        clean(folder)
    return artifact


def data_identity(recipe: Recipe, name: str, tokenizer: Any) -> str:
    """Hash of what a domain's rows are, however many of them there are: the first are the same for any number.

    A stage's result depends on this, and on the number of rows that its own settings make it read.
    """
    span = {"held_out_span": held_out_span(recipe, name), "validation_rows": recipe.data.validation_rows}
    return _data_request(recipe, name, tokenizer, **span).fingerprint


def _data_request(recipe: Recipe, name: str, tokenizer: Any, **counts: int) -> Request:
    parts = {
        "format": ROWS_FORMAT,
        "sources": [sources.identity(s) for s in recipe.data.domains[name].sources],
        "context": recipe.data.context,
        "long_documents": recipe.data.long_documents,
        "seed": recipe.seed,
        **counts,
    }
    return Request("data", name=name, parts=parts, inputs={"tokenizer": tokenizer_hash(tokenizer)})


def _rows_there(recipe: Recipe, run: Run, name: str, tokenizer: Any) -> int:
    """Rows asked for when the published artifact was made, if it holds this recipe's rows; else 0."""
    published = run.load(f"data/{name}")
    rows = published.manifest["recipe"].get("rows", 0) if published else 0
    same = published and _data_request(recipe, name, tokenizer, rows=rows).fingerprint == published.fingerprint
    return rows if same else 0


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash what a tokenizer does: its vocabulary and rules, chat template and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:  # padding and truncation are set by the last call, not by the tokenizer's files
        rules = [part for part in json.loads(backend.to_str()).items() if part[0] not in ("padding", "truncation")]
    special = json.loads(json.dumps(tokenizer.special_tokens_map, default=str))  # templates render some by name
    splits = getattr(tokenizer, "split_special_tokens", False)
    ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    return digest([rules, tokenizer.chat_template, *ids, special, splits])


class RowSchedule:
    """Which rows the n-th step reads: a pure function of seed and step, so that a resumed run reads the same.

    Domains alternate so that each keeps to its weight at every point: its k-th row is due at (k + 1/2) / share, and
    rows come in the order in which they are due. Within a domain every epoch is a new permutation of its training
    rows. Nothing is computed before it is asked for: rows are put in order in blocks of the time in which they are due.
    `before` counts the rows that earlier schedules of this seed have drawn of each domain; this one goes on after them.
    """

    def __init__(
        self,
        domains: Mapping[str, DomainRows],
        weights: Mapping[str, float],
        seed: int,
        total: int,
        before: Mapping[str, int] | None = None,
    ) -> None:
        self.domains, self.seed, self.total, self.before = domains, seed, total, dict(before or {})
        self.names = [name for name, weight in weights.items() if weight > 0]
        self._share = np.array([weights[name] for name in self.names]) / sum(weights[name] for name in self.names)
        self._block: tuple[int, np.ndarray, np.ndarray] = (0, *self._order_block(0))
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def rows(self, step: int, batch: int) -> list[Row]:
        """The rows of a step, with `batch` rows a step."""
        if (step + 1) * batch > self.total:
            raise IndexError(f"step {step} of {batch} rows is beyond the schedule's {self.total} rows")
        return [self._row(n) for n in range(step * batch, (step + 1) * batch)]

    def _row(self, n: int) -> Row:
        first, choices, draws = self._block
        if not first <= n < first + len(choices):
            first, choices, draws = self._block = self._find_block(n)
        name = self.names[choices[n - first]]
        rows = self.domains[name]
        epoch, index = divmod(self.before.get(name, 0) + int(draws[n - first]), rows.train_rows)
        return name, rows.validation + int(self._permutation(name, epoch, rows.train_rows)[index])

    def drawn(self) -> dict[str, int]:
        """Rows that have been drawn of each domain when this schedule ends, by it and before it."""
        number = self._block_number(self.total - 1)
        due = self._drawn(number)
        choices, _ = self._order_block(number)
        counts = due + np.bincount(choices[: self.total - due.sum()], minlength=len(due))
        return self.before | {n: self.before.get(n, 0) + int(c) for n, c in zip(self.names, counts, strict=True)}

    def _find_block(self, n: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The block that holds row n: its first row, and the domain and draw of each of its rows."""
        number = self._block_number(n)
        return int(self._drawn(number).sum()), *self._order_block(number)

    def _block_number(self, n: int) -> int:
        number = int(n // BLOCK)  # rounding moves a block's first row by less than a row per domain
        while int(self._drawn(number).sum()) > n:
            number -= 1
        while int(self._drawn(number + 1).sum()) <= n:
            number += 1
        return number

    def _drawn(self, number: int) -> np.ndarray:
        """Rows of each domain that are due before a block."""
        return np.maximum(np.ceil(self._share * (number * BLOCK) - 0.5), 0).astype(np.int64)

    def _order_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        starts, stops = self._drawn(number), self._drawn(number + 1)
        choices = np.repeat(np.arange(len(starts)), stops - starts)
        draws = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        order = np.argsort((draws + 0.5) / self._share[choices], kind="stable")
        return choices[order], draws[order]

    def _permutation(self, name: str, epoch: int, rows: int) -> np.ndarray:
        if self._permutations.get(name, (-1,))[0] != epoch:
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode()), epoch])
            self._permutations[name] = (epoch, generator.permutation(rows).astype(np.uint32))
        return self._permutations[name][1]


def load_batch(domains: Mapping[str, DomainRows], rows: Sequence[Row]) -> Batch:
    """Read rows and make the labels."""
    packed = [domains[name].row(index) for name, index in rows]
    input_ids = torch.from_numpy(np.stack([row.ids for row in packed]).astype(np.int64))
    segments = torch.from_numpy(np.stack([row.segment_ids for row in packed]))
    supervised = torch.from_numpy(np.stack([row.supervised for row in packed]))
    lengths = torch.tensor([row.used for row in packed])
    return Batch(
        input_ids=input_ids,
        position_ids=positions_in_documents(segments),
        segment_ids=segments,
        labels=next_token_labels(input_ids, supervised, segments),
        real=torch.arange(input_ids.shape[1]) < lengths[:, None],
        rows=tuple(rows),
    )


def next_token_labels(input_ids: Tensor, supervised: Tensor, segment_ids: Tensor) -> Tensor:
    """Label each token with the next one where that is supervised and of the same document; all (B, T)."""
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    keep = supervised[:, 1:] & (segment_ids[:, 1:] == segment_ids[:, :-1])
    labels[:, :-1] = torch.where(keep, input_ids[:, 1:], IGNORE_INDEX)
    return labels

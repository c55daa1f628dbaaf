"""Packed rows of a domain, memory-mapped, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xlstm_distill.artifacts import Artifact
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.data.shards import ShardReader
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.segments import positions_in_documents

# torch's own default for labels that do not count.
IGNORE_INDEX = -100

Row = tuple[str, int]
"""A row's domain and its index there."""

NOT_FOUND = torch.empty(0, dtype=torch.int64)
"""Stands for a batch's kept tokens until they are looked for."""


@dataclass(frozen=True)
class Batch:
    """Rows ready for a model; tensors are (B, T), int64 except `real`.

    `labels` holds the next token where it is supervised and of the same document, else
    IGNORE_INDEX. `real` is False on padding. `targets` are the stored targets of the tokens with a
    label, where they were read with the rows.

    The rest is found on the host, where the batch is made: to ask a GPU for it, training would wait
    for the GPU. `kept` (K,) int64 are the places of the labels in the flattened rows, `tokens` is
    the number of tokens that are no padding, and `packed` says whether a row has several documents.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    labels: Tensor
    real: Tensor
    rows: tuple[Row, ...]
    targets: SparseTargets | None = None
    kept: Tensor = field(default=NOT_FOUND)
    tokens: int = 0
    packed: bool = True

    def __post_init__(self) -> None:
        """Find `kept`, `tokens` and `packed` where they are not given."""
        if self.kept is not NOT_FOUND:
            return
        documents = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        found = {
            "kept": (self.labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1),
            "tokens": int(self.real.sum()),
            "packed": bool(documents.any()),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def to(self, device: torch.device) -> Batch:
        """Move all tensors; a copy of pinned memory to a GPU does not make the host wait."""
        # Only towards a GPU: a copy to the host that is not waited for is not there yet.
        ahead = device.type == "cuda"
        return self._each(lambda tensor: tensor.to(device, non_blocking=ahead))

    def pinned(self) -> Batch:
        """Copy all tensors into pinned memory, from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.targets is not None:
            of_targets = {name: change(value) for name, value in vars(self.targets).items()}
            changed["targets"] = SparseTargets(**of_targets)
        return replace(self, **changed)


class DomainRows:
    """The first `limit` packed rows of one domain; the first `validation` of them are held out.

    Held-out rows lie evenly over the first `span` rows on the disk. They are numbered first: each
    trades places with a row at the start. Without span and limit all rows count.
    """

    def __init__(
        self,
        name: str,
        artifact: Artifact,
        validation: int,
        span: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.name, self.validation, self.limit = name, validation, limit
        self._shards = ShardReader(artifact.path)
        stored = len(self._shards)
        self._place = _traded_places(validation, stored if span is None else min(span, stored))

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
        return self._shards.row(self._place.get(index, index))


def _traded_places(validation: int, span: int) -> dict[int, int]:
    """Map row numbers to places on the disk, where these differ."""
    place: dict[int, int] = {}
    for first in range(min(validation, span)):
        other = first * span // validation
        # An earlier trade may have moved either of the two rows.
        here, there = place.get(first, first), place.get(other, other)
        place[first], place[other] = there, here
    return place


def load_batch(domains: Mapping[str, DomainRows], rows: Sequence[Row]) -> Batch:
    """Read rows and make the labels."""
    packed = [domains[name].row(index) for name, index in rows]
    # `np.stack` copies, so nothing writes into the mapped file.
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
    """Label each token with the next one where that is supervised and of the same document.

    All tensors are (B, T). Other places, and the last of each row, get IGNORE_INDEX.
    """
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    same_document = segment_ids[:, 1:] == segment_ids[:, :-1]
    # The next token decides: a prompt's last token is trained to predict the response's first.
    keep = supervised[:, 1:] & same_document
    labels[:, :-1] = torch.where(keep, input_ids[:, 1:], IGNORE_INDEX)
    return labels

"""Where the teacher's targets come from: a store on disk, or the teacher at work. Same interface."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xlstm_distill.data.rows import IGNORE_INDEX, Batch
from xlstm_distill.errors import RunError
from xlstm_distill.losses.head import fuse_head
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import CausalLM
from xlstm_distill.targets.codec import Row
from xlstm_distill.targets.store import INDEX_FILE, Store, refusal


class TargetSource(Protocol):
    """Gives the teacher's targets at the kept tokens of a batch, in the order of its labels."""

    def __call__(self, batch: Batch) -> SparseTargets: ...


def kept_hidden(model: CausalLM, batch: Batch, **inputs: Any) -> Tensor:
    """Hidden states (K, d) that the model's head gets at the kept tokens."""
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs
    ).last_hidden_state
    return hidden[batch.labels != IGNORE_INDEX]


def kept_logits(model: CausalLM, batch: Batch, **inputs: Any) -> Tensor:
    """Logits (K, V) at the kept tokens only."""
    return model.lm_head(kept_hidden(model, batch, **inputs))


class OnlineTargets:
    """The teacher itself, run on every batch, in whatever dtype it was loaded; no (K, V) tensor is made."""

    def __init__(
        self, teacher: CausalLM, top_k: int, mass: float | None = None, min_k: int = 1
    ) -> None:
        self.teacher, self.top_k = teacher.eval().requires_grad_(False), top_k
        self.head, self.mass, self.min_k = fuse_head(teacher), mass, min_k

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return next(self.teacher.parameters()).device

    @torch.no_grad()
    def __call__(self, batch: Batch) -> SparseTargets:
        found = self.head.targets(kept_hidden(self.teacher, batch), self.top_k)
        return found.keep_mass(self.mass, self.min_k)


def text_checksums(batch: Batch) -> list[int]:
    """Checksum of each row's tokens, documents and labels: what its targets depend on besides the teacher."""
    columns = (
        torch.stack([batch.input_ids, batch.segment_ids, batch.labels], dim=1)
        .to(torch.int32)
        .cpu()
        .numpy()
    )
    return [zlib.crc32(row.astype("<i4").tobytes()) for row in columns]


class StoredTargets:
    """Reads the targets of any rows from the stores of several domains."""

    def __init__(self, stores: Mapping[str, Store]) -> None:
        self.stores = dict(stores)

    def __call__(self, batch: Batch) -> SparseTargets:
        rows = [
            self._row(name, row, checksum)
            for (name, row), checksum in zip(batch.rows, text_checksums(batch), strict=True)
        ]
        return to_targets(rows, batch.labels.device)

    def _row(self, name: str, row: int, checksum: int) -> Row:
        """Read one row.

        Raises:
            RunError: there is no such row, it is damaged, or it was made from another text.
        """
        if name not in self.stores:
            raise RunError(f"targets of domain {name!r} are not in the store; run capture again.")
        targets, source = self.stores[name].row(row)
        if source != checksum:
            raise refusal(
                self.stores[name].directory / INDEX_FILE,
                f"row {row} of {name!r} holds targets of another text than the data has",
            )
        return targets


def to_targets(rows: list[Row], device: torch.device | str = "cpu") -> SparseTargets:
    """Join decoded rows into padded tensors."""
    counts = np.concatenate([row.counts for row in rows])
    width = int(counts.max()) if len(counts) else 0
    kept = np.arange(width) < counts[:, None]
    ids = np.zeros(kept.shape, np.int64)
    ids[kept] = np.concatenate([row.ids for row in rows])
    log_probs = np.full(kept.shape, -np.inf, np.float32)
    log_probs[kept] = np.concatenate([row.log_probs for row in rows])
    tail = np.concatenate([row.tail for row in rows])
    return SparseTargets(*(torch.from_numpy(part).to(device) for part in (ids, log_probs, tail)))

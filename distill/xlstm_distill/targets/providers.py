"""Where the teacher's targets come from: a store on disk, or the teacher itself."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from xlstm_distill.data.rows import Batch
from xlstm_distill.errors import RunError
from xlstm_distill.losses.fused import bounded
from xlstm_distill.losses.head import fuse_head
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import CausalLM, logit_cap, logit_factor
from xlstm_distill.models.packed import teacher_hidden
from xlstm_distill.runtime.products import fast_linear_layers
from xlstm_distill.targets.codec import TargetRow
from xlstm_distill.targets.shard import refusal
from xlstm_distill.targets.store import INDEX_FILE, Store


class TargetSource(Protocol):
    """Returns the teacher's targets at the kept tokens of a batch, in the order of its labels.

    Kept are the tokens with a label.
    """

    def __call__(self, batch: Batch) -> SparseTargets: ...


def kept_hidden(model: CausalLM, batch: Batch, **inputs: Any) -> Tensor:
    """Return the hidden states (K, d) that the model's head gets at the kept tokens."""
    hidden = model.model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs
    ).last_hidden_state
    # By index and not by mask: how many tokens a mask keeps, only the device knows.
    return hidden.flatten(0, 1).index_select(0, batch.kept)


def kept_logits(model: CausalLM, batch: Batch, **inputs: Any) -> Tensor:
    """Return the logits (K, V) at the kept tokens only."""
    logits: Tensor = model.lm_head(kept_hidden(model, batch, **inputs))
    factor = logit_factor(model.config)
    scaled = logits if factor == 1 else logits * factor
    return bounded(scaled, logit_cap(model.config))


class OnlineTargets:
    """Run the teacher on every batch, in the dtype in which it was loaded.

    Its head is fused with the choice of the top k, so no (K, V) tensor of logits is made.
    """

    def __init__(
        self, teacher: CausalLM, top_k: int, mass: float | None = None, min_k: int = 1
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.head = fuse_head(teacher)
        self.top_k, self.mass, self.min_k = top_k, mass, min_k

    @property
    def device(self) -> torch.device:
        """Where the teacher is."""
        return next(self.teacher.parameters()).device

    @torch.no_grad()
    def __call__(self, batch: Batch) -> SparseTargets:
        with fast_linear_layers(self.device):
            hidden = teacher_hidden(
                self.teacher,
                batch.input_ids,
                batch.position_ids,
                batch.segment_ids,
                packed=batch.packed,
            )
        kept = hidden.flatten(0, 1).index_select(0, batch.kept)
        # Cut by mass as the store cuts, so that both sources keep the same ids. Not narrowed: the
        # widest row is known to the device alone, and padding costs little beside the logits.
        return self.head.targets(kept, self.top_k).keep_mass(self.mass, self.min_k, narrow=False)


def text_checksums(batch: Batch) -> list[int]:
    """Return the checksum of each row's tokens, documents and labels.

    A row's targets depend on these and on the teacher, and on nothing else.
    """
    parts = [batch.input_ids, batch.segment_ids, batch.labels]
    rows = torch.stack(parts, dim=1).to(torch.int32).cpu().numpy()
    # Little-endian, so that a store made on one machine is good on every other.
    return [zlib.crc32(row.astype("<i4").tobytes()) for row in rows]


class StoredTargets:
    """Read the targets of any rows from the stores of several domains.

    A batch is best on the host then: the text of its rows is compared with the stored one.
    """

    def __init__(self, stores: Mapping[str, Store]) -> None:
        self.stores = dict(stores)

    def __call__(self, batch: Batch) -> SparseTargets:
        found = []
        for (name, row), checksum in zip(batch.rows, text_checksums(batch), strict=True):
            found.append(self._row(name, row, checksum))
        return to_targets(found, batch.labels.device)

    def _row(self, name: str, row: int, checksum: int) -> TargetRow:
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


def to_targets(rows: list[TargetRow], device: torch.device | str = "cpu") -> SparseTargets:
    """Join decoded rows into tensors, padded with id 0 and log-probability -inf."""
    counts = np.concatenate([row.counts for row in rows])
    # As wide as this batch needs, and not always top_k: with `mass`, most tokens keep few ids.
    width = int(counts.max()) if len(counts) else 0
    kept = np.arange(width) < counts[:, None]
    ids = np.zeros(kept.shape, np.int64)
    ids[kept] = np.concatenate([row.ids for row in rows])
    log_probs = np.full(kept.shape, -np.inf, np.float32)
    log_probs[kept] = np.concatenate([row.log_probs for row in rows])
    tail = np.concatenate([row.tail for row in rows])
    return SparseTargets(
        ids=torch.from_numpy(ids).to(device),
        log_probs=torch.from_numpy(log_probs).to(device),
        tail=torch.from_numpy(tail).to(device),
    )

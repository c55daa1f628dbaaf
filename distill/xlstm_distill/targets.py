"""Where the teacher's targets come from: a store on disk, or the teacher at work. Same interface."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlstm_distill.data import IGNORE_INDEX, Batch
from xlstm_distill.errors import RunError
from xlstm_distill.families import CausalLM
from xlstm_distill.fused_loss import fuse_head
from xlstm_distill.losses import SparseTargets

INDEX_FILE = "index.json"
SHARD_ROWS = 256


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
    """The teacher itself, run on every batch."""

    def __init__(self, teacher: CausalLM, top_k: int) -> None:
        self.teacher, self.top_k = teacher.eval().requires_grad_(False), top_k
        self.head = fuse_head(teacher)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> SparseTargets:
        return self.head.targets(kept_hidden(self.teacher, batch), self.top_k)


class StoreWriter:
    """Writes a domain's targets in shards of whole rows; ids as int32, log-probabilities as fp16.

    `bytes_per_token` and `mean_kl_error` (KL in nats of the stored restricted distribution from the exact one) tell
    what the store costs.
    """

    def __init__(self, directory: Path, top_k: int) -> None:
        self.directory, self.top_k = directory, top_k
        self.counts: list[int] = []
        self.parts: list[SparseTargets] = []
        self.shard_rows: list[int] = []
        self.tokens = self.bytes = 0
        self.kl_error = 0.0
        directory.mkdir(parents=True)

    def add(self, row_counts: list[int], targets: SparseTargets) -> None:
        """Append rows: how many kept tokens each has, and their targets in order."""
        stored = targets.log_probs.to(torch.float16)
        exact = targets.log_probs.log_softmax(dim=-1)
        rounded = stored.float().log_softmax(dim=-1)
        self.kl_error += float((exact.exp() * (exact - rounded)).sum())
        self.counts += row_counts
        self.parts.append(SparseTargets(targets.ids.to(torch.int32), stored, targets.tail))
        if len(self.counts) >= SHARD_ROWS:
            self._flush()

    def _flush(self) -> None:
        offsets = torch.tensor([0, *self.counts]).cumsum(0)
        tensors = {
            "offsets": offsets,
            "ids": torch.cat([p.ids for p in self.parts]).cpu(),
            "log_probs": torch.cat([p.log_probs for p in self.parts]).cpu(),
            "tail": torch.cat([p.tail for p in self.parts]).cpu(),
        }
        save_file(tensors, self.directory / _shard(len(self.shard_rows)))
        self.tokens += int(offsets[-1])
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self.shard_rows.append(len(self.counts))
        self.counts, self.parts = [], []

    def close(self) -> dict[str, Any]:
        """Write the last shard and the index; returns the store's figures."""
        if self.counts:
            self._flush()
        figures = {
            "tokens": self.tokens,
            "top_k": self.top_k,
            "bytes_per_token": self.bytes / max(self.tokens, 1),
            "mean_kl_error": self.kl_error / max(self.tokens, 1),
        }
        index = {"format": 1, "rows_per_shard": self.shard_rows, **figures}
        (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
        return figures


def _shard(number: int) -> str:
    return f"targets-{number:05d}.safetensors"


class StoredTargets:
    """Reads the targets of any rows from the stores of several domains, memory-mapped."""

    def __init__(self, stores: Mapping[str, Path]) -> None:
        self.stores = dict(stores)
        self.indexes = {name: json.loads((path / INDEX_FILE).read_text()) for name, path in self.stores.items()}
        self.open: dict[Path, Any] = {}

    def __call__(self, batch: Batch) -> SparseTargets:
        kept = (batch.labels != IGNORE_INDEX).sum(dim=1).tolist()
        parts = [self._row(name, row, count) for (name, row), count in zip(batch.rows, kept, strict=True)]
        device = batch.labels.device
        ids, log_probs, tail = (torch.cat(column).to(device) for column in zip(*parts, strict=True))
        return SparseTargets(ids.long(), log_probs.float(), tail)

    def _row(self, name: str, row: int, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        shard, within = self._locate(name, row)
        path = self.stores[name] / _shard(shard)
        try:
            if path not in self.open:
                file = safe_open(path, framework="pt")
                self.open[path] = (file, file.get_tensor("offsets").tolist())
            file, offsets = self.open[path]
            start, stop = offsets[within], offsets[within + 1]
            if stop - start != kept:
                raise RunError(
                    f"{path}: row {row} of {name!r} holds targets of {stop - start} tokens, its data has {kept}; "
                    "the store belongs to other data. Run capture again."
                )
            ids, log_probs, tail = (file.get_slice(key)[start:stop] for key in ("ids", "log_probs", "tail"))
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be read ({error}); run capture again.") from error
        return ids, log_probs, tail

    def _locate(self, name: str, row: int) -> tuple[int, int]:
        """Shard that holds a row, and the row's place there."""
        if name not in self.indexes:
            raise RunError(f"targets of domain {name!r} are not in the store; run capture again.")
        for shard, rows in enumerate(self.indexes[name]["rows_per_shard"]):
            if row < rows:
                return shard, row
            row -= rows
        raise RunError(f"{self.stores[name]}: has no row that far; run capture again.")

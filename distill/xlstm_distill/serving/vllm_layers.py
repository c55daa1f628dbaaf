"""The layers of a student in vLLM: mixers and kept attention, whose state is in vLLM's memory.

A step of the engine holds tokens of several requests in one row: first those that decode one token,
then chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from xlstm_distill.models.attention.heads import take
from xlstm_distill.models.attention.layout import as_runs
from xlstm_distill.models.cache import MixerCacheLayer, StudentCache
from xlstm_distill.models.decoding.arrival import Arrival
from xlstm_distill.models.decoding.step import decode_token, fold_gates
from xlstm_distill.models.mixer import HybridMixer
from xlstm_distill.serving.vllm_pages import page_tokens, parts_of
from xlstm_kernels import MLSTMState
from xlstm_kernels.state import LOG_ZERO

Rotations = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary positions, (1, T, D) each."""
Rows = Tensor | slice
"""Which rows of vLLM's tensors are the requests', (B,)."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of the row, which continue a request."""

    start: int
    end: int
    arrival: Arrival


class Step:
    """Whose tokens a step of the engine holds; found once, for all layers.

    metadata: what vLLM says of the step to a layer with a mixer; all say the same but for the slots
    of the requests. decodes: how many requests decode, one token each; arrival is theirs.
    """

    def __init__(self, metadata: Any) -> None:
        self.decodes: int = metadata.num_decodes
        starts, lengths = metadata.query_start_loc, metadata.seq_lens
        held = lengths[: self.decodes].long() - 1
        # Those with nothing before are prompts of one token: the state is empty.
        self.arrival = Arrival(1, 1, held, (held == 0).long()[:, None])
        self.chunks: list[Chunk] = []
        self._slots: dict[int, tuple[Rows, list[int]]] = {}
        self._rotations: tuple[Rotations, list[Rotations]] | None = None
        # Waits for the device, and only where a prompt is read.
        if metadata.num_prefills:
            bounds = starts[self.decodes :].tolist()
            ends = lengths[self.decodes :]
            befores = (ends - starts[self.decodes :].diff()).long()
            for n, before in enumerate(befores.tolist()):
                start, end = bounds[n], bounds[n + 1]
                arrival = Arrival(end - start, before, befores[n : n + 1], None)
                self.chunks.append(Chunk(start, end, arrival))

    def slots(self, metadata: Any) -> tuple[Rows, list[int]]:
        """Return where a layer's states are of those that decode, and of each chunk."""
        # vLLM groups layers, and a group shares its metadata.
        found = self._slots.get(id(metadata))
        if found is None:
            slots = metadata.state_indices_tensor
            chunks = slots[self.decodes :].tolist() if self.chunks else []
            found = self._slots[id(metadata)] = rows_of(slots[: self.decodes].long()), chunks
        return found

    def rotations(self, given: Rotations) -> list[Rotations]:
        """Return those of the decoded tokens, (B, 1, D), and of each chunk, (1, T, D)."""
        # Most layers share them, and a mixer remembers what it made of the same tensors.
        if self._rotations is None or self._rotations[0][0] is not given[0]:
            cos, sin = given
            parts = [(cos[0, : self.decodes, None], sin[0, : self.decodes, None])]
            parts += [(cos[:, c.start : c.end], sin[:, c.start : c.end]) for c in self.chunks]
            self._rotations = (given, parts)
        return self._rotations[1]


def rows_of(slots: Tensor) -> Rows:
    """Return slots (B,) as a slice where they are neighbours and asking costs nothing.

    A slice of the states is a view. Other rows torch copies out and back.
    """
    if slots.device.type == "cpu" and len(slots):
        places = slots.tolist()
        first, end = places[0], places[0] + len(places)
        if places == list(range(first, end)):
            return slice(first, end)
    return slots


class KeptAttention(Attention):
    """vLLM's attention for the heads that a layer keeps, over its pages of keys and values."""

    def __init__(self, mixer: HybridMixer, page: int) -> None:
        heads, own = mixer.kept, {}
        if mixer.family.sink_logits:
            own["sinks"] = mixer.sink_logits(heads.full_queries)
        super().__init__(
            sum(end - first for first, end in heads.full_queries),
            mixer.head_dim,
            mixer.scale,
            heads.kept_keys,
            logits_soft_cap=mixer.softcap,
            prefix=f"layers.{mixer.layer_idx}.attention",
            **own,
        )
        if not self.attn_backend.supports_head_size(mixer.head_dim):
            raise ValueError(
                f"student.mixer.attention: vLLM's {self.attn_backend.get_name()} takes no heads of"
                f" {mixer.head_dim}; serve this student with --engine transformers."
            )
        self.page, self.page_tokens = page, page_tokens(mixer, page)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        """Tell vLLM how many tokens a page takes."""
        found = super().get_kv_cache_spec(vllm_config)
        assert found is not None
        spec: Any = replace(found, block_size=self.page_tokens)
        return (
            spec if spec.page_size_bytes == self.page else replace(spec, page_size_padded=self.page)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Let the tokens of a step attend, q (T, H, D), k and v (T, G, D): (T, H, D)."""
        return self(q.flatten(1), k.flatten(1), v.flatten(1)).view(q.shape)


class ServedAttention(nn.Module):
    """A layer that keeps all of its attention: a step's tokens need not be told apart."""

    def __init__(self, mixer: HybridMixer, page: int) -> None:
        super().__init__()
        self.mixer, self.attention = mixer, KeptAttention(mixer, page)
        mixer.keeper = self._keep

    def forward(
        self, hidden_states: Tensor, position_embeddings: Rotations, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Let the tokens of a step (1, T, d) attend, each to its own request's."""
        return self.mixer.o_proj(self.mixer.mix(hidden_states, position_embeddings)), None

    def _keep(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        return self.attention.attend(*rows).transpose(0, 1)[None]


class ServedMixer(nn.Module, MambaBase):
    """A mixer that keeps its state in vLLM's memory, where a layer had its attention.

    page: bytes of vLLM's pages.
    """

    def __init__(
        self, mixer: HybridMixer, cache: StudentCache, page: int, config: VllmConfig
    ) -> None:
        super().__init__()
        self.mixer, self.cache, self.page = mixer, cache, page
        layer = cache.layers[mixer.layer_idx]
        assert isinstance(layer, MixerCacheLayer)
        self.layer: MixerCacheLayer = layer
        self.prefix = f"layers.{mixer.layer_idx}.mixer"
        if mixer.has_mlstm:
            # Here, because it reads weights that are packed later.
            self.layer.folded = (fold_gates(mixer),)
        self.parts = parts_of(mixer)
        self.kv_cache: tuple[Tensor, ...] = tuple(torch.empty(0) for _ in self.parts)
        config.compilation_config.static_forward_context[self.prefix] = self
        self.attention = KeptAttention(mixer, page) if mixer.kept.kept else None
        # Queries, keys and values of kept heads, a tensor (T, H, D) each for each part of a step.
        self.aside: list[tuple[Tensor, ...]] = []

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Name how vLLM describes a step to the layer."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        """Return the state's shape for one request: bytes, and as many in all layers.

        vLLM then has one kind of state, and room for the largest of them.
        """
        return [(self.page,)]

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Return the number format of the state."""
        return (torch.uint8,)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take over the layer's pages, (P, 1, 1, bytes)."""
        pages = kv_cache.view(kv_cache.shape[0], -1)
        self.kv_cache = tuple(part.of(pages) for part in self.parts)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotations,
        step: Step | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of a step (1, T, d), each with its own request's state."""
        kept = step is not None and self.attention is not None
        self.mixer.keeper = self._put_aside if kept else None
        if step is None:  # vLLM measures memory, and there is no state yet
            mixed = self.mixer.mix(hidden_states, position_embeddings)
            return self.mixer.o_proj(mixed), None
        decoding, reading = step.slots(get_forward_context().attn_metadata[self.prefix])
        parts = []
        first, *rest = step.rotations(position_embeddings)
        if step.decodes:
            x = hidden_states[:, : step.decodes]
            parts.append(self._decode(x, first, step.arrival, decoding))
        for chunk, slot, rotation in zip(step.chunks, reading, rest, strict=True):
            x = hidden_states[:, chunk.start : chunk.end]
            parts.append(self._read(x, rotation, chunk.arrival, slot))
        mixed = torch.cat(parts, dim=1)
        if kept:
            self._attend(mixed)
        # Rows that vLLM adds to fill a batch.
        if rows := hidden_states.shape[1] - mixed.shape[1]:
            mixed = nn.functional.pad(mixed, (0, 0, 0, rows))
        return self.mixer.o_proj(mixed), None

    def _put_aside(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take what kept heads read of a part of the step; `_attend` writes their outputs later.

        vLLM's attention takes all tokens of a step at once. q (B, H, T, D), k, v (B, G, T, D).
        """
        self.aside.append(tuple(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)))
        return torch.zeros_like(q)

    def _attend(self, mixed: Tensor) -> None:
        """Write the outputs of the kept heads into those of all, (1, T, H D)."""
        assert self.attention is not None
        heads = self.mixer.kept
        q, k, v = (torch.cat(parts) for parts in zip(*self.aside, strict=True))
        self.aside.clear()
        full = take(self.attention.attend(q, k, v), heads.full_outputs)
        outputs = mixed[0].unflatten(-1, (heads.total, -1))
        before = 0
        for first, end in as_runs(heads.kept):
            outputs[:, first:end] = full[:, before : before + end - first]
            before += end - first

    def _decode(self, x: Tensor, rotation: Rotations, arrival: Arrival, rows: Rows) -> Tensor:
        """Decode a token of each request, x (1, B, d), whose states are in these rows: (1, B, H D).

        In place: the states of 64 requests of an 8B student are 8 GiB.
        """
        if isinstance(rows, slice):
            self._hold(state[rows] for state in self.kv_cache)
        else:
            self._hold(self.kv_cache)
            self.layer.rows = rows
        if arrival.begins is not None and self.mixer.has_mlstm and x.device.type == "cpu":
            self.layer.restart_state(arrival.begins)
        mixed = decode_token(self.mixer, x.transpose(0, 1), rotation, arrival, self.layer)
        self.layer.rows = None
        return mixed.transpose(0, 1)

    def _read(self, x: Tensor, rotation: Rotations, arrival: Arrival, slot: int) -> Tensor:
        """Read a chunk of the prompt of the request in a slot, x (1, T, d): (1, T, H D)."""
        # Views: the state changes in place.
        held = [state[slot : slot + 1] for state in self.kv_cache]
        self._hold(held)
        if arrival.seen == 0:
            # Another request's state is still there.
            for state in held:
                state.zero_()
            if self.layer.state is not None:
                self.layer.state.m.fill_(LOG_ZERO)
        self.cache.arrival = arrival
        return self.mixer.mix(x, rotation, self.cache)

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        """Make the cache's layer hold these tensors, rows first."""
        tensors = list(tensors)
        if self.mixer.has_mlstm:
            self.layer.state = MLSTMState(*tensors[:3])
            tensors = tensors[3:]
        if self.mixer.has_window:
            self.layer.keys, self.layer.values = tensors

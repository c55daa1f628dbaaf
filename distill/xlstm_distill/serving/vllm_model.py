"""A student in vLLM: its own model, whose mixers keep their state in vLLM's memory.

vLLM gives a request one block, and in it each layer the tensors of its state: the mLSTM's memory,
and the ring of keys and values. A step of the engine holds tokens of several requests in one row:
first those that decode one token, then chunks of prompts. All that works token by token (norms,
MLPs, experts) takes the row as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from xlstm_distill.models.cache import Arrival, MixerCacheLayer, StudentCache
from xlstm_distill.models.decoding.step import decode_token
from xlstm_distill.models.mixer import HybridMixer
from xlstm_distill.models.student import NO_MASK
from xlstm_kernels import MLSTMState
from xlstm_kernels.state import LOG_ZERO, state_dtype

Rotations = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary positions, (1, T, D) each."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `end` of the row, which continue the request in a slot."""

    start: int
    end: int
    slot: int
    arrival: Arrival


class Step:
    """Whose tokens a step of the engine holds; found once, for all layers.

    decodes: how many requests decode, one token each; slots (B,) and arrival are theirs.
    """

    def __init__(self, metadata: Any) -> None:
        self.decodes: int = metadata.num_decodes
        self.slots = metadata.state_indices_tensor[: self.decodes].long()
        starts, lengths = metadata.query_start_loc, metadata.seq_lens
        held = lengths[: self.decodes].long() - 1
        # Those with nothing before are prompts of one token: the state is empty.
        self.arrival = Arrival(1, 1, held, (held == 0).long()[:, None])
        self.chunks: list[Chunk] = []
        self._rotations: tuple[Rotations, list[Rotations]] | None = None
        # Waits for the device, and only where a prompt is read.
        if metadata.num_prefills:
            bounds = starts[self.decodes :].tolist()
            ends = lengths[self.decodes :]
            befores = (ends - starts[self.decodes :].diff()).long()
            slots = metadata.state_indices_tensor[self.decodes :].tolist()
            for n, (slot, before) in enumerate(zip(slots, befores.tolist(), strict=True)):
                start, end = bounds[n], bounds[n + 1]
                arrival = Arrival(end - start, before, befores[n : n + 1], None)
                self.chunks.append(Chunk(start, end, slot, arrival))

    def rotations(self, given: Rotations) -> list[Rotations]:
        """Return those of the decoded tokens, (B, 1, D), and of each chunk, (1, T, D)."""
        # Most layers share them, and a mixer remembers what it made of the same tensors.
        if self._rotations is None or self._rotations[0][0] is not given[0]:
            cos, sin = given
            parts = [(cos[0, : self.decodes, None], sin[0, : self.decodes, None])]
            parts += [(cos[:, c.start : c.end], sin[:, c.start : c.end]) for c in self.chunks]
            self._rotations = (given, parts)
        return self._rotations[1]


class ServedMixer(nn.Module, MambaBase):
    """A mixer that keeps its state in vLLM's memory, where a layer had its attention."""

    def __init__(self, mixer: HybridMixer, cache: StudentCache, config: VllmConfig) -> None:
        super().__init__()
        self.mixer, self.cache = mixer, cache
        layer = cache.layers[mixer.layer_idx]
        assert isinstance(layer, MixerCacheLayer)
        self.layer: MixerCacheLayer = layer
        self.prefix = f"layers.{mixer.layer_idx}.mixer"
        self.shapes = state_shapes(
            mixer, max(part.window for part in cache.layers if isinstance(part, MixerCacheLayer))
        )
        self.kv_cache = tuple(torch.empty(0) for _ in self.shapes)
        config.compilation_config.static_forward_context[self.prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Name how vLLM describes a step to the layer."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        """Return the shape of each tensor of the state, for one request."""
        return [shape for shape, _ in self.shapes]

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Return the number format of each tensor of the state."""
        return tuple(dtype for _, dtype in self.shapes)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotations,
        step: Step | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of a step (1, T, d), each with its own request's state."""
        if step is None:  # vLLM measures memory, and there is no state yet
            mixed = self.mixer.mix(hidden_states, position_embeddings)
            return self.mixer.o_proj(mixed), None
        parts = []
        first, *rest = step.rotations(position_embeddings)
        if step.decodes:
            parts.append(self._decode(hidden_states[:, : step.decodes], first, step))
        for chunk, rotation in zip(step.chunks, rest, strict=True):
            parts.append(self._read(hidden_states[:, chunk.start : chunk.end], rotation, chunk))
        mixed = torch.cat(parts, dim=1)
        # Rows that vLLM adds to fill a batch.
        if rows := hidden_states.shape[1] - mixed.shape[1]:
            mixed = nn.functional.pad(mixed, (0, 0, 0, rows))
        return self.mixer.o_proj(mixed), None

    def _decode(self, x: Tensor, rotation: Rotations, step: Step) -> Tensor:
        """Decode a token of each request, x (1, B, d): (1, B, H D)."""
        # In place: the states of 64 requests of an 8B student are 8 GiB.
        self._hold(self.kv_cache)
        self.layer.rows = step.slots
        if step.arrival.begins is not None and x.device.type == "cpu":
            self.layer.restart_state(step.arrival.begins)
        mixed = decode_token(self.mixer, x.transpose(0, 1), rotation, step.arrival, self.layer)
        self.layer.rows = None
        return mixed.transpose(0, 1)

    def _read(self, x: Tensor, rotation: Rotations, chunk: Chunk) -> Tensor:
        """Read a chunk of a request's prompt, x (1, T, d): (1, T, H D)."""
        # Views: the state changes in place.
        held = [state[chunk.slot : chunk.slot + 1] for state in self.kv_cache]
        self._hold(held)
        if chunk.arrival.seen == 0:
            # Another request's state is still there.
            for state in held:
                state.zero_()
            if self.layer.state is not None:
                self.layer.state.m.fill_(LOG_ZERO)
        self.cache.arrival = chunk.arrival
        return self.mixer.mix(x, rotation, self.cache)

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        """Make the cache's layer hold these tensors, rows first."""
        mixer, layer = self.mixer, self.layer
        tensors = list(tensors)
        if mixer.has_mlstm:
            layer.state = MLSTMState(*tensors[:3])
            tensors = tensors[3:]
        if mixer.has_window:
            groups = mixer.widths[1] // mixer.head_dim
            slots = mixer.sink_tokens + mixer.window
            size = groups * slots * mixer.head_dim
            layer.keys, layer.values = (
                x[:, :size].view(len(x), groups, slots, mixer.head_dim) for x in tensors
            )


def state_shapes(mixer: HybridMixer, window: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor of a mixer's state.

    window: the largest of all layers, since vLLM gives all layers of a request the same room.
    """
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    weight = mixer.value_weight
    if mixer.has_mlstm:
        dtype, features = state_dtype(weight), mixer.feature_map_k.out_features
        memory = (mixer.heads, features, mixer.head_dim)
        found += [(memory, dtype), (memory[:2], dtype), (memory[:1], dtype)]
    if mixer.has_window:
        slots = prod(
            (mixer.widths[1] // mixer.head_dim, mixer.sink_tokens + window, mixer.head_dim)
        )
        found += [((slots,), weight.dtype)] * 2
    return found


class VllmStudent(nn.Module, HasInnerState, IsAttentionFree):
    """A student of any family, as vLLM runs a model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model = vllm_config.model_config
        self.student: Any = AutoModelForCausalLM.from_pretrained(
            model.model, revision=model.revision, dtype=model.dtype
        ).to(vllm_config.device_config.device)
        self.student.eval().requires_grad_(False)
        self.body = self.student.model
        cache = self.student.new_cache()
        for layer in self.body.layers:
            layer.self_attn = ServedMixer(layer.self_attn, cache, vllm_config)
        # Their hooks find documents in rows, and read long prompts in chunks; here a step does.
        for part in (self.student, self.body):
            part._forward_pre_hooks.clear()
        # The head's forward pass then begins with hidden states (families scale or cap logits).
        self.student.model = _Given()

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """Return how vLLM copies each tensor of a state."""
        return (get_temporal_copy_spec,) * 5

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embed tokens (T,)."""
        return self.body.get_input_embeddings()(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return hidden states (T, d) of a step's tokens (T,)."""
        metadata = get_forward_context().attn_metadata
        step = None
        if metadata is not None:
            step = Step(metadata[self.body.layers[0].self_attn.prefix])
        given = (
            {"inputs_embeds": inputs_embeds[None]}
            if inputs_embeds is not None
            else {"input_ids": cast(Tensor, input_ids)[None]}
        )
        found = self.body(
            **given,
            position_ids=positions[None],
            attention_mask=NO_MASK,
            use_cache=False,
            step=step,
        )
        return found.last_hidden_state[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return logits (T, V) of hidden states (T, d)."""
        return self.student(inputs_embeds=hidden_states[None], use_cache=False).logits[0]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Tell vLLM that all weights are there: transformers has read them."""
        return {name for name, _ in self.named_parameters()}


class _Given(nn.Module):
    """Stands where the head looks for the body, and returns what it is given."""

    def forward(self, inputs_embeds: Tensor, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)

"""The hybrid mixer that stands in for a teacher's attention layer (paper, Eq. 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from xlstm_distill.models.attention.full import full_attention
from xlstm_distill.models.attention.heads import joined, take
from xlstm_distill.models.attention.layout import LayerHeads, Runs
from xlstm_distill.models.cache import MixerCacheLayer, checked_cache
from xlstm_distill.models.decoding.arrival import Arrival, asks_first
from xlstm_distill.models.decoding.prefill import take_in
from xlstm_distill.models.decoding.step import (
    decode_token,
    gates_of_prompt,
    rotate_prompt,
    turns_halves,
)
from xlstm_distill.models.families import Family
from xlstm_distill.models.feature_maps import FeatureMap
from xlstm_distill.models.gates import OutputGate, ScalarGate
from xlstm_distill.recipe import MixerConfig
from xlstm_kernels import (
    Backend,
    MLSTMState,
    mlstm,
    sliding_window_attention,
)
from xlstm_kernels.state import state_dtype

NEW_MODULES = ("feature_map_q", "feature_map_k", "input_gate", "forget_gate", "output_gate")
"""Names of the mixer's children that the teacher does not have; stage I trains these alone."""


class MLSTMInputs(NamedTuple):
    """What the mLSTM reads besides v: features (B, H, T, F) and preactivations (B, H, T)."""

    q: Tensor
    k: Tensor
    i: Tensor
    f: Tensor


class MixerInputs(NamedTuple):
    """What the branches read of T tokens, of the heads that are not kept.

    q (B, H, T, D), k (B, G, T, D) after RoPE, v (B, G, T, D); memory: None without the mLSTM; gate
    (B, H, T, 1) after its sigmoid: None with one branch only.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    memory: MLSTMInputs | None
    gate: Tensor | None


class HybridMixer(nn.Module):
    """Mix sliding-window attention with sinks and an mLSTM over the document, by a gate per head.

    ĥ_t = o_t * mLSTM(φ_q(q), φ_k(k), v) + (1 - o_t) * SWA(q, k, v), then the teacher's output
    projection. The mixer takes over the projections (and q/k norms) of `attention`; only the
    modules in `NEW_MODULES` are new.

    Query heads `kept` have the teacher's full attention instead, before the same output projection;
    a layer that keeps all is the teacher's.

    A sequence runs through `mlstm` and `sliding_window_attention`, a decoded token through
    `hybrid_step`. `backend` chooses their implementation; it may be set at any time, and is not
    saved.
    """

    # The teacher's own; `projections` names those that the family has.
    q_proj: Any
    k_proj: Any
    v_proj: Any
    qkv_proj: Any
    o_proj: Any
    sinks: Tensor

    def __init__(
        self, attention: Any, family: Family, config: MixerConfig, kept: Sequence[int] = ()
    ) -> None:
        super().__init__()
        teacher = attention.config
        heads, hidden = teacher.num_attention_heads, teacher.hidden_size
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        keys = teacher.num_key_value_heads * self.head_dim
        self.heads: int = heads
        self.widths = (heads * self.head_dim, keys, keys)  # of queries, keys and values
        self.backend: Backend = "auto"
        # An engine that holds keys and values itself attends for the kept heads: q (B, Hq, T, D),
        # k and v (B, Gk, T, D) after RoPE to (B, Hq, T, D), as `full_attention` gives it.
        self.keeper: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.family, self.mixer_config = family, config
        # Looked up once: an import in every layer and token costs time, and breaks graphs.
        self.apply_rotary = family.apply_rotary
        # Phi-3 may turn a part of each head only; then there are fewer angles.
        partial = getattr(teacher, "partial_rotary_factor", None) or 1.0
        partial = (getattr(teacher, "rope_parameters", None) or {}).get(
            "partial_rotary_factor", partial
        )
        self.turns_halves = partial == 1 and turns_halves(self.apply_rotary, self.head_dim)
        # Some families have layers without positions; a student keeps their queries as they are.
        self.rotates = family.rotates(attention)
        # Some families limit the reach of single layers; a student sees no further than they do.
        reach = family.reach(attention)
        self.window: int = config.window if reach is None else min(config.window, reach)
        self.sink_tokens: int = config.sinks
        # Gemma 2 bounds the scores of its softmax.
        self.softcap: float | None = family.score_cap(teacher)
        if family.sink_logits:
            # gpt-oss calls its learned logits so; they are not of the sink tokens.
            self.sinks = attention.sinks
        # Olmo may limit the values of its projections.
        self.clip: float | None = getattr(teacher, "clip_qkv", None)
        for name in projections(family):
            setattr(self, name, getattr(attention, name))
        # Q/K norms belong to the teacher and stay between projection and RoPE.
        if family.norm != "none":
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.kept = LayerHeads(kept, heads, teacher.num_key_value_heads)
        mixed = len(self.kept.mixed)
        self.has_mlstm = mixed > 0 and "mlstm" in config.branches
        self.has_window = mixed > 0 and "window" in config.branches
        if self.has_mlstm:
            features = config.feature_dim or self.head_dim
            self.feature_map_q = FeatureMap(mixed, self.head_dim, features, config.feature_map)
            self.feature_map_k = FeatureMap(mixed, self.head_dim, features, config.feature_map)
            # A constant input-gate bias cancels in the ratio, so its initial value is immaterial.
            self.input_gate = ScalarGate(hidden, mixed, 0.0)
            self.forget_gate = ScalarGate(hidden, mixed, config.forget_bias)
        if self.has_mlstm and self.has_window:
            self.output_gate = OutputGate(mixed, self.head_dim, config.output_gate_bias)

    @property
    def kernel_dims(self) -> dict[str, int]:
        """Widths of the heads that kernels must have, by their letter."""
        dims = {"D": self.head_dim}
        return dims | ({"Dk": self.feature_map_q.out_features} if self.has_mlstm else {})

    @property
    def value_weight(self) -> Tensor:
        """Weight (G * D, d) that makes the values; some families fuse it with others'."""
        if not self.family.fused:
            return cast(Tensor, self.v_proj.weight)
        return cast(Tensor, self.qkv_proj.weight.split(self.widths)[2])

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        segment_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return the layer's output (B, T, d) and no attention weights.

        `attention_mask` is not read: documents and padding come as `segment_ids` (B, T), which the
        student makes. With a cache, tokens of id 0 continue the document that it holds.
        """
        mixed = self.mix(hidden_states, position_embeddings, past_key_values, segment_ids)
        return self.o_proj(mixed), None

    def mix(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        segment_ids: Tensor | None = None,
        value_scale: Tensor | None = None,
        *,
        mixed_only: bool = False,
    ) -> Tensor:
        """Return the heads' outputs before the output projection, (B, T, H * D).

        Stage I aligns these: of the heads that are not kept, where `mixed_only`. `value_scale`, a
        scalar, multiplies the values that the output gate reads.
        """
        layer = self._cache_layer(past_key_values)
        arrival = None if layer is None else checked_cache(past_key_values).arrival
        # A prompt of a single token goes this way too: an empty cache is a state like any other.
        # Not where gradients are recorded: a step has none.
        if layer is not None and hidden_states.shape[1] == 1 and not self._records(hidden_states):
            assert arrival is not None
            return decode_token(self, hidden_states, position_embeddings, arrival, layer)
        if layer is not None and checked_cache(past_key_values).wants_no_outputs(self.layer_idx):
            assert arrival is not None
            take_in(self, hidden_states, position_embeddings, arrival, layer, segment_ids)
        q, k, v = self.project(hidden_states)
        gates, records = None, layer is None or self._records(hidden_states)
        if layer is not None and self.has_mlstm and not records:
            gates = gates_of_prompt(self, layer, hidden_states, v.dtype)
        # The gate reads q and k before RoPE, so that it depends on content and not on position.
        gate = None if gates is None else gates[2]
        if gate is None and self.has_mlstm and self.has_window:
            scaled = v if value_scale is None else v * value_scale
            gate = self.output_gate(*self.of_mixer(q, k, scaled))
        # RoPE is kept (paper): both branches read rotated queries and keys.
        if self.rotates and self.turns_halves and arrival is not None and not records:
            q, k = rotate_prompt(q, k, position_embeddings, arrival)
        elif self.rotates:
            q, k = self.apply_rotary(q, k, *position_embeddings)
        # Under autocast, projections are bf16 and rotary positions fp32.
        q, k = q.to(v.dtype), k.to(v.dtype)
        full = None
        if self.kept.kept and not mixed_only:
            full = self.keep(q, k, v, layer, arrival, segment_ids)
        mixed = None
        if self.kept.mixed:
            q, k, v = self.of_mixer(q, k, v)
            memory = None
            if self.has_mlstm:
                i, f = self.scalar_gates(hidden_states) if gates is None else gates[:2]
                memory = MLSTMInputs(self.feature_map_q(q), self.feature_map_k(k), i, f)
            inputs = MixerInputs(q, k, v, memory, gate)
            mixed = self._mix_sequence(inputs, layer, arrival, segment_ids)
        if layer is not None:
            # Not before: transformers counts positions from it.
            layer.seen += hidden_states.shape[1]
        return joined(self.kept, full, mixed).transpose(1, 2).flatten(2)

    def sink_logits(self, heads: Runs) -> Tensor | None:
        """Take the learned logits of heads, (M,); None where the family has none."""
        return take(self.sinks[None], heads)[0] if self.family.sink_logits else None

    def of_mixer(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take queries, keys and values of the heads that are not kept."""
        heads = self.kept
        return take(q, heads.queries), take(k, heads.keys), take(v, heads.keys)

    def keep(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: MixerCacheLayer | None,
        arrival: Arrival | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Attend in full with the heads that are kept, of q, k, v of all heads: (B, K, T, D).

        With a cache, which takes the tokens in, also to all tokens of their document that it holds.
        """
        heads = self.kept
        q, k, v = take(q, heads.full_queries), take(k, heads.full_keys), take(v, heads.full_keys)
        if self.keeper is not None:
            return take(self.keeper(q, k, v), heads.full_outputs)
        documents = None if segment_ids is None else (segment_ids, segment_ids)
        if layer is not None and arrival is not None:
            documents = arrival.documents(q.device)
            recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            k, v = layer.extend(k, v, recorded=recorded)
        own: dict[str, Any] = {"softcap": self.softcap, "backend": self.backend}
        own["sink_logits"] = self.sink_logits(heads.full_queries)
        return take(full_attention(q, k, v, self.scale, documents, **own), heads.full_outputs)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries (B, H, T, D), keys and values (B, G, T, D) of x (B, T, d), before RoPE.

        Queries and keys are normalised as in the family.
        """

        def split(y: Tensor) -> Tensor:
            if y.shape[1] == 1:  # the same in one operator less
                return y.reshape(len(y), -1, 1, self.head_dim)
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        if self.family.fused:
            q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.clip is not None:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        if self.family.norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = split(q), split(k), split(v)
        if self.family.norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def scalar_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return preactivations of input and forget gate of x (B, T, d), (B, H, T) in fp32."""
        i, f = self.input_gate(x), self.forget_gate(x)  # (B, T, H)
        return i.mT.float(), f.mT.float()

    def _records(self, x: Tensor) -> bool:
        """Tell whether autograd records what the mixer computes of x."""
        return torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )

    def _cache_layer(self, past_key_values: Cache | None) -> MixerCacheLayer | None:
        if past_key_values is None:
            return None
        layer = checked_cache(past_key_values).layers[self.layer_idx]
        assert isinstance(layer, MixerCacheLayer)
        return layer

    def _mix_sequence(
        self,
        inputs: MixerInputs,
        layer: MixerCacheLayer | None,
        arrival: Arrival | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Mix the branches over T tokens, (B, H, T, D).

        With a cache, the tokens continue what it holds, and it takes them in.
        """
        q, k, v, memory, gate = inputs
        recalled = None
        if memory is not None:
            recalled = self.recall(memory, v, layer, arrival, segment_ids)
        if not self.has_window:
            assert recalled is not None
            return recalled
        if layer is None or arrival is None or arrival.seen == 0:
            attended = self._attend(q, k, v, segment_ids)
        else:
            prefix = layer.prefix(arrival.held)
            attended = self._attend_after_prefix(q, k, v, prefix, segment_ids)
        if layer is not None and arrival is not None:
            # Last, because the chunk's first queries see tokens that its last keys replace.
            layer.update(k, v, arrival)
        if recalled is None or gate is None:
            return attended
        # (1 - o) SWA + o mLSTM (paper, Eq. 11).
        return torch.lerp(attended, recalled, gate.to(recalled.dtype))

    def recall(
        self,
        memory: tuple[Tensor, Tensor, Tensor, Tensor],
        v: Tensor,
        layer: MixerCacheLayer | None,
        arrival: Arrival | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Run the mLSTM over T tokens, (B, H, T, D).

        With a cache, it continues from the cache's state and updates that in place.
        """
        q, k, i, f = memory
        if layer is None or arrival is None:
            return mlstm(q, k, v, i, f, segment_ids=segment_ids, backend=self.backend)
        held = layer.state_for(k, v, state_dtype(q, v))
        if arrival.begins is not None:
            layer.restart_state(arrival.begins_on(v.device))
        # A backward pass must find the state as it was read here, and it changes below.
        before = MLSTMState(*(t.clone() for t in held)) if torch.is_grad_enabled() else held
        h, state = mlstm(
            q,
            k,
            v,
            i,
            f,
            segment_ids=segment_ids,
            state=before,
            return_state=True,
            backend=self.backend,
        )
        # In place: a compiled step and its graph hold on to these tensors' addresses.
        for old, new in zip(held, state, strict=True):
            old.copy_(new.detach())
        return h

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Attend to the window and the sinks inside the sequence, (B, H, T, D)."""
        return sliding_window_attention(
            q,
            k,
            v,
            window=self.window,
            sinks=self.sink_tokens,
            segment_ids=segment_ids,
            scale=self.scale,
            softcap=self.softcap,
            sink_logits=self.sink_logits(self.kept.queries),
            backend=self.backend,
        )

    def _attend_after_prefix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix: tuple[Tensor, Tensor, Tensor],
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Attend from a chunk also to the tokens that the cache holds, (B, H, T, D).

        The held tokens go in front of the chunk, as tokens of document 0. They are the first N and
        the last W of their document. So distances inside the window are right, and no query sees
        the tokens that are missing between them.
        """
        held_k, held_v, valid = prefix
        batch, heads, tokens, dim = q.shape
        segments = None
        # Full rows that go on, as in a long prompt: no documents, and one plan for all chunks.
        if segment_ids is not None or not (asks_first(valid) and bool(valid.all())):
            chunk = valid.new_zeros(batch, tokens).long() if segment_ids is None else segment_ids
            # Empty slots are in a document of their own, -1.
            segments = torch.cat([valid.long() - 1, chunk], dim=1)
        # The operator wants a query for each key; outputs of these are dropped.
        queries = torch.cat([q.new_zeros(batch, heads, held_k.shape[2], dim), q], dim=2)
        keys, values = torch.cat([held_k, k], dim=2), torch.cat([held_v, v], dim=2)
        return self._attend(queries, keys, values, segments)[:, :, -tokens:]


def projections(family: Family) -> tuple[str, ...]:
    """Return the names of a family's attention projections."""
    return ("qkv_proj", "o_proj") if family.fused else ("q_proj", "k_proj", "v_proj", "o_proj")

"""The hybrid mixer that stands in for a teacher's attention layer (paper, Eq. 11)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from xlstm_distill.models.cache import MixerCacheLayer, checked_cache
from xlstm_distill.models.families import Family
from xlstm_distill.models.feature_maps import FeatureMap, in_dtype_of
from xlstm_distill.recipe import MixerConfig
from xlstm_kernels import MLSTMState, mlstm, mlstm_step, sliding_window_attention
from xlstm_kernels.state import LOG_ZERO, state_dtype

NEW_MODULES = ("feature_map_q", "feature_map_k", "input_gate", "forget_gate", "output_gate")
"""Names of the mixer's children that the teacher does not have; stage I trains these and nothing else."""


class ScalarGate(nn.Linear):
    """Preactivations of a scalar gate per head from the layer's input: (B, T, d) -> (B, H, T), fp32."""

    def __init__(self, hidden: int, heads: int, bias: float) -> None:
        self.initial_bias = bias
        super().__init__(hidden, heads)

    def reset_parameters(self) -> None:
        """Start as a constant gate."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(in_dtype_of(x, self.weight)).transpose(1, 2).float()


class OutputGate(nn.Module):
    """o = sigmoid(W_h [q, k, v] + b_h): one scalar per head from the head's own q, k, v before RoPE (paper, Eq. 11).

    Shapes: q (B, H, T, D); k, v (B, G, T, D); returns (B, H, T, 1) in q's dtype.
    """

    def __init__(self, heads: int, dim: int, bias: float) -> None:
        super().__init__()
        self.initial_bias = bias
        self.weight = nn.Parameter(torch.empty(heads, 3, dim))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a constant gate."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, _, dim = self.weight.shape
        batch, groups, tokens, _ = k.shape
        dtype = q.dtype
        q, k, v = (in_dtype_of(x, self.weight) for x in (q, k, v))
        w_q, w_k, w_v = self.weight.view(groups, heads // groups, 3, dim).unbind(
            2
        )  # (G, H/G, D) each
        logits = (q * w_q.reshape(heads, 1, dim)).sum(-1)  # (B, H, T)
        shared = k @ w_k.transpose(1, 2) + v @ w_v.transpose(1, 2)  # (B, G, T, H/G)
        logits = logits + shared.transpose(2, 3).reshape(batch, heads, tokens)
        return torch.sigmoid((logits + self.bias[:, None]).float())[..., None].to(dtype)


class HybridMixer(nn.Module):
    """Sliding-window attention with sinks and an mLSTM over the whole document, mixed per head by an output gate.

    ĥ_t = o_t * mLSTM(φ_q(q), φ_k(k), v) + (1 - o_t) * SWA(q, k, v), then the teacher's output projection. Takes over
    the projections (and q/k norms) of `attention`; only the modules in `NEW_MODULES` are new.
    """

    def __init__(self, attention: Any, family: Family, config: MixerConfig) -> None:
        super().__init__()
        teacher = attention.config
        heads, hidden = teacher.num_attention_heads, teacher.hidden_size
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        self.family, self.mixer_config = family, config
        reach = getattr(
            attention, "sliding_window", None
        )  # of the teacher's own layer, in some families
        self.window: int = config.window if reach is None else min(config.window, reach)
        self.q_proj: nn.Module
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj = attention.o_proj
        if family.norm != "none":
            self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.has_mlstm, self.has_window = "mlstm" in config.branches, "window" in config.branches
        if self.has_mlstm:
            features = config.feature_dim or self.head_dim
            self.feature_map_q = FeatureMap(heads, self.head_dim, features, config.feature_map)
            self.feature_map_k = FeatureMap(heads, self.head_dim, features, config.feature_map)
            # A constant input-gate bias cancels in the ratio, so its initial value is immaterial.
            self.input_gate = ScalarGate(hidden, heads, 0.0)
            self.forget_gate = ScalarGate(hidden, heads, config.forget_bias)
        if self.has_mlstm and self.has_window:
            self.output_gate = OutputGate(heads, self.head_dim, config.output_gate_bias)

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

        `attention_mask` is not read: documents and padding come as `segment_ids` (B, T), which the student makes. With
        a cache, tokens of id 0 continue the document that it holds.
        """
        mixed = self.mix(hidden_states, position_embeddings, past_key_values, segment_ids)
        return self.o_proj(mixed), None

    def mix(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the heads' outputs before the output projection, (B, T, H * D): what stage I aligns."""
        q, k, v = self._project(hidden_states)
        gate = self.output_gate(q, k, v) if self.has_mlstm and self.has_window else None
        q, k = self.family.apply_rotary(q, k, *position_embeddings)
        q, k = (
            q.to(v.dtype),
            k.to(v.dtype),
        )  # under autocast, projections are bf16 and rotary positions fp32
        layer = self._cache_layer(past_key_values)
        if not self.has_mlstm:
            mixed = self._window(q, k, v, layer, segment_ids)
        else:
            mixed = self._mlstm(hidden_states, q, k, v, layer, segment_ids)
            if layer is not None or self.has_window:  # the cache also counts tokens by its window
                attended = self._window(q, k, v, layer, segment_ids)
            if gate is not None:
                mixed = torch.lerp(attended, mixed, gate.to(mixed.dtype))
        return mixed.transpose(1, 2).flatten(2)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, G, T, D) before RoPE, normalised as the family does."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.family.norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = split(q), split(k), split(v)
        if self.family.norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _cache_layer(self, past_key_values: Cache | None) -> MixerCacheLayer | None:
        if past_key_values is None:
            return None
        layer = checked_cache(past_key_values).layers[self.layer_idx]
        assert isinstance(layer, MixerCacheLayer)
        return layer

    def _mlstm(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: MixerCacheLayer | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Read the mLSTM, (B, H, T, D); with a cache, continue from its state and update it in place."""
        q, k = self.feature_map_q(q), self.feature_map_k(k)
        i, f = self.input_gate(x), self.forget_gate(x)
        if layer is None:
            return mlstm(q, k, v, i, f, segment_ids=segment_ids)
        if layer.state is None:
            batch, heads, _, features = q.shape
            dtype = state_dtype(q, v)
            layer.state = MLSTMState.zeros(
                batch, heads, features, v.shape[-1], dtype=dtype, device=q.device
            )
        if q.shape[2] == 1:
            if (
                segment_ids is not None
            ):  # a closed gate is a new document, and spares a pass over the state
                f = f.masked_fill((segment_ids != 0)[:, None], LOG_ZERO)
            return mlstm_step(
                q[:, :, 0], k[:, :, 0], v[:, :, 0], i[..., 0], f[..., 0], layer.state
            )[:, :, None]
        if segment_ids is not None:
            layer.restart_state(segment_ids)
        h, state = mlstm(
            q, k, v, i, f, segment_ids=segment_ids, state=layer.state, return_state=True
        )
        for held, new in zip(layer.state, state, strict=True):
            held.copy_(new)
        return h

    def _window(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: MixerCacheLayer | None,
        segment_ids: Tensor | None,
    ) -> Tensor:
        """Attend to the window and the sinks, (B, H, T, D); with a cache, also to what it holds."""
        if layer is None:
            return self._attend(q, k, v, segment_ids)
        if q.shape[2] == 1:
            keys, values = layer.update(k, v, segment_ids)
            return torch.nn.functional.scaled_dot_product_attention(
                q,
                keys,
                values,
                attn_mask=layer.visible()[:, None, None],
                scale=self.scale,
                enable_gqa=True,
            )
        if layer.seen == 0:
            layer.update(k, v, segment_ids)
            return self._attend(q, k, v, segment_ids)
        return self._attend_after_prefix(q, k, v, layer, segment_ids)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None) -> Tensor:
        return sliding_window_attention(
            q,
            k,
            v,
            window=self.window,
            sinks=self.mixer_config.sinks,
            segment_ids=segment_ids,
            scale=self.scale,
        )

    def _attend_after_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, layer: MixerCacheLayer, segment_ids: Tensor | None
    ) -> Tensor:
        """Put the held tokens in front of the chunk, as tokens of document 0 whose outputs are dropped."""
        held_k, held_v, valid = layer.prefix()
        tokens = q.shape[2]
        chunk = segment_ids if segment_ids is not None else valid.new_zeros(len(q), tokens).long()
        segments = torch.cat(
            [valid.long() - 1, chunk], dim=1
        )  # empty slots are a document of their own
        queries = torch.cat([q.new_zeros(*q.shape[:2], held_k.shape[2], q.shape[3]), q], dim=2)
        layer.update(k, v, segment_ids)
        keys, values = torch.cat([held_k, k], dim=2), torch.cat([held_v, v], dim=2)
        return self._attend(queries, keys, values, segments)[:, :, -tokens:]

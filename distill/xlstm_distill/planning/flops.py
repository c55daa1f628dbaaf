"""Floating-point operations of a token, counted from the architecture: for plans and for MFU. Imports no torch.

A multiplication and an addition are two operations. Products with weights, attention and the mLSTM's chunkwise form
count; norms, activations, gates' nonlinearities and softmax do not. A backward pass costs twice its forward, and what
activation checkpointing computes again is not useful work, so it never counts (as MFU is defined, arXiv 2204.02311).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MLSTM_CHUNK = 64
"""Tokens of a chunk in the count of the mLSTM's operations, whatever a backend uses."""


@dataclass(frozen=True)
class Architecture:
    """A decoder of one of the supported families: widths, heads and layers."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """Read a transformers configuration."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            groups=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class MixerShape:
    """The hybrid mixer: window and sinks of its attention, features of the mLSTM's queries and keys; 0: no branch.

    `features` is the width of the linear map, `expansion` how many features the map makes of each (hedgehog: 2).
    """

    window: int
    sinks: int
    features: int
    expansion: int = 1


@dataclass(frozen=True)
class TokenFlops:
    """Operations of the forward pass per token, all layers together, by part.

    `new` are the student's feature maps and gates; `mixing` is what depends on the context, attention and the mLSTM;
    `head` is per token that has logits.
    """

    projections: float
    mlp: float
    new: float
    mixing: float
    head: float

    def forward(self, supervised: float = 1.0) -> float:
        """Of a token of which the share `supervised` has logits."""
        return self.projections + self.mlp + self.new + self.mixing + supervised * self.head

    def training(self, supervised: float = 1.0) -> float:
        """Forward and backward where all parameters train."""
        return 3 * self.forward(supervised)


def token_flops(architecture: Architecture, context: int, mixer: MixerShape | None = None) -> TokenFlops:
    """Count the forward pass per token of a document of `context` tokens; `mixer`: the student's, None: the teacher.

    Every layer of a teacher counts as full attention, Olmo3's sliding ones too (at its window or less they are).
    """
    a = architecture
    new, mixing = (0.0, attention_flops(a, context)) if mixer is None else _hybrid_flops(a, context, mixer)
    return TokenFlops(
        projections=a.layers * 4 * a.hidden * a.head_dim * (a.heads + a.groups),
        mlp=a.layers * 6 * a.hidden * a.intermediate,
        new=a.layers * new,
        mixing=a.layers * mixing,
        head=2 * a.hidden * a.vocabulary,
    )


def attention_flops(architecture: Architecture, context: int, window: int | None = None, sinks: int = 0) -> float:
    """Of a token in one layer: scores and weighted values over the keys it sees, on the mean over a document."""
    return 4 * architecture.heads * architecture.head_dim * mean_keys(context, window, sinks)


def mean_keys(context: int, window: int | None = None, sinks: int = 0) -> float:
    """Keys that a token of a document of `context` tokens sees, on the mean: all so far, or window and sinks."""
    seen = _capped_sum(context, context if window is None else window)
    if window is not None:
        seen += _capped_sum(context - window, sinks)
    return seen / context


def mlstm_flops(heads: int, key_dim: int, value_dim: int, chunk: int = MLSTM_CHUNK) -> float:
    """Of a token in one layer: write and read of the state, and the products within a chunk (causal half)."""
    return heads * (4 * key_dim * value_dim + chunk * (key_dim + value_dim))


def _hybrid_flops(a: Architecture, context: int, mixer: MixerShape) -> tuple[float, float]:
    """Of a token in one layer: maps and gates, and the two branches."""
    new = mixing = 0.0
    if mixer.features:
        new += 4 * a.heads * a.head_dim * mixer.features + 4 * a.hidden * a.heads  # two maps; two gates
        mixing += mlstm_flops(a.heads, mixer.features * mixer.expansion, a.head_dim)
    if mixer.window:
        mixing += attention_flops(a, context, mixer.window, mixer.sinks)
    if mixer.features and mixer.window:
        new += 6 * a.heads * a.head_dim  # output gate over q, k, v
    return new, mixing


def _capped_sum(count: int, cap: int) -> int:
    """min(1, cap) + min(2, cap) + ... + min(count, cap)."""
    rising = max(0, min(count, cap))
    return rising * (rising + 1) // 2 + max(0, count - cap) * cap if count > 0 else 0

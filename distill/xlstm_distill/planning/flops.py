"""Floating-point operations of a token, counted from the architecture: for plans and for MFU. Imports no torch.

A multiplication and an addition are two operations. Products with weights, attention and the mLSTM's chunkwise form
count; norms, activations, gates' nonlinearities and softmax do not. A backward pass costs twice its forward, and what
activation checkpointing computes again is not useful work, so it never counts (as MFU is defined, arXiv 2204.02311).

Per stage, rows count as one document each: shorter documents see fewer pairs of tokens. A product's backward pass is
one product for its input and one for its weight; a frozen weight needs the first alone, and constants need neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from xlstm_distill.planning.architecture import Architecture, lora_parameters
from xlstm_distill.recipe import MixerConfig

MLSTM_CHUNK = 64
"""Tokens of a chunk in the count of the mLSTM's operations, whatever a backend uses."""


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


def token_flops(
    architecture: Architecture, context: int, mixer: MixerShape | None = None
) -> TokenFlops:
    """Count the forward pass per token of a document of `context` tokens; `mixer`: the student's, None: the teacher.

    Every layer of a teacher counts as full attention, Olmo3's sliding ones too (at its window or less they are).
    """
    a = architecture
    new, mixing = (
        (0.0, attention_flops(a, context)) if mixer is None else _hybrid_flops(a, context, mixer)
    )
    return TokenFlops(
        projections=a.layers * 4 * a.hidden * a.head_dim * (a.heads + a.groups),
        mlp=a.layers * 6 * a.hidden * a.intermediate,
        new=a.layers * new,
        mixing=a.layers * mixing,
        head=2 * a.hidden * a.vocabulary,
    )


def attention_flops(
    architecture: Architecture, context: int, window: int | None = None, sinks: int = 0
) -> float:
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
        new += (
            4 * a.heads * a.head_dim * mixer.features + 4 * a.hidden * a.heads
        )  # two maps; two gates
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


def teacher_flops(a: Architecture, context: int) -> TokenFlops:
    """One forward pass of the teacher, its layers with a window of their own included."""
    pairs = sum(
        attention_flops(a, context, None if reach is None else min(reach, context))
        for reach in a.reaches
    )
    return replace(token_flops(a, context), mixing=pairs)


def student_flops(a: Architecture, mixer: MixerConfig, context: int) -> TokenFlops:
    """One forward pass of the student."""
    return token_flops(a, context, mixer_shape(a, mixer))


def mixer_shape(a: Architecture, mixer: MixerConfig) -> MixerShape:
    """Sizes of the mixer's branches; 0 for one that it does not have."""
    window, mlstm = "window" in mixer.branches, "mlstm" in mixer.branches
    return MixerShape(
        window=mixer.window if window else 0,
        sinks=mixer.sinks if window else 0,
        features=(mixer.feature_dim or a.head_dim) if mlstm else 0,
        expansion=2 if mixer.feature_map == "hedgehog" else 1,
    )


def distill_flops(
    a: Architecture,
    mixer: MixerConfig,
    context: int,
    trainable: Literal["all", "mixer", "lora"] = "all",
    *,
    lora_rank: int = 0,
    online: bool = False,
) -> float:
    """Forward and backward pass of stage II, the teacher's forward pass included where it runs `online`."""
    f = student_flops(a, mixer, context)
    frozen = {"all": 0.0, "mixer": f.mlp + f.head, "lora": f.projections + f.mlp + f.head}[
        trainable
    ]
    adapters = 3 * 2 * lora_parameters(a, lora_rank) if trainable == "lora" else 0
    return (
        f.training() - frozen + adapters + (teacher_flops(a, context).forward() if online else 0.0)
    )


def recomputed_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """What activation checkpointing of every layer adds to stage II: their forward pass once more."""
    return student_flops(a, mixer, context).forward(supervised=0)


def align_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """Stage I: the teacher's layers forward, the mixers forward on its inputs, and their new parameters back.

    Queries, keys and values are constants there, so that maps and gates need the gradient of their weights alone, and
    the window branch none. The output projection is not computed.
    """
    f = student_flops(a, mixer, context)
    window = (
        a.layers * attention_flops(a, context, mixer.window, mixer.sinks)
        if "window" in mixer.branches
        else 0.0
    )
    inputs = f.projections * (a.heads + 2 * a.groups) / (2 * (a.heads + a.groups))
    return (
        teacher_flops(a, context).forward(supervised=0)
        + inputs
        + 2 * f.new
        + window
        + 3 * (f.mixing - window)
    )

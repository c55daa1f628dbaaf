"""Count the floating-point operations per token from the architecture: for plans and for MFU.

Imports no torch. A multiplication and an addition are two operations.

- Counted: products with weights, attention, the mLSTM's chunkwise form.
- Not counted: norms, activations, softmax, the gates' nonlinearities.
- A product's backward pass is one product for its input and one for its weight. A frozen weight
  needs the first alone; a constant input needs the second alone.
- What activation checkpointing computes again is no useful work, so it is not in the MFU
  (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B).
- Every row counts as one document. Shorter documents have fewer pairs of tokens, so this is an
  upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from xlstm_distill.planning.architecture import Architecture, lora_parameters
from xlstm_distill.recipe import MixerConfig

MLSTM_CHUNK = 64
"""Tokens of a chunk in this count. Backends may use another: the count must not depend on them."""


@dataclass(frozen=True)
class MixerShape:
    """The hybrid mixer's sizes; 0 for a branch that it does not have.

    `window` and `sinks` are the attention's, in keys. `features` is the width of the linear map of
    queries and keys; the feature map makes `expansion` features of each (hedgehog: 2). `kept`: the
    share of all layers' heads that keep full attention, and `whole` that of layers that keep all.
    """

    window: int
    sinks: int
    features: int
    expansion: int = 1
    kept: float = 0.0
    whole: float = 0.0


@dataclass(frozen=True)
class TokenFlops:
    """Operations of the forward pass per token, all layers together, by part."""

    projections: float
    """Queries, keys, values and the output projection."""
    mlp: float
    """MLPs; of a mixture, the experts that a token uses, and their router."""
    new: float
    """The student's feature maps and gates."""
    mixing: float
    """What mixes tokens: attention and the mLSTM."""
    head: float
    """Logits, per token that has them."""

    def forward(self, supervised: float = 1.0) -> float:
        """Sum the parts; the share `supervised` of the tokens has logits."""
        return self.projections + self.mlp + self.new + self.mixing + supervised * self.head

    def training(self, supervised: float = 1.0) -> float:
        """Count forward and backward where all parameters train: three products for each."""
        return 3 * self.forward(supervised)


def token_flops(
    architecture: Architecture, context: int, mixer: MixerShape | None = None
) -> TokenFlops:
    """Count the forward pass per token of a document of `context` tokens.

    `mixer`: the student's, or None for the teacher. Every layer of a teacher counts as full
    attention, Olmo3's sliding layers too: up to a context of their window they are (`teacher_flops`
    counts them exactly).
    """
    a = architecture
    if mixer is None:
        new, mixing = 0.0, attention_flops(a, context)
    else:
        new, mixing = _hybrid_flops(a, context, mixer)
        mixing += mixer.kept * attention_flops(a, context)
    return TokenFlops(
        projections=a.layers * 4 * a.hidden * a.head_dim * (a.heads + a.groups),
        mlp=_mlp_flops(a),
        new=a.layers * new,
        mixing=a.layers * mixing,
        head=2 * a.hidden * a.vocabulary,
    )


def _mlp_flops(a: Architecture) -> float:
    """Count a token's MLPs, in all layers."""
    products = 3 if a.gated_mlp else 2
    total = a.mlp_layers * 2 * products * a.hidden * a.intermediate
    if (e := a.experts) is not None:
        # The shared expert has a gate of one number.
        inner = e.active * e.width + e.shared
        total += e.layers * 2 * a.hidden * (3 * inner + e.count + bool(e.shared))
    return total


def attention_flops(
    architecture: Architecture, context: int, window: int | None = None, sinks: int = 0
) -> float:
    """Count a token's attention in one layer, the mean over a document.

    Each key that it sees takes 2 D operations for the score and 2 D for the weighted value, in each
    head.
    """
    return 4 * architecture.heads * architecture.head_dim * mean_keys(context, window, sinks)


def mean_keys(context: int, window: int | None = None, sinks: int = 0) -> float:
    """Return the mean number of keys that a token of a document of `context` tokens sees.

    It sees all so far; or the last `window`, and of the first `sinks` those that are not in the
    window.
    """
    seen = _capped_sum(context, context if window is None else window)
    if window is not None:
        # A sink counts once it has left the window.
        seen += _capped_sum(context - window, sinks)
    return seen / context


def mlstm_flops(heads: int, key_dim: int, value_dim: int, chunk: int = MLSTM_CHUNK) -> float:
    """Count a token's mLSTM in one layer: `key_dim` features F, `value_dim` D, `chunk` length L.

    Writing and reading the state (F x D) takes 2 F D each. Within the chunk, scores take 2 F and
    weighted values 2 D for each of L / 2 earlier tokens (the causal half).
    """
    state = 4 * key_dim * value_dim
    within_chunk = chunk * (key_dim + value_dim)
    return heads * (state + within_chunk)


def _hybrid_flops(a: Architecture, context: int, mixer: MixerShape) -> tuple[float, float]:
    """Count a token's mixer in one layer: maps and gates, and the two branches.

    The mean over layers, where heads keep full attention.
    """
    new = mixing = 0.0
    if mixer.features:
        feature_maps = 4 * a.heads * a.head_dim * mixer.features  # of queries and keys
        gates = 4 * a.hidden * a.heads  # input and forget gate
        new += feature_maps + gates
        mixing += mlstm_flops(a.heads, mixer.features * mixer.expansion, a.head_dim)
    if mixer.window:
        mixing += attention_flops(a, context, mixer.window, mixer.sinks)
    if mixer.features and mixer.window:
        new += 6 * a.heads * a.head_dim  # the output gate reads q, k and v
    mixed = 1 - mixer.kept
    return mixed * new, mixed * mixing


def _capped_sum(count: int, cap: int) -> int:
    """Return min(1, cap) + min(2, cap) + ... + min(count, cap)."""
    rising = max(0, min(count, cap))
    return rising * (rising + 1) // 2 + max(0, count - cap) * cap if count > 0 else 0


def teacher_flops(a: Architecture, context: int) -> TokenFlops:
    """Count one forward pass of the teacher; its sliding-window layers count with their window."""
    pairs = sum(
        attention_flops(a, context, None if reach is None else min(reach, context))
        for reach in a.reaches
    )
    return replace(token_flops(a, context), mixing=pairs)


def student_flops(a: Architecture, mixer: MixerConfig, context: int) -> TokenFlops:
    """Count one forward pass of the student."""
    return token_flops(a, context, mixer_shape(a, mixer))


def mixer_shape(a: Architecture, mixer: MixerConfig) -> MixerShape:
    """Return the sizes of the mixer's branches, 0 for one that it does not have."""
    window, mlstm = "window" in mixer.branches, "mlstm" in mixer.branches
    kept = mixer.kept(a.layers, a.heads)
    return MixerShape(
        window=mixer.window if window else 0,
        sinks=mixer.sinks if window else 0,
        features=(mixer.feature_dim or a.head_dim) if mlstm else 0,
        expansion=2 if mixer.feature_map == "hedgehog" else 1,
        kept=sum(map(len, kept)) / (a.layers * a.heads),
        whole=sum(len(heads) == a.heads for heads in kept) / a.layers,
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
    """Count a token's forward and backward pass in stage II.

    `online`: the teacher computes the targets beside it, which adds its forward pass.
    """
    student = student_flops(a, mixer, context)
    total = student.training()
    # A frozen weight saves one of the three products: the one for its own gradient.
    if trainable == "mixer":
        total -= student.mlp + student.head
    elif trainable == "lora":
        total -= student.projections + student.mlp + student.head
        total += 3 * 2 * lora_parameters(a, lora_rank)
    if online:
        total += teacher_flops(a, context).forward()
    return total


def recomputed_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """Count what activation checkpointing adds to stage II: the layers' forward pass once more."""
    return student_flops(a, mixer, context).forward(supervised=0)


def kept_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """Count the kept attention's forward pass, which its backward pass does once more.

    `models.attention.full`: a mask of documents is made block by block, and again.
    """
    return mixer_shape(a, mixer).kept * a.layers * attention_flops(a, context)


def align_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """Count a token of stage I: the teacher's layers forward, the mixers forward and backward.

    Queries, keys and values are constants there. So maps and gates need the gradient of their
    weights alone, and the window branch needs none.
    """
    student = student_flops(a, mixer, context)
    teacher = teacher_flops(a, context).forward(supervised=0)
    kept = kept_flops(a, mixer, context)
    mlstm = student.mixing - kept - _window_flops(a, mixer, context)
    return teacher + align_recomputed_flops(a, mixer, context) + student.new + 2 * mlstm


def align_recomputed_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    """Count what activation checkpointing adds to stage I: the mixers' forward pass once more.

    The output projection is not computed in stage I, and of what is kept nothing is.
    """
    student = student_flops(a, mixer, context)
    # Of the four projections, whose widths are H, G, G and H heads, all but the output's.
    inputs = student.projections * (a.heads + 2 * a.groups) / (2 * (a.heads + a.groups))
    inputs *= 1 - mixer_shape(a, mixer).whole
    return inputs + student.new + student.mixing - kept_flops(a, mixer, context)


def _window_flops(a: Architecture, mixer: MixerConfig, context: int) -> float:
    if "window" not in mixer.branches:
        return 0.0
    mixed = 1 - mixer_shape(a, mixer).kept
    return mixed * a.layers * attention_flops(a, context, mixer.window, mixer.sinks)

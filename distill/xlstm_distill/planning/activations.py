"""Bytes that a forward pass keeps for its backward pass, layer by layer, counted tensor by tensor. Loads no torch.

Each term is a tensor that autograd saves in `mixer`, `feature_maps`, the operators and the family's modeling code; the
sizes below were read off `saved_tensors_hooks`, and the tests of the plan compare their sum with a real pass.

Letters: d hidden size, H query heads, G key/value heads, D head dim, F features, L chunk length. All figures are bytes
per token unless they say otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from xlstm_distill.planning.architecture import Architecture, features
from xlstm_distill.recipe import MixerConfig

Precision = Literal["fp32", "bf16", "autocast"]
"""`fp32`; `bf16`: weights are bf16 when they are used (FSDP2, DeepSpeed, teachers); `autocast`: fp32 weights that
autocast turns into bf16, so that the residual stream stays fp32 (one process, DDP)."""
Backend = Literal["torch", "triton"]
FP32, INT64 = 4, 8


@dataclass(frozen=True)
class Pass:
    """One forward pass of a process: `rows` of `tokens` tokens, and how it computes."""

    rows: int
    tokens: int
    precision: Precision
    backend: Backend
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def compute(self) -> int:
        """Bytes of a number that comes out of a matrix product."""
        return 4 if self.precision == "fp32" else 2

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream."""
        return 2 if self.precision == "bf16" else 4

    @property
    def chunk(self) -> int:
        """Chunk of the mLSTM (`xlstm_kernels.torch.chunkwise`)."""
        return min(32 if self.device == "cpu" else 64, self.tokens)


@dataclass(frozen=True)
class Saved:
    """Bytes saved: `per_token` for each token, `constant` once per layer and pass."""

    per_token: float = 0.0
    constant: float = 0.0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.per_token + other.per_token, self.constant + other.constant)

    def bytes(self, run: Pass) -> float:
        """Bytes for the rows and tokens of a pass."""
        return self.per_token * run.rows * run.tokens + self.constant


def layer_saved(a: Architecture, mixer: MixerConfig, run: Pass) -> Saved:
    """What one layer of the student saves when all its parameters train (stage II)."""
    parts = [
        _norms(a, run),
        _linear_inputs(a, mixer, run),
        _query_key_norms(a, run),
        _window(a, mixer, run),
    ]
    if "mlstm" in mixer.branches:
        parts += [
            _feature_maps(a, mixer, run),
            mlstm_saved(a, mixer, run, values_train=True),
            _gate(a, mixer, run),
        ]
    return sum(
        parts, Saved(4 * run.compute * a.intermediate)
    )  # the MLP's: gate, silu(gate), up, their product


def mixer_saved(a: Architecture, mixer: MixerConfig, run: Pass) -> Saved:
    """What one mixer saves when only its new parameters train (stage I), with the teacher's activations it reads.

    The window branch has nothing to train, and queries, keys and values are constants.
    """
    if "mlstm" not in mixer.branches:
        return Saved()
    hidden, heads = (
        run.compute * a.hidden,
        run.compute * a.query_width,
    )  # seen in the teacher: layer input, heads
    error = FP32 * a.query_width + FP32
    parts = [
        _feature_maps(a, mixer, run),
        mlstm_saved(a, mixer, run, values_train=False),
        _gate(a, mixer, run),
    ]
    if "window" in mixer.branches:
        parts.append(Saved(run.compute * a.query_width))  # what the window branch gave
    return sum(parts, Saved(hidden + heads + error))


def outside_layers(a: Architecture, run: Pass) -> Saved:
    """What is saved once: token ids, cosines and sines, the last norm and its output."""
    cosines = 2 * (FP32 if a.model_type.startswith("olmo") else run.residual) * a.head_dim
    return Saved(INT64 + cosines + _norm(a, run, a.hidden) + run.residual * a.hidden)


def checkpoint_saved(a: Architecture, run: Pass) -> Saved:
    """What a layer saves under activation checkpointing: its input."""
    return Saved(run.residual * a.hidden)


def _norm(a: Architecture, run: Pass, width: int) -> int:
    """An RMSNorm: its input in fp32, one number per vector, and the normalised input before the weight."""
    normalised = FP32 if a.norm == "projection" else run.residual  # Olmo applies the weight in fp32
    return FP32 * width + FP32 + normalised * width


def _norms(a: Architecture, run: Pass) -> Saved:
    return Saved(2 * _norm(a, run, a.hidden))


def _linear_inputs(a: Architecture, mixer: MixerConfig, run: Pass) -> Saved:
    """Inputs of the attention's and the MLP's products. Autocast makes a copy for each product, and none is shared."""
    gates = 2 if "mlstm" in mixer.branches else 0
    copies = 3 + gates + 2 if run.precision == "autocast" else 2
    heads = run.compute * a.query_width  # of the output projection
    return Saved(copies * run.compute * a.hidden + heads)


def _query_key_norms(a: Architecture, run: Pass) -> Saved:
    if a.norm == "none":
        return Saved()
    width = a.query_width + a.key_width
    vectors = a.heads + a.groups if a.norm == "head" else 2
    normalised = FP32 if a.norm == "projection" else run.compute
    return Saved((FP32 + normalised) * width + FP32 * vectors)


def _gate(a: Architecture, mixer: MixerConfig, run: Pass) -> Saved:
    """The output gate: q, k, v before RoPE, its sigmoid, and the branches it mixes (of which the mLSTM's is here)."""
    if "window" not in mixer.branches:
        return Saved()
    c = run.compute
    low = 0 if c == FP32 else c * a.heads
    return Saved(2 * c * a.query_width + 2 * c * a.key_width + FP32 * a.heads + low)


def _feature_maps(a: Architecture, mixer: MixerConfig, run: Pass) -> Saved:
    """Inputs, softmaxes in fp32, and a copy of the maps for every row."""
    width = mixer.feature_dim or a.head_dim
    softmaxes = 2 if mixer.feature_map == "hedgehog" else 1
    inputs = run.compute * (a.query_width + a.key_width)
    copies = 2 * run.rows * run.compute * a.heads * width * a.head_dim
    return Saved(inputs + 2 * softmaxes * FP32 * a.heads * width, copies)


def mlstm_saved(a: Architecture, mixer: MixerConfig, run: Pass, *, values_train: bool) -> Saved:
    """The mLSTM of all heads, from features to its output."""
    H, F, D, L = a.heads, features(mixer, a), a.head_dim, run.chunk
    # Features are a softmax itself unless they were cast, or put together from two.
    cast = run.compute < FP32 or mixer.feature_map == "hedgehog"
    if (
        run.backend == "triton"
    ):  # q, k; gates and their sums, m, denominators; h less its common component
        inputs = 2 * run.compute * H * F if cast else 0
        start = H * (F * (D + 1) + 1) + a.groups * D  # the state, the common component
        return Saved(inputs + run.compute * H * D + 7 * FP32 * H, FP32 * run.rows * start)
    stretch = (
        math.ceil(run.tokens / L) * L / run.tokens
    )  # the last chunk is filled up, which copies them too
    cast = cast or run.tokens % L > 0
    queries, keys = (3 if cast else 2) * H * F, (2 if values_train else 1) * H * F
    pairs = H * (L + 1) + (2 if values_train else 1) * H * L  # weights, scores, their product
    states = H * F * (D + 1) / L
    values = a.groups * (D + 1)
    outputs = H * (D + 1)  # h and the denominators
    constant = (
        (FP32 if run.device == "cpu" else 8) * 2 * L * L * (L + 1)
    )  # which gates enter which pair
    return Saved(
        stretch * FP32 * (queries + keys + pairs + states + values + outputs + 2 * H), constant
    )


def band(mixer: MixerConfig, tokens: int) -> tuple[int, int]:
    """Length of a block of queries and of the keys it reads in `banded_attention`, sinks included."""
    window = min(mixer.window, tokens)
    block = min(max(32, min(window, 128)), tokens)
    return block, window - 1 + block + min(mixer.sinks, tokens)


def _window(a: Architecture, mixer: MixerConfig, run: Pass) -> Saved:
    """Sliding-window attention of all heads, and the copy of its output that the gate or the projection reads."""
    if "window" not in mixer.branches:
        return Saved()
    c, keys, queries = run.compute, a.key_width, a.query_width
    statistics = FP32 * a.heads
    if run.backend == "triton":
        return Saved(2 * c * keys + 2 * c * queries + statistics)
    block, span = band(mixer, run.tokens)
    stretch = math.ceil(run.tokens / block) * block / run.tokens
    bands = (
        c * (a.heads // a.groups) * span + 2 * c * keys * span / block
    )  # bias; keys and values of each block
    gathered = 2 * c * keys + INT64 * min(mixer.sinks, run.tokens) / block
    output = c * queries if "mlstm" in mixer.branches else 0
    return Saved(gathered + stretch * (bands + 2 * c * queries + statistics) + output)

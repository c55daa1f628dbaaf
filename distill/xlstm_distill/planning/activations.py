"""Count the bytes that a forward pass keeps for its backward pass, layer by layer. Loads no torch.

Each term is a tensor that autograd saves in `mixer`, `feature_maps`, the operators or the family's
modeling code. The sizes were read off `torch.autograd.graph.saved_tensors_hooks`; the tests compare
their sum with a real pass.

Letters: d hidden size, H query heads, G key/value heads, D head dim, F features, L chunk length.
All figures are bytes per token unless they say otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from xlstm_distill.models.attention.layout import LayerHeads
from xlstm_distill.planning.architecture import Architecture, features, kinds_of_layers
from xlstm_distill.recipe import MixerConfig

Precision = Literal["fp32", "bf16", "autocast"]
"""How a model computes.

- `fp32`: everything in fp32.
- `bf16`: weights are bf16 when they are used (FSDP2, DeepSpeed, teachers).
- `autocast`: autocast casts fp32 weights to bf16 for the products; the residual stream stays fp32
  (one process, DDP).
"""
Backend = Literal["torch", "triton"]
FP32, BF16, INT64 = 4, 2, 8
"""Bytes of a number."""
SPAN_CPU, SPAN_GPU, STATES_CPU = (1 << 9, 1 << 13), 1 << 17, 1 << 19
"""Tokens of all rows and heads in a part of the mLSTM; on a CPU by the size of its states."""
SECTION: Mapping[str, int] = {"cpu": 1 << 14, "cuda": 1 << 17}
"""Likewise in a section, whose weights are there at once."""
BLOCK_MIN, BLOCK_MAX, SCORES_AT_ONCE = 32, 128, 1 << 26
"""Blocks of the window in plain torch, and the scores that its gradient makes at once on a GPU."""
NUMBERS_AT_ONCE = 1 << 19
"""Scores, keys and values of a part of the window on a CPU."""
QUERIES_MAX, SCORES_MAX = 256, 1 << 26
"""Blocks where the softmax is a family's own, and the most scores of one."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of a process: `rows` of `tokens` tokens, its precision and its kernels."""

    rows: int
    tokens: int
    precision: Precision
    backend: Backend
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def compute(self) -> int:
        """Bytes of a number that comes out of a matrix product."""
        return FP32 if self.precision == "fp32" else BF16

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream."""
        return BF16 if self.precision == "bf16" else FP32

    @property
    def chunk(self) -> int:
        """Chunk length L of the mLSTM (the defaults of `xlstm_kernels.torch.chunkwise`)."""
        default = 32 if self.device == "cpu" else 64
        return min(default, self.tokens)

    def span(self, features: int, width: int) -> int:
        """Tokens of a part of the mLSTM (`span_of` of the same file)."""
        if self.device == "cuda":
            return SPAN_GPU
        least, most = SPAN_CPU
        return min(most, max(least, STATES_CPU // (features * width) * 32))


@dataclass(frozen=True)
class Saved:
    """Saved bytes: `per_token` for each token, `constant` once per layer and pass."""

    per_token: float = 0.0
    constant: float = 0.0

    def __add__(self, other: Saved) -> Saved:
        return Saved(self.per_token + other.per_token, self.constant + other.constant)

    def bytes(self, forward: Pass) -> float:
        """Return the bytes for all rows and tokens of a pass."""
        return self.per_token * forward.rows * forward.tokens + self.constant


def layer_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count what one layer of the student saves when all its parameters train (stage II).

    Where some layers have experts and others an MLP, or keep other heads, the one that saves most.
    """
    kinds = [_attention_saved(a, mixer, forward, kind) for kind, _ in kinds_of_layers(a, mixer)]
    return _most_in_mlp(a, forward) + max(kinds, key=lambda saved: saved.bytes(forward))


def layers_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Count the bytes that all layers of the student save (stage II)."""
    total = a.mlp_layers * _mlp(a, forward).bytes(forward)
    if a.experts is not None:
        total += a.experts.layers * mixture_saved(a, forward).bytes(forward)
    for heads, layers in kinds_of_layers(a, mixer):
        total += layers * _attention_saved(a, mixer, forward, heads).bytes(forward)
    return total


def _attention_saved(
    a: Architecture, mixer: MixerConfig, forward: Pass, heads: LayerHeads
) -> Saved:
    """Count a layer but for its MLP: its mixer, the heads that it keeps, and its norms."""
    total = _norms(a, forward)
    total += _linear_inputs(a, mixer, forward, heads)
    total += _query_key_norms(a, forward)
    total += _kept(a, forward, heads)
    if not heads.mixed:
        return total
    mixed = replace(a, heads=len(heads.mixed), groups=heads.mixed_keys)
    total += _window(mixed, mixer, forward)
    if "mlstm" in mixer.branches:
        total += _feature_maps(mixed, mixer, forward)
        total += mlstm_saved(mixed, mixer, forward)
        total += _output_gate(mixed, mixer, forward)
        if a.model_type == "gpt_oss" and "window" in mixer.branches:
            # Its rotary positions join halves: queries and keys are contiguous, and feature maps
            # read those of the window instead of copies.
            total += Saved(-forward.compute * (mixed.query_width + mixed.key_width))
    return total


def _kept(a: Architecture, forward: Pass, heads: LayerHeads) -> Saved:
    """Count full attention: its queries, keys and values, from which it is computed again."""
    queries = sum(end - first for first, end in heads.full_queries)
    saved = forward.compute * a.head_dim * (queries + 2 * heads.kept_keys)
    if a.own_softmax:  # an operator that keeps its output and each query's log-sum-exp too
        saved += queries * (forward.compute * a.head_dim + FP32)
    return Saved(saved)


def _mlp(a: Architecture, forward: Pass) -> Saved:
    """Count an MLP's tensors of its inner width."""
    if a.gated_mlp:
        tensors = 4.0  # gate, silu(gate), up, and their product
    elif a.activation:
        # xIELU in plain torch: its input, three terms, its output, and a mask of one byte.
        tensors = 5.0 + 1 / forward.compute
    else:
        tensors = 2.0  # before and after the activation
    return Saved(tensors * forward.compute * a.intermediate)


def mixture_saved(a: Architecture, forward: Pass) -> Saved:
    """Count experts computed as one grouped product (transformers' `grouped_mm`).

    Every token is copied for each expert that it uses. Products of experts leave autocast out.
    """
    e = a.experts
    assert e is not None
    size = BF16 if forward.precision == "bf16" else FP32
    # Of a copy: its input and the expert's output; gate and up, silu(gate), and the product.
    # gpt-oss bounds gate and up, and keeps each factor of (up + 1) gate sigmoid(alpha gate).
    inner = 7 if e.biases else 4
    copies = e.active * size * (2 * a.hidden + inner * e.width)
    # Of a copy: which token, its place among the sorted and back, its expert; its weight.
    # gpt-oss chooses experts before the softmax.
    routing = e.active * (4 * INT64 + 2 * FP32)
    routing += INT64 * e.active if e.biases else FP32 * e.count
    shared = 4 * forward.compute * e.shared
    if e.shared:
        shared += forward.compute * (a.hidden + 1)  # its output and the sigmoid, multiplied
    return Saved(copies + routing + shared)


def _most_in_mlp(a: Architecture, forward: Pass) -> Saved:
    """Return what the MLP or the experts of a layer save, whichever is more."""
    kinds = [_mlp(a, forward)] if a.mlp_layers else []
    kinds += [mixture_saved(a, forward)] if a.experts is not None else []
    return max(kinds, key=lambda saved: saved.per_token)


def mixer_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count what one mixer saves when only its new parameters train (stage I).

    The teacher's tensors that it reads are included. The window branch has nothing to train, and
    queries, keys and values are constants.
    """
    return _mixer_saved(a, mixer, forward, LayerHeads((), a.heads, a.groups))


def mixers_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Count the bytes that all mixers save in stage I; layers that keep all heads have none."""
    kinds = kinds_of_layers(a, mixer)
    return sum(n * _mixer_saved(a, mixer, forward, heads).bytes(forward) for heads, n in kinds)


def _mixer_saved(a: Architecture, mixer: MixerConfig, forward: Pass, heads: LayerHeads) -> Saved:
    """Count a mixer in a layer with these heads."""
    if "mlstm" not in mixer.branches or not heads.mixed:
        return Saved()
    mixed = replace(a, heads=len(heads.mixed), groups=heads.mixed_keys)
    layer_input = forward.compute * a.hidden
    teacher_heads = forward.compute * a.query_width
    error = FP32 * mixed.query_width + FP32  # the difference to the teacher's heads, and its norm
    total = Saved(layer_input + teacher_heads + error)
    total += _feature_maps(mixed, mixer, forward)
    total += mlstm_saved(mixed, mixer, forward)
    total += _output_gate(mixed, mixer, forward)
    if "window" in mixer.branches:
        # The window branch's output, a constant.
        total += Saved(forward.compute * mixed.query_width)
    return total


def outside_layers(a: Architecture, forward: Pass) -> Saved:
    """Count what is saved once: token ids, RoPE's cosines and sines, the last norm, its output."""
    # Olmo keeps cosines and sines in fp32; the other families cast them to the residual stream's
    # precision.
    rope_size = FP32 if a.model_type.startswith("olmo") else forward.residual
    # Gemma 3 has frequencies of their own in layers with a window.
    tables = len(set(a.reaches)) if a.model_type == "gemma3_text" else 1
    # gpt-oss has the angles of half a head.
    rope = 2 * rope_size * a.head_dim * tables / (2 if a.model_type == "gpt_oss" else 1)
    last_norm = _norm(a, forward, a.hidden) + forward.residual * a.hidden
    return Saved(INT64 + rope + last_norm)


def mixer_checkpoint_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count what a mixer saves in stage I under checkpointing: its input, the teacher's heads."""
    if "mlstm" not in mixer.branches:
        return Saved()
    return Saved(forward.compute * (a.hidden + a.query_width))


def checkpoint_saved(a: Architecture, forward: Pass) -> Saved:
    """Count what a layer of stage II saves under activation checkpointing: its input."""
    return Saved(forward.residual * a.hidden)


def _norm(a: Architecture, forward: Pass, width: int) -> int:
    """Count an RMSNorm: its input in fp32, one number per vector, and the normalised input.

    A LayerNorm of torch's (Olmo's in fp32, StarCoder2's) keeps its input and two numbers.
    """
    if a.norm_weights != 1:
        return (FP32 if a.norm_weights == 0 else forward.residual) * width + 2 * FP32
    # Some families multiply by the weight in fp32, before they cast back.
    normalised = FP32 if a.fp32_norms else forward.residual
    return FP32 * width + FP32 + normalised * width


def _norms(a: Architecture, forward: Pass) -> Saved:
    return Saved(a.norms * _norm(a, forward, a.hidden))


def _linear_inputs(a: Architecture, mixer: MixerConfig, forward: Pass, layer: LayerHeads) -> Saved:
    """Count the inputs of the attention's and the MLP's products.

    Without autocast, q, k, v and the gates share one input, and the MLP's gate and up projection
    another. Autocast makes a bf16 copy for each product.
    """
    gates = 2 if "mlstm" in mixer.branches and layer.mixed else 0  # input and forget gate
    copies = 3 + gates + 2 if forward.precision == "autocast" else 2
    heads = forward.compute * a.query_width  # the output projection's input
    return Saved(copies * forward.compute * a.hidden + heads)


def _query_key_norms(a: Architecture, forward: Pass) -> Saved:
    if a.norm == "none":
        return Saved()
    width = a.query_width + a.key_width
    # One normaliser per head (Qwen3), or one for all queries and one for all keys (Olmo).
    vectors = a.heads + a.groups if a.norm == "head" else 2
    normalised = FP32 if a.fp32_norms else forward.compute
    return Saved((FP32 + normalised) * width + FP32 * vectors)


def _output_gate(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count the output gate: q, k, v before RoPE, its sigmoid, and the mLSTM's output.

    `_window` counts the other branch that the gate mixes.
    """
    if "window" not in mixer.branches:
        return Saved()
    size = forward.compute
    inputs = size * a.query_width + 2 * size * a.key_width
    mlstm_output = size * a.query_width
    sigmoid = FP32 * a.heads
    sigmoid_copy = 0 if size == FP32 else size * a.heads
    return Saved(inputs + mlstm_output + sigmoid + sigmoid_copy)


def _feature_maps(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count both feature maps: inputs, softmaxes in fp32, a copy of the weights for every row."""
    width = mixer.feature_dim or a.head_dim
    softmaxes = (
        2 if mixer.feature_map == "hedgehog" else 1
    )  # hedgehog: of the features and of their negatives
    inputs = forward.compute * (a.query_width + a.key_width)
    outputs = 2 * softmaxes * FP32 * a.heads * width
    weight_copies = 2 * forward.rows * forward.compute * a.heads * width * a.head_dim
    return Saved(inputs + outputs, weight_copies)


def mlstm_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count the mLSTM of all heads, from features to its output."""
    # The operator's features are the softmax itself, unless they were cast to bf16, or joined from
    # two softmaxes. On a CPU both are written in one place.
    joined = mixer.feature_map == "hedgehog" and forward.device != "cpu"
    copied = forward.compute < FP32 or joined
    width = features(mixer, a)
    inputs = Saved(2 * forward.compute * a.heads * width if copied else 0)
    if "window" not in mixer.branches:  # else `_window` counts the values
        inputs += Saved(forward.compute * a.key_width)
    if forward.backend == "triton":
        return inputs + _mlstm_triton(a, width, forward)
    return inputs + _mlstm_torch(a, width, forward)


def _mlstm_triton(a: Architecture, F: int, forward: Pass) -> Saved:
    """Count the fused operator: it computes states and scores again in its backward pass.

    XLSTM_KERNELS_KEEP_STATES is left out: where the run will be, it may be set or not.
    """
    H, D = a.heads, a.head_dim
    output = forward.compute * H * D  # h, less its common component
    per_head = 8 * FP32 * H  # gates, their sums, m, denominators, and the scale of h
    # The state that a row starts from (S, z and m), and of each group's values the common component
    # and the largest one; the operator keeps that of each chunk, which is too little to count.
    start = H * (F * (D + 1) + 1) + a.groups * (D + 1)
    return Saved(output + per_head, FP32 * forward.rows * start)


def _mlstm_torch(a: Architecture, F: int, forward: Pass) -> Saved:
    """Count the chunkwise form in plain torch, fp32: it keeps every chunk's state and L x L scores.

    Letters L, H, F, D as above; D + 1 because the normaliser z rides along as one more value.
    """
    H, D, L = a.heads, a.head_dim, forward.chunk
    padded = math.ceil(forward.tokens / L) * L / forward.tokens  # the last chunk is filled up
    weights, scores, outputs = L + 1, L, D + 1  # outputs: h and the denominators
    states = F * (D + 1)  # at each chunk's start, and at the row's end
    per_token = padded * (weights + scores + outputs + states / L)
    gates = 2
    return Saved(FP32 * H * (per_token + gates), FP32 * forward.rows * H * states)


def layer_excess(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Return the bytes by which a layer's backward pass exceeds what the layer saved (stage II).

    The most is held inside of the window or, after it, of the mLSTM. By then the MLP, its norm, the
    output projection and the gate have given up what they saved.
    """
    heads = forward.compute * a.query_width
    freed = _most_in_mlp(a, forward) + Saved(_norm(a, forward, a.hidden) + heads)
    # The gate read the outputs of both branches; the window's gradient needs its own again.
    in_window = window_work(a, mixer, forward) - (freed + Saved(heads)).bytes(forward)
    in_mlstm = _mlstm_work(a, mixer, forward) - (freed + Saved(2 * heads)).bytes(forward)
    return max(0.0, in_window, in_mlstm)


def mixer_excess(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Return the bytes by which a mixer's backward pass exceeds what the mixer saved (stage I).

    By the time of the mLSTM, the error and the outputs of both branches are given up.
    """
    freed = Saved(FP32 * a.query_width + FP32 + 2 * forward.compute * a.query_width)
    return max(0.0, _mlstm_work(a, mixer, forward) - freed.bytes(forward))


def _mlstm_work(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Count what the mLSTM's backward pass in plain torch allocates, its results included.

    It works on parts of a call (`xlstm_kernels.torch.chunkwise`), in fp32. The factors of F, D
    and L are the tensors of `differentiate_part` that live at once. The fused operator is not
    counted.
    """
    if "mlstm" not in mixer.branches or forward.backend == "triton":
        return 0.0
    H, D, L, F = a.heads, a.head_dim, forward.chunk, features(mixer, a)
    all_rows = forward.rows * forward.tokens * H
    section, span = min(SECTION[forward.device], all_rows), min(forward.span(F, D), all_rows)
    # Whole rows of a group in fp32 are read and written where they are.
    whole = forward.device == "cpu" and forward.compute == FP32 and forward.tokens % L == 0
    copies = 2 if whole and (a.groups == H or H // a.groups * forward.tokens <= span) else 4
    values = (1 if forward.compute == FP32 else 2) * a.groups / H  # and their gradient in fp32
    # The most is there with two tensors of pairs and one of features, or with one and two.
    work = FP32 * ((copies - 1) * F + max(F, L) + (1 + values) * D + L + F * (D + 1) / L)
    results = forward.compute * (2 * F + D * a.groups / H) + 2 * FP32
    # Gradients of the final state (zeros), of the memory that is carried, and of the initial state.
    states = 3 * FP32 * forward.rows * H * F * (D + 1)
    return span * work + section * FP32 * (L + 1) + all_rows * results + states


def window_work(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Count what the window's backward pass in plain torch allocates, results included.

    On a GPU it makes the scores of some blocks at once, and three tensors of them in fp32
    (`_attention_grads`).
    """
    if "window" not in mixer.branches or forward.backend == "triton":
        return 0.0
    if a.own_softmax:
        return _own_softmax_work(a, mixer, forward)
    if forward.device == "cpu":
        return _window_work_cpu(a, mixer, forward)
    H, G, D, window = a.heads, a.groups, a.head_dim, min(mixer.window, forward.tokens)
    L = min(max(BLOCK_MIN, min(window, BLOCK_MAX)), forward.tokens)
    keys = min(mixer.sinks, forward.tokens) + L + window - 1
    blocks = forward.rows * math.ceil(forward.tokens / L)
    at_once = min(blocks, max(1, SCORES_AT_ONCE // (H * L * keys)))
    scores = H * L * keys  # of a block
    # Of a block: queries, output and its gradient, keys, values and the bias; then the gradients.
    inputs = forward.compute * (3 * H * L * D + 2 * G * keys * D + H // G * L * keys)
    results = forward.compute * (H * L * D + 2 * G * keys * D)
    before = (blocks // at_once - 1) * at_once  # whose results are there beside the last scores
    computing = 3 * FP32 * at_once * scores + before * results
    # In the end all results are put together: they are there twice, beside the last blocks' weights
    # and gradients of scores.
    last = (blocks - 1) % at_once + 1
    joining = 2 * blocks * results + (FP32 + forward.compute) * last * scores
    return float(blocks * inputs + max(computing, joining))


def _window_work_cpu(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Count what the backward pass of `xlstm_kernels.torch.window_cpu` allocates, all in fp32.

    Rows of one document each may go to `xlstm_kernels.torch.tiles` instead, which needs less. The
    mask is not counted: the forward pass made it.
    """
    H, G, D, T = a.heads, a.groups, a.head_dim, forward.tokens
    window, sinks = min(mixer.window, T), min(mixer.sinks, T)
    longest = (64 if window >= 256 else 32) if H == G else (16 if window <= 64 else 32)
    L = min(longest, T)
    blocks = math.ceil(T / L)
    keys = window - 1 + L + sinks
    at_once = max(1, NUMBERS_AT_ONCE // (keys * (H * L + 2 * G * D)))
    rows = min(forward.rows, at_once // blocks)
    part = rows * blocks if rows else math.ceil(blocks / math.ceil(blocks / at_once))
    if blocks == 1:  # nothing before the row is read
        keys = L + sinks
    # Of a block: queries and the gradient of their output, keys and values, two of scores; then the
    # gradient of keys, of sinks once more, or of queries, once more for rows that fill no block.
    pieces = 2 * D * (H * L + G * keys) + 2 * H * L * keys
    pieces += D * max(G * (keys + sinks), H * L * (2 if T % L else 1))
    tokens = 4 * FP32 * forward.rows * G * D * (window - 1 + blocks * L)
    results = forward.compute * forward.rows * T * D
    return float(tokens + results * H + max(FP32 * part * pieces, results * 2 * G))


def _own_softmax_work(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Count what the backward pass of `xlstm_kernels.torch.bounded` allocates, results included.

    It has the scores of a block of queries, their weights and their gradient at once, and a mask;
    and gradients of all keys and values in fp32.
    """
    H, G, D, T = a.heads, a.groups, a.head_dim, forward.tokens
    window, sinks = min(mixer.window, T), min(mixer.sinks, T)
    most = max(1, SCORES_MAX // (forward.rows * H * min(T, window + QUERIES_MAX + sinks)))
    queries = min(QUERIES_MAX, most, T)
    keys = min(T, window + queries - 1) + sinks
    scores = forward.rows * H * queries * keys
    # Of a block: what it reads and the gradients of that.
    pieces = 2 * FP32 * forward.rows * D * (H * queries + 2 * G * keys)
    results = forward.compute * H * D + 2 * FP32 * G * D + 2 * FP32 * H
    if forward.compute < FP32:
        results += 2 * forward.compute * G * D
    return float((3 * FP32 + 1) * scores + pieces + forward.rows * T * results)


def _window(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count sliding-window attention of all heads."""
    if "window" not in mixer.branches:
        return Saved()
    size, keys, queries = forward.compute, a.key_width, a.query_width
    statistics = FP32 * a.heads  # the log-sum-exp of each query
    # Keys, values, queries and output: the band is computed again in the backward pass.
    return Saved(2 * size * keys + 2 * size * queries + statistics)

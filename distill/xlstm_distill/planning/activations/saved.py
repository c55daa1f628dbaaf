"""Count the bytes that a forward pass keeps for its backward pass, layer by layer. Loads no torch.

Each term is a tensor that autograd saves in `mixer`, `feature_maps`, the operators or the family's
modeling code. The sizes were read off `torch.autograd.graph.saved_tensors_hooks`; the tests compare
their sum with a real pass.

Letters: d hidden size, H query heads, G key/value heads, D head dim, F features, L chunk length.
All figures are bytes per token unless they say otherwise.
"""

from __future__ import annotations

import math
from dataclasses import replace

from xlstm_distill.models.attention.layout import LayerHeads
from xlstm_distill.planning.activations.passes import BF16, FP32, INT64, Pass, Saved
from xlstm_distill.planning.architecture import Architecture, features, kinds_of_layers
from xlstm_distill.recipe import MixerConfig


def layer_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count what one layer of the student saves when all its parameters train (stage II).

    Where some layers have experts and others an MLP, or keep other heads, the one that saves most.
    """
    kinds = [_attention_saved(a, mixer, forward, kind) for kind, _ in kinds_of_layers(a, mixer)]
    return most_in_mlp(a, forward) + max(kinds, key=lambda saved: saved.bytes(forward))


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


def most_in_mlp(a: Architecture, forward: Pass) -> Saved:
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
    last_norm = norm_saved(a, forward, a.hidden) + forward.residual * a.hidden
    return Saved(INT64 + rope + last_norm)


def mixer_checkpoint_saved(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count what a mixer saves in stage I under checkpointing: its input, the teacher's heads."""
    if "mlstm" not in mixer.branches:
        return Saved()
    return Saved(forward.compute * (a.hidden + a.query_width))


def checkpoint_saved(a: Architecture, forward: Pass) -> Saved:
    """Count what a layer of stage II saves under activation checkpointing: its input."""
    return Saved(forward.residual * a.hidden)


def norm_saved(a: Architecture, forward: Pass, width: int) -> int:
    """Count an RMSNorm: its input in fp32, one number per vector, and the normalised input.

    A LayerNorm of torch's (Olmo's in fp32, StarCoder2's) keeps its input and two numbers.
    """
    if a.norm_weights != 1:
        return (FP32 if a.norm_weights == 0 else forward.residual) * width + 2 * FP32
    # Some families multiply by the weight in fp32, before they cast back.
    normalised = FP32 if a.fp32_norms else forward.residual
    return FP32 * width + FP32 + normalised * width


def _norms(a: Architecture, forward: Pass) -> Saved:
    return Saved(a.norms * norm_saved(a, forward, a.hidden))


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


def _window(a: Architecture, mixer: MixerConfig, forward: Pass) -> Saved:
    """Count sliding-window attention of all heads."""
    if "window" not in mixer.branches:
        return Saved()
    size, keys, queries = forward.compute, a.key_width, a.query_width
    statistics = FP32 * a.heads  # the log-sum-exp of each query
    # Keys, values, queries and output: the band is computed again in the backward pass.
    return Saved(2 * size * keys + 2 * size * queries + statistics)

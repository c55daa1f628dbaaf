"""Count what backward passes of the operators in plain torch allocate. Loads no torch.

Letters: H query heads, G key/value heads, D head dim, F features, L chunk or block length, T tokens
of a row. Bytes of a pass; the tests compare them with what the operators allocate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from xlstm_distill.planning.activations.passes import CHUNK, FP32, Pass, Saved
from xlstm_distill.planning.activations.saved import most_in_mlp, norm_saved
from xlstm_distill.planning.architecture import Architecture, features
from xlstm_distill.recipe import MixerConfig

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


def layer_excess(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Return the bytes by which a layer's backward pass exceeds what the layer saved (stage II).

    The most is held inside of the window or, after it, of the mLSTM. By then the MLP, its norm, the
    output projection and the gate have given up what they saved.
    """
    heads = forward.compute * a.query_width
    freed = most_in_mlp(a, forward) + Saved(norm_saved(a, forward, a.hidden) + heads)
    # The gate read the outputs of both branches; the window's gradient needs its own again.
    in_window = window_work(a, mixer, forward) - (freed + Saved(heads)).bytes(forward)
    in_mlstm = mlstm_work(a, mixer, forward) - (freed + Saved(2 * heads)).bytes(forward)
    return max(0.0, in_window, in_mlstm)


def mixer_excess(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Return the bytes by which a mixer's backward pass exceeds what the mixer saved (stage I).

    By the time of the mLSTM, the error and the outputs of both branches are given up.
    """
    freed = Saved(FP32 * a.query_width + FP32 + 2 * forward.compute * a.query_width)
    return max(0.0, mlstm_work(a, mixer, forward) - freed.bytes(forward))


def mlstm_work(a: Architecture, mixer: MixerConfig, forward: Pass) -> float:
    """Count what the mLSTM's backward pass in plain torch allocates, its results included.

    It works on parts of a call (`xlstm_kernels.torch.chunkwise`), in fp32. The factors of F, D
    and L are the tensors of `differentiate_part` that live at once. The fused operator is not
    counted.
    """
    if "mlstm" not in mixer.branches or forward.backend == "triton":
        return 0.0
    H, D, L, F = a.heads, a.head_dim, forward.chunk, features(mixer, a)
    all_rows = forward.rows * forward.tokens * H
    section = min(SECTION[forward.device], all_rows)
    span = min(span_of(forward.device, F, D), all_rows)
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


def span_of(device: str, F: int, D: int) -> int:
    """Return the tokens of a part of the mLSTM, as `xlstm_kernels.torch.chunkwise` does."""
    if device == "cuda":
        return SPAN_GPU
    least, most = SPAN_CPU
    return min(most, max(least, STATES_CPU // (F * D) * CHUNK["cpu"]))

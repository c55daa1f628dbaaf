"""Predict the peak memory of a GPU, by part, for each way to share a model among processes.

Loads no torch. A step has a few moments that can be its peak. At the end of the forward pass all
saved activations and the loss are there; gradients are there only where earlier micro-batches left
some. At the end of the backward pass all gradients are there, and the activations of one layer. The
parts reported are those of the greatest moment.

What each sharding keeps between passes is in `states.py`. docs/planning.md lists what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from xlstm_distill.planning.activations.passes import Pass
from xlstm_distill.planning.activations.saved import (
    checkpoint_saved,
    layer_saved,
    layers_saved,
    mixer_checkpoint_saved,
    mixer_saved,
    mixers_saved,
    outside_layers,
)
from xlstm_distill.planning.activations.work import layer_excess, mixer_excess
from xlstm_distill.planning.architecture import (
    Architecture,
    features,
    kinds_of_layers,
)
from xlstm_distill.planning.inputs import DTYPE_BYTES, MemoryInputs
from xlstm_distill.planning.states import ADAM, held_states
from xlstm_distill.recipe import MixerConfig

CHUNK_BYTES = 256 * 2**20
"""Memory for the fp32 logits of a chunk of the loss (`losses.fused`)."""
TARGET_BYTES = 12
"""Bytes of a target in use: an id (int64) and a log-probability (fp32)."""
CUDA_CONTEXT = 1.5e9
"""CUDA context, cuBLAS workspaces, NCCL buffers. Chosen: no allocator counts them."""
FRAGMENTATION = 0.05
"""Share of what is allocated that the caching allocator holds on top. Chosen."""
ALIGN_TRANSIENT = 0.4
"""Gradients of one mixer in flight, as a share of what it saved. The largest that was measured."""
PROMPT_TOKENS = 4096
"""Tokens of an evaluation's prompt, with its examples. Chosen; long documents need more."""
ANSWER_TOKENS = 2048
"""Tokens of an answer, where a task keeps its own number. Chosen."""
ROOM = 4
"""A row of kept keys has room for a fourth of its tokens more (`models.cache`)."""
CONTINUATION_TOKENS = 128
"""Tokens of a continuation that is scored. Chosen."""
LORA_MODULES = 7
"""Projections of a layer that get an adapter: q, k, v, o, gate, up, down."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    working_copies: float = 0.0
    """Gathered layers (FSDP2, ZeRO), buckets (DDP, ZeRO), autocast's bf16 copies."""
    activations: float = 0.0
    loss: float = 0.0
    teacher: float = 0.0
    cache: float = 0.0
    """Decoding: keys and values of the teacher, or the student's state, window and sinks."""

    @property
    def allocated(self) -> float:
        """Bytes of tensors."""
        return sum(vars(self).values())

    @property
    def reserve(self) -> float:
        """Bytes that are not tensors: CUDA's own, and what the allocator cannot use."""
        return CUDA_CONTEXT + FRAGMENTATION * self.allocated

    @property
    def total(self) -> float:
        """Bytes a GPU must have."""
        return self.allocated + self.reserve


def distill_memory(inputs: MemoryInputs) -> Memory:
    """Predict the memory of stage II."""
    a, forward = inputs.architecture, inputs.student_pass
    states = held_states(inputs)
    base = Memory(
        weights=states.weights,
        optimizer=states.optimizer,
        working_copies=states.working_copies,
        teacher=inputs.online_teacher,
    )
    layer = layer_saved(a, inputs.mixer, forward).bytes(forward)
    kept = layers_saved(a, inputs.mixer, forward)
    if inputs.trainable == "lora":
        # Each adapter saves the vector of `rank` numbers between its two factors.
        between = LORA_MODULES * forward.compute * inputs.lora_rank * inputs.pass_tokens
        layer, kept = layer + between, kept + a.layers * between
    if inputs.checkpointing:
        kept = a.layers * checkpoint_saved(a, forward).bytes(forward)
    saved = kept + outside_layers(a, forward).bytes(forward)
    # Gradients are freed after each step, so only an earlier pass of the same step leaves some.
    left_over = states.gradients if inputs.accumulates else 0.0
    end_of_forward = replace(base, gradients=left_over, activations=saved, loss=_loss(inputs))
    # By then the loss has given up its logits, and the head's gradient counts among the gradients.
    # The last layer to run backward holds what it saved, and what its own pass needs beside that.
    working = layer + layer_excess(a, inputs.mixer, forward)
    end_of_backward = replace(base, gradients=states.gradients, activations=working)
    moments = [end_of_forward, end_of_backward]
    # The last layer is computed again before there is any gradient but the head's.
    recomputed = replace(base, gradients=left_over, activations=saved + working)
    if inputs.checkpointing:
        moments.append(recomputed)
    if inputs.sharding in ("fsdp2", "hsdp"):
        moments = _fsdp2_moments(inputs, end_of_forward, end_of_backward, recomputed)
    return max(moments, key=lambda memory: memory.allocated)


def refine_memory(inputs: MemoryInputs, prompt: int, context: int) -> Memory:
    """Predict the memory of on-policy refinement, where `inputs.sampled` prompts go on at once.

    It samples, and then trains as stage II does beside an online teacher. A student that computes
    in another format than it trains in, or is cut over GPUs, samples with a whole copy. Validation
    reads rows of `context` tokens, at least one at a time: far more than a sample has.
    """
    a, size = inputs.architecture, 2 if inputs.precision != "fp32" else 4
    sampled = inputs.sampled
    copied = inputs.precision != "fp32" or inputs.sharding in ("fsdp2", "hsdp")
    copy = float(size * inputs.student_numbers) if copied else 0.0
    training = distill_memory(inputs)
    states = held_states(inputs)
    reading = replace(inputs.student_pass, rows=sampled, tokens=prompt)
    sampling = Memory(
        weights=states.weights,
        optimizer=states.optimizer,
        working_copies=copy,
        teacher=inputs.online_teacher,
        activations=_without_gradients(a, reading),
        # Probabilities, their sums and what these are compared with, in float64.
        loss=3.0 * 8 * sampled * a.vocabulary,
        cache=sampled * _row_cache(a, inputs.mixer, inputs.tokens, size),
    )
    whole = replace(inputs, rows=max(1, inputs.pass_tokens // context), tokens=context)
    validating = replace(
        sampling,
        activations=_without_gradients(a, whole.student_pass),
        loss=_loss(whole),
        cache=0.0,
    )
    training = replace(training, working_copies=training.working_copies + copy)
    return max(training, sampling, validating, key=lambda memory: memory.allocated)


def learning_memory(inputs: MemoryInputs, experts: int) -> Memory:
    """Predict the memory of learned merge weights; `inputs.rows` are those of all experts.

    A layer's merged weights exist while it computes, and experts are read tensor by tensor. What
    every layer gives is kept twice, for the experts' and the merged student's; layers are computed
    again.
    """
    a, forward = inputs.architecture, inputs.teacher_pass
    p, size = inputs.parameters, DTYPE_BYTES[inputs.teacher_dtype]
    # The sum, its gradient and an expert's tensor in fp32, and the sum in the teacher's dtype.
    unit = max(inputs.layer_parameters, p.head or p.embedding)
    kept = 2 * a.layers * forward.residual * a.hidden * inputs.pass_tokens
    working = layer_saved(a, inputs.mixer, forward).bytes(forward)
    return Memory(
        working_copies=(4.0 + 4.0 + 4.0 + size) * unit,
        activations=kept + working + layer_excess(a, inputs.mixer, forward),
        loss=_loss(replace(inputs, rows=max(1, inputs.rows // experts))),
    )


def _fsdp2_moments(
    inputs: MemoryInputs, end_of_forward: Memory, end_of_backward: Memory, recomputed: Memory
) -> list[Memory]:
    """Add to each moment what FSDP2 has gathered then, one unit after another.

    A unit that is in its backward pass takes its weights, their gradients as computed, and these in
    fp32, in which they are reduced. Frozen units have no gradients.
    """
    p, size = inputs.parameters, 4 if inputs.precision == "fp32" else 2
    head, layer = p.head or p.embedding, inputs.layer_parameters
    # Tied embedding and head are one unit, which stays gathered from first to last.
    tied = 0.0 if p.head else float(size * head)
    trains_tables = inputs.trainable == "all"
    backward = 2 * size + 4
    # This layer and the next one, which is fetched ahead, and the gradients of this one.
    layers = tied + (backward + size) * layer
    tables = (backward if trains_tables else size) * p.embedding
    hidden_gradient = inputs.pass_tokens * inputs.student_pass.residual * inputs.architecture.hidden
    # The loss has made the head's gradient in fp32, which becomes one of `size` bytes for FSDP2.
    head_gradient = (4 + size) * head if trains_tables else 0
    moments = [
        replace(end_of_forward, working_copies=float(size * head)),
        replace(
            end_of_forward,
            working_copies=float(size * (head + layer)),
            loss=float(hidden_gradient + head_gradient),
        ),
        replace(end_of_backward, working_copies=layers),
        replace(end_of_backward, activations=0.0, working_copies=float(tables)),
    ]
    if inputs.checkpointing:
        moments.append(replace(recomputed, working_copies=layers))
    return moments


def align_memory(inputs: MemoryInputs) -> Memory:
    """Predict the memory of stage I: one teacher pass feeds all mixers, which share its weights."""
    new, forward = inputs.parameters.new, inputs.teacher_pass
    mixer = mixer_saved(inputs.architecture, inputs.mixer, forward).bytes(forward)
    excess = mixer_excess(inputs.architecture, inputs.mixer, forward)
    saved = mixers_saved(inputs.architecture, inputs.mixer, forward)
    if inputs.checkpointing:
        kept = mixer_checkpoint_saved(inputs.architecture, inputs.mixer, forward).bytes(forward)
        # Layers that keep all their attention are not aligned.
        kinds = kinds_of_layers(inputs.architecture, inputs.mixer)
        aligned = sum(layers for heads, layers in kinds if heads.mixed)
        saved = aligned * kept + mixer  # the layer that is computed again
    # The new parameters train in fp32; the student's other weights are the teacher's own tensors.
    return Memory(
        weights=4.0 * new,
        gradients=4.0 * new if inputs.accumulates else 0.0,
        optimizer=float(ADAM * new),
        working_copies=4.0 * new if inputs.sharding != "none" else 0.0,  # buckets of the reduction
        activations=saved + max(ALIGN_TRANSIENT * mixer, excess),
        teacher=inputs.teacher_weights,
    )


def capture_memory(inputs: MemoryInputs) -> Memory:
    """Predict the memory of one pass of the teacher for its targets, without gradients."""
    # Three copies of a chunk: the logits, the same in fp32, and their log-probabilities.
    loss = 3 * _chunk(inputs) + _targets(inputs)
    return Memory(
        activations=_without_gradients(inputs.architecture, inputs.teacher_pass),
        loss=loss,
        teacher=inputs.teacher_weights,
    )


def evaluation_memory(inputs: MemoryInputs, student: bool) -> Memory:
    """Predict the memory to read prompts and decode: `rows` of `tokens`, prompt and answer.

    A context gives the logits of its last token alone; those of continuations are kept whole.
    `student`: whether the student is evaluated, or else the teacher.
    """
    p, a = inputs.parameters, inputs.architecture
    size = DTYPE_BYTES[inputs.teacher_dtype]
    if student:
        parameters, row_cache = p.student, _row_cache(a, inputs.mixer, inputs.tokens, size)
    else:
        parameters, row_cache = p.teacher, teacher_cache(a, inputs.tokens, size)
    logits = size * inputs.rows * CONTINUATION_TOKENS * a.vocabulary
    # The last token's of all rows, or one row's continuation: in fp32, and log-probabilities.
    in_fp32 = 2 * 4 * max(inputs.rows, CONTINUATION_TOKENS) * a.vocabulary
    return Memory(
        weights=float(size * parameters),
        activations=_without_gradients(a, inputs.teacher_pass),
        loss=float(logits + in_fp32),
        cache=inputs.rows * row_cache,
    )


def student_cache(a: Architecture, mixer: MixerConfig, size: int) -> float:
    """Count the bytes of a row's decoding state in all layers (`models.cache`).

    They do not grow with the tokens it has seen; `kept_bytes_per_token` counts what does. `size`:
    bytes of a number of keys and values.
    """
    total = 8  # how long the row is, for all layers
    for heads, layers in kinds_of_layers(a, mixer):
        if "window" in mixer.branches:
            slots = mixer.window + mixer.sinks
            total += layers * 2 * heads.mixed_keys * a.head_dim * slots * size
        if "mlstm" in mixer.branches:
            # Per head, in fp32: S (F x D), z (F) and the stabiliser m.
            state = len(heads.mixed) * (features(mixer, a) * (a.head_dim + 1) + 1) * 4
            total += layers * state
    return float(total)


def kept_bytes_per_token(a: Architecture, mixer: MixerConfig, size: int) -> int:
    """Count the bytes that each token adds to a row's cache, where heads keep full attention."""
    keys = sum(heads.kept_keys * layers for heads, layers in kinds_of_layers(a, mixer))
    return 2 * keys * a.head_dim * size


def _row_cache(a: Architecture, mixer: MixerConfig, tokens: int, size: int) -> float:
    """Count a row's cache after so many tokens, with the room that kept keys have."""
    kept = (1 + 1 / ROOM) * tokens * kept_bytes_per_token(a, mixer, size)
    return student_cache(a, mixer, size) + kept


def teacher_cache(a: Architecture, tokens: int, size: int) -> float:
    """Count the bytes of a row's keys and values in all layers of the teacher."""
    # A layer with a window keeps no more than its window.
    kept = sum(min(tokens, reach or tokens) for reach in a.reaches)
    return float(2 * a.key_width * size * kept)


def _chunk(inputs: MemoryInputs) -> float:
    """Count the fp32 logits of one chunk of tokens; chunks are of about the same size."""
    tokens, row = inputs.pass_tokens, 4 * inputs.architecture.vocabulary
    # A vocabulary whose single row exceeds the limit still takes one token at a time.
    chunks = math.ceil(tokens / max(1, CHUNK_BYTES // row))
    return float(row * math.ceil(tokens / chunks))


def _targets(inputs: MemoryInputs) -> int:
    return inputs.pass_tokens * inputs.top_k * TARGET_BYTES


def _loss(inputs: MemoryInputs) -> float:
    """Count a chunk's logits, the gradients of hidden states and head, and the targets.

    The fused loss computes these gradients in its forward pass.
    """
    a, forward = inputs.architecture, inputs.student_pass
    # Beside the fp32 logits, the products need the same in bf16.
    copies = 1.0 if forward.compute == 4 else 1.5
    hidden_gradient = inputs.pass_tokens * forward.residual * a.hidden
    head_gradient = 4.0 * a.vocabulary * a.hidden
    return copies * _chunk(inputs) + (hidden_gradient + head_gradient) + _targets(inputs)


def _without_gradients(a: Architecture, forward: Pass) -> float:
    """Count what one layer needs at once where nothing is saved.

    That is the larger of the MLP's three products and of q, k, v, heads; and the residual stream.
    Experts need their products of all copies of a token, and these copies.
    """
    mlp, attention = 3 * a.intermediate, 3 * a.query_width + 2 * a.key_width
    if (e := a.experts) is not None:
        mlp = max(mlp, e.active * (4 * e.width + 2 * a.hidden) + 3 * e.shared)
    products = forward.compute * max(mlp, attention)
    residual = 3 * forward.residual * a.hidden + 4 * a.hidden
    return forward.rows * forward.tokens * (products + residual)

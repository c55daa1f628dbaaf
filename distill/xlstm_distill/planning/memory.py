"""Peak memory of a GPU, by part, for each way to share a model among processes. Loads no torch.

A step has a few moments that can be its peak. At the end of the forward pass all saved activations and the loss are
there, and gradients only where earlier micro-batches left some; at the end of the backward pass it is the other way
round. The parts reported are those of the greatest moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from xlstm_distill.planning.activations import (
    Backend,
    Pass,
    Precision,
    checkpoint_saved,
    layer_saved,
    mixer_saved,
    outside_layers,
)
from xlstm_distill.planning.architecture import (
    Architecture,
    Parameters,
    count_parameters,
    features,
    lora_parameters,
)
from xlstm_distill.recipe import MixerConfig

Sharding = Literal["none", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
SHARDINGS: tuple[Sharding, ...] = ("none", "ddp", "fsdp2", "zero1", "zero2", "zero3")
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

ADAM = 8
"""Two fp32 moments per trained parameter."""
ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults: numbers in a reduction bucket, and gathered parameters that ZeRO-3 holds at most."""
CHUNK_BYTES = 256 * 2**20
"""Memory for the fp32 logits of a chunk of the loss (`fused_loss`)."""
TARGET_BYTES = 12
"""An id and a log-probability of a target in use."""
CUDA_CONTEXT = 1.5e9
"""CUDA context, cuBLAS workspaces, NCCL buffers: chosen, on the safe side; no allocator counts them."""
FRAGMENTATION = 0.05
"""Share of what is allocated that the caching allocator holds on top: chosen."""
ALIGN_TRANSIENT = 0.4
"""Gradients of one mixer in flight, as a share of what it saved: the largest seen in docs/planning.md."""


@dataclass(frozen=True)
class Setup:
    """A stage that trains, as far as memory depends on it. `kept`: supervised tokens of a pass, at most all of them."""

    architecture: Architecture
    mixer: MixerConfig
    teacher_dtype: Dtype
    gpus: int
    sharding: Sharding
    rows: int
    tokens: int
    accumulates: bool
    checkpointing: bool
    backend: Backend
    online: bool = False
    top_k: int = 256
    trainable: Literal["all", "mixer", "lora"] = "all"
    lora_rank: int = 0
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def precision(self) -> Precision:
        """How the student computes: bf16 where the teacher is (`stages.common.make_accelerator`)."""
        if self.teacher_dtype != "bfloat16":
            return "fp32"
        return "autocast" if self.sharding in ("none", "ddp") else "bf16"

    @property
    def run(self) -> Pass:
        """One forward pass of a process."""
        return Pass(self.rows, self.tokens, self.precision, self.backend, self.device)

    @property
    def parameters(self) -> Parameters:
        """Parameters of teacher and student."""
        return count_parameters(self.architecture, self.mixer)

    @property
    def adapters(self) -> int:
        """Parameters of LoRA's adapters."""
        return lora_parameters(self.architecture, self.lora_rank) if self.trainable == "lora" else 0

    @property
    def trained(self) -> int:
        """Parameters that stage II trains."""
        p = self.parameters
        return {"all": p.student, "mixer": p.mixer, "lora": p.new + self.adapters}[self.trainable]


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    working_copies: float = 0.0
    """Weights and gradients put together for use: FSDP2's and ZeRO's gathered layers, DDP's and ZeRO's buckets,
    autocast's bf16 copies."""
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


@dataclass(frozen=True)
class States:
    """Bytes of weights, of gradients, of the optimiser's states and of working copies."""

    weights: float
    gradients: float
    optimizer: float
    working_copies: float


def distill_memory(t: Setup) -> Memory:
    """Memory of stage II."""
    p = t.parameters
    states = _states(t, p)
    teacher = float(DTYPE_BYTES[t.teacher_dtype] * p.teacher) if t.online else 0.0
    base = Memory(states.weights, 0.0, states.optimizer, states.working_copies, teacher=teacher)
    layer = layer_saved(t.architecture, t.mixer, t.run).bytes(t.run)
    if t.trainable == "lora":  # what lies between the two factors of each of the seven adapters
        layer += 7.0 * t.run.compute * t.lora_rank * _tokens(t)
    layers = t.architecture.layers
    saved = layers * (
        checkpoint_saved(t.architecture, t.run).bytes(t.run) if t.checkpointing else layer
    )
    saved += outside_layers(t.architecture, t.run).bytes(t.run)
    left_over = states.gradients if t.accumulates else 0.0
    moments = [
        replace(base, gradients=left_over, activations=saved, loss=_loss(t)),
        replace(base, gradients=states.gradients, activations=layer),
    ]
    if t.checkpointing:  # the last layer recomputed, before any gradient but the head's
        moments.append(replace(base, gradients=left_over, activations=saved + layer))
    return max(moments, key=lambda memory: memory.allocated)


def align_memory(t: Setup) -> Memory:
    """Memory of stage I: all mixers hang on one pass of the teacher, whose weights the student shares."""
    p = t.parameters
    run = replace(t.run, precision="fp32" if t.teacher_dtype == "float32" else "bf16")
    mixer = mixer_saved(t.architecture, t.mixer, run).bytes(run)
    gradients = 4.0 * p.new
    base = Memory(
        weights=4.0 * p.new, optimizer=float(ADAM * p.new), teacher=_teacher_weights(t, p)
    )
    base = replace(base, working_copies=4.0 * p.new if t.sharding != "none" else 0.0)
    activations = t.architecture.layers * mixer + ALIGN_TRANSIENT * mixer
    return replace(base, gradients=gradients if t.accumulates else 0.0, activations=activations)


def capture_memory(t: Setup) -> Memory:
    """Memory of one pass of the teacher for its targets, without gradients."""
    run = replace(t.run, precision="fp32" if t.teacher_dtype == "float32" else "bf16")
    loss = (
        3 * _chunk(t) + _tokens(t) * t.top_k * TARGET_BYTES
    )  # logits, the same in fp32, log-probabilities
    return Memory(
        activations=_forward(t.architecture, run),
        loss=loss,
        teacher=_teacher_weights(t, t.parameters),
    )


def evaluation_memory(t: Setup, student: bool) -> Memory:
    """Memory to score prompts of `rows` x `tokens` and to decode to that length, for the teacher or a student."""
    p, a = t.parameters, t.architecture
    run = replace(t.run, precision="fp32" if t.teacher_dtype == "float32" else "bf16")
    size = DTYPE_BYTES[t.teacher_dtype]
    cache = t.rows * (
        student_cache(a, t.mixer, size) if student else teacher_cache(a, t.tokens, size)
    )
    logits = 2.0 * size * _tokens(t) * a.vocabulary  # and their log-probabilities
    weights = float(size * (p.student if student else p.teacher))
    return Memory(weights=weights, activations=_forward(a, run), loss=logits, cache=cache)


def student_cache(a: Architecture, mixer: MixerConfig, size: int) -> float:
    """Bytes a row's decoding state takes in all layers, however many tokens it has seen (`cache.MixerCacheLayer`)."""
    slots = mixer.window + mixer.sinks
    ring = 2 * a.key_width * slots * size + 8 * (
        slots + 1
    )  # keys, values, their positions, the length
    state = (
        a.heads * (features(mixer, a) * (a.head_dim + 1) + 1) * 4
        if "mlstm" in mixer.branches
        else 0
    )
    return float(a.layers * (ring + state))


def teacher_cache(a: Architecture, tokens: int, size: int) -> float:
    """Bytes of a row's keys and values in all layers of the teacher."""
    return float(sum(2 * a.key_width * min(tokens, reach or tokens) * size for reach in a.reaches))


def _tokens(t: Setup) -> int:
    return t.rows * t.tokens


def _teacher_weights(t: Setup, p: Parameters) -> float:
    return float(DTYPE_BYTES[t.teacher_dtype] * p.teacher)


def _chunk(t: Setup) -> float:
    """The fp32 logits of one chunk of tokens; chunks are of about the same size."""
    tokens, row = _tokens(t), 4 * t.architecture.vocabulary
    chunks = math.ceil(tokens / max(1, CHUNK_BYTES // row))
    return float(row * math.ceil(tokens / chunks))


def _loss(t: Setup) -> float:
    """Logits of a chunk, gradients of hidden states and head, which are made with the loss, and targets."""
    a, run, tokens = t.architecture, t.run, _tokens(t)
    copies = 1.0 if run.compute == 4 else 1.5  # beside fp32, the same in bf16 for the products
    gradients = tokens * run.residual * a.hidden + 4.0 * a.vocabulary * a.hidden
    return copies * _chunk(t) + gradients + tokens * t.top_k * TARGET_BYTES


def _forward(a: Architecture, run: Pass) -> float:
    """What one layer needs at once where nothing is saved: the MLP's three products, or q, k, v and heads."""
    mlp, attention = 3 * a.intermediate, 3 * a.query_width + 2 * a.key_width
    return (
        run.rows
        * run.tokens
        * (run.compute * max(mlp, attention) + 3 * run.residual * a.hidden + 4 * a.hidden)
    )


def _states(t: Setup, p: Parameters) -> States:
    """Weights, gradients and optimiser on one GPU."""
    shards, trained, held = t.gpus, t.trained, p.student + t.adapters
    table = p.embedding + p.head
    half = t.precision != "fp32"
    if t.sharding in ("none", "ddp"):
        copies = 2.0 * (held - p.embedding) if half else 0.0
        buckets = 4.0 * trained if t.sharding == "ddp" else 0.0
        return States(4.0 * held, 4.0 * trained, float(ADAM * trained), copies + buckets)
    layer = p.layer + (p.new + t.adapters) / t.architecture.layers
    if t.sharding == "fsdp2":
        use = 2 if half else 4
        # Gathered: this layer, the next one, embedding and head; then their gradients, and these in fp32 to be reduced.
        gathered = use * (2 * layer + table) + (use + 4) * (layer + table)
        return States(
            4.0 * held / shards, 4.0 * trained / shards, ADAM * trained / shards, gathered
        )
    size = 2.0 if half else 4.0
    master = 4.0 * trained / shards if half else 0.0  # the fp32 weights that AdamW updates
    weights = size * held / (shards if t.sharding == "zero3" else 1)
    gradients = 4.0 * trained / shards + (size * trained if t.sharding == "zero1" else 0.0)
    gathered = size * min(held, ZERO_LIVE + layer) if t.sharding == "zero3" else 0.0
    buckets = (2 * size + 4) * min(
        ZERO_BUCKET, trained
    )  # one filled while one is sent, and its fp32 copy
    return States(weights, gradients, ADAM * trained / shards + master, gathered + buckets)

"""What the memory of a stage depends on: the model, how it is shared, and the shape of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from xlstm_distill.planning.activations.passes import Backend, Pass, Precision
from xlstm_distill.planning.architecture import (
    Architecture,
    Parameters,
    count_parameters,
    lora_parameters,
)
from xlstm_distill.recipe import MixerConfig

Sharding = Literal["none", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
SHARDINGS: tuple[Sharding, ...] = ("none", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryInputs:
    """What a stage's memory depends on: the model, how it is shared, and the shape of a pass."""

    architecture: Architecture
    mixer: MixerConfig
    teacher_dtype: Dtype
    gpus: int
    sharding: Sharding
    rows: int
    """Rows of one forward pass of a GPU."""
    tokens: int
    """Tokens of a row."""
    accumulates: bool
    """Whether a step has several passes, so that gradients of earlier ones are there."""
    checkpointing: bool
    backend: Backend
    online: bool = False
    """Whether the teacher computes the targets of stage II beside the student."""
    shard_teacher: bool = False
    """Whether the layers of an online teacher are cut over the GPUs."""
    top_k: int = 256
    trainable: Literal["all", "mixer", "lora"] = "all"
    lora_rank: int = 0
    device: Literal["cpu", "cuda"] = "cuda"
    node: int = 8
    """GPUs of a node: HSDP shards over them."""
    sampled: int = 0
    """On-policy refinement: rows that a GPU decodes at once."""
    waits: bool = False
    """FSDP2: whether gradients wait, whole, for the last pass of a step."""

    @property
    def shards(self) -> int:
        """GPUs that FSDP2 cuts a replica over, and so a sharded teacher under any launcher."""
        return min(self.gpus, self.node) if self.sharding == "hsdp" else self.gpus

    @property
    def student_numbers(self) -> int:
        """Parameters of the student, adapters included."""
        return self.parameters.student + self.adapters

    @property
    def precision(self) -> Precision:
        """How the student computes in stage II: bf16 where the teacher is."""
        if self.teacher_dtype != "bfloat16":
            return "fp32"
        # Without sharding by layer the weights stay fp32, and autocast casts them.
        return "autocast" if self.sharding in ("none", "ddp") else "bf16"

    @property
    def student_pass(self) -> Pass:
        """One forward pass of stage II."""
        return Pass(self.rows, self.tokens, self.precision, self.backend, self.device)

    @property
    def teacher_pass(self) -> Pass:
        """One forward pass in the teacher's own precision: all stages but stage II."""
        precision: Precision = "fp32" if self.teacher_dtype == "float32" else "bf16"
        return replace(self.student_pass, precision=precision)

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass."""
        return self.rows * self.tokens

    @property
    def parameters(self) -> Parameters:
        """Parameters of teacher and student."""
        return count_parameters(self.architecture, self.mixer)

    @property
    def teacher_weights(self) -> float:
        """Bytes of the teacher's weights."""
        return float(DTYPE_BYTES[self.teacher_dtype] * self.parameters.teacher)

    @property
    def teacher_layers(self) -> float:
        """Bytes of the teacher's decoder layers, which `capture.shard_teacher` cuts."""
        return float(DTYPE_BYTES[self.teacher_dtype] * self.parameters.layers)

    @property
    def teacher_shards(self) -> int:
        """GPUs over which an online teacher's layers are cut; 1 where it is whole."""
        return self.shards if self.online and self.shard_teacher else 1

    @property
    def online_teacher(self) -> float:
        """Bytes of the teacher on a GPU in stage II."""
        if not self.online:
            return 0.0
        if self.teacher_shards == 1:
            return self.teacher_weights
        # FSDP2 gathers a layer while the one before it runs.
        gathered = 2 * DTYPE_BYTES[self.teacher_dtype] * self.parameters.layer
        whole = self.teacher_weights - self.teacher_layers
        return whole + self.teacher_layers / self.teacher_shards + gathered

    @property
    def adapters(self) -> int:
        """Parameters of LoRA's adapters."""
        return lora_parameters(self.architecture, self.lora_rank) if self.trainable == "lora" else 0

    @property
    def trained(self) -> int:
        """Parameters that stage II trains."""
        p = self.parameters
        return {"all": p.student, "mixer": p.mixer, "lora": p.new + self.adapters}[self.trainable]

    @property
    def layer_parameters(self) -> float:
        """Parameters of one layer of the student, adapters included."""
        added = self.parameters.new + self.adapters
        return self.parameters.layer + added / self.architecture.layers

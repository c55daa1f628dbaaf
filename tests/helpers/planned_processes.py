"""Measure a step of stage II: `torchrun planned_processes.py OUT SHARDING DTYPE PASSES`.

Writes to OUT, as JSON, the memory that a process allocates at the peak and what the planner
expects.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from xlstm_distill.data.rows import Batch
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.models.families import FAMILIES
from xlstm_distill.models.student import convert
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.planning.inputs import MemoryInputs
from xlstm_distill.planning.memory import distill_memory
from xlstm_distill.recipe import Align, MixerConfig
from xlstm_distill.runtime.ranks import whole_process
from xlstm_distill.training.objectives import DistillObjective, checkpoint_activations
from xlstm_distill.training.optim import make_optimizer
from xlstm_kernels.testing import allocated_peak

TOKENS = 256
SIZES = {
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}


def main(out: str, sharding: Any, dtype: Any, passes: int) -> None:
    """Measure one step and write the figures from the first process."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    family, mixer = FAMILIES["llama"], MixerConfig(window=64)
    student = convert(family.causal_lm(family.config(**SIZES)), mixer).train()
    checkpoint_activations(student)
    targets = SparseTargets.from_logits(torch.randn(TOKENS, SIZES["vocab_size"]), 8)
    task = DistillObjective(student, lambda _: targets, LossWeights(0.9, 0.1))
    wrapped = shard(task, dtype) if sharding == "fsdp2" else DistributedDataParallel(task)
    optimizer = make_optimizer(task.named_parameters(), Align(tokens=1))

    def step() -> None:
        for number in range(passes):
            waits = isinstance(wrapped, DistributedDataParallel) and number < passes - 1
            with wrapped.no_sync() if waits else contextlib.nullcontext():
                wrapped(batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    inputs = MemoryInputs(
        architecture=read_architecture({**SIZES, "model_type": "llama"}, "test"),
        mixer=mixer,
        teacher_dtype=dtype,
        gpus=dist.get_world_size(),
        sharding=sharding,
        rows=1,
        tokens=TOKENS,
        accumulates=passes > 1,
        checkpointing=True,
        backend="torch",
        top_k=0,
        device="cpu",
    )
    planned = distill_memory(inputs)
    held = planned.weights + planned.optimizer
    if sharding == "ddp":  # its buckets stay from step to step
        held += planned.working_copies
    measured = held + allocated_peak(step)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({"measured": measured, "planned": planned.allocated}))


def shard(task: DistillObjective, dtype: str) -> DistillObjective:
    """Shard into the units that a training has; gradients are reduced in fp32.

    Each decoder layer is one, the embedding is one, and the final norm with the head.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if dtype == "bfloat16" else MixedPrecisionPolicy()
    body, head = task.student.model, task.student.lm_head
    for layer in body.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(body.embed_tokens, mesh=mesh, mp_policy=policy)
    fully_shard([body.norm, head], mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(task, mesh=mesh, mp_policy=policy)
    return task


def batch() -> Batch:
    """One row of one document."""
    ids = torch.arange(TOKENS)[None] % SIZES["vocab_size"]
    return Batch(
        ids,
        torch.arange(TOKENS)[None],
        torch.zeros_like(ids),
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        (),
    )


if __name__ == "__main__":
    with whole_process():
        main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

"""Trains tiny students for a few steps; the main process writes their weights.

test_accelerator.py starts it, alone or through torch.distributed.run. It takes the file to write
and, as JSON, the options of each training by name. It does one after the other in one process, as
the stages of a run are done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from xlstm_distill import MixerConfig, convert
from xlstm_distill.data.rows import IGNORE_INDEX, Batch
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.models.families import FAMILIES
from xlstm_distill.models.loading import empty_student
from xlstm_distill.models.lora import add_lora, merged_state
from xlstm_distill.recipe import Align
from xlstm_distill.runtime.ranks import is_main_process, wait_for_everyone, whole_process
from xlstm_distill.stages.distill import choose_trainable
from xlstm_distill.targets.providers import OnlineTargets
from xlstm_distill.training.accelerator import (
    clip_gradients,
    full_state_dict,
    make_accelerator,
    micro_step,
    prepare,
    reshard,
    shard_teacher,
)
from xlstm_distill.training.checkpoints import Checkpoints
from xlstm_distill.training.compilation import compile_parts
from xlstm_distill.training.objectives import (
    AlignObjective,
    DistillObjective,
    Objective,
    checkpoint_activations,
)
from xlstm_distill.training.state import TrainingState

ROWS, MICRO_BATCH, TOKENS, STEPS = 8, 2, 32, 4


def rows(step: int) -> torch.Tensor:
    return torch.randint(3, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))


def batch(ids: torch.Tensor) -> Batch:
    """Rows of one document each; two of three tokens are supervised."""
    labels = ids.roll(-1, 1)
    labels[:, ::3] = IGNORE_INDEX
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(TOKENS).expand_as(ids),
        segment_ids=torch.zeros_like(ids),
        labels=labels,
        real=torch.ones_like(ids, dtype=torch.bool),
        rows=(("a", 0),),
    )


def make_objective(options: dict[str, Any], accelerator: Any) -> tuple[Objective, Any]:
    """Make an objective and the student it trains."""
    torch.manual_seed(0)
    family = FAMILIES[options.get("family", "llama")]
    config = family.config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.15,
        tie_word_embeddings=options.get("tied", False), **options.get("own", {}),
    )  # fmt: skip
    teacher = family.causal_lm(config).eval()
    align = options.get("stage") == "align"
    mixer = MixerConfig(window=8, sinks=2, **options.get("mixer", {}))
    student = convert(teacher, mixer, share_weights=align)
    saved = None
    if "by_shards" in options and accelerator.distributed_type == DistributedType.FSDP:
        saved = Path(sys.argv[1]).with_name(options["by_shards"])
        if is_main_process():
            student.save_pretrained(saved)
        wait_for_everyone()
        student = empty_student(saved, torch.float32)
    if align:
        objective = AlignObjective(student, teacher)
        if options.get("checkpoint"):
            objective.checkpoint_activations()
        return objective, student
    if options.get("checkpoint"):
        checkpoint_activations(student)
    if options.get("trainable") == "lora":
        add_lora(student, rank=4, alpha=8)
    else:
        choose_trainable(student, options.get("trainable", "all"))
    if options.get("shard_teacher"):
        shard_teacher(teacher, accelerator)
    targets, weights = OnlineTargets(teacher, 16), LossWeights(0.9, 0.1)
    return DistillObjective(student, targets, weights, saved), student


def reduction(wrapped: Any) -> torch.dtype:
    """The precision in which gradients are reduced."""
    if isinstance(wrapped, FSDPModule):
        sharded = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
        policies = [module._get_fsdp_state()._mp_policy for module in sharded]
        (dtype,) = {policy.reduce_dtype or torch.float32 for policy in policies}
        return dtype
    if hasattr(wrapped, "communication_data_type"):  # DeepSpeed's engine
        return wrapped.communication_data_type
    # DDP reduces gradients as they are.
    (dtype,) = {p.dtype for p in wrapped.parameters() if p.requires_grad}
    return dtype


def train(options: dict[str, Any]) -> dict[str, Any]:
    """Train once; returns weights and figures, on the main process."""
    recipe: Any = SimpleNamespace(teacher=SimpleNamespace(dtype=options.get("dtype", "float32")))
    accelerator = make_accelerator(recipe)
    objective, student, wrapped, optimizer = prepared(options, accelerator)
    units = [name for name, module in wrapped.named_modules() if isinstance(module, FSDPModule)]
    figures = []
    with torch.no_grad():  # as validation before training does
        wrapped(batch(rows(100)))
        reshard(wrapped)
    for step in range(STEPS):
        if step == options.get("resume_at"):
            state = TrainingState(objective, optimizer)
            checkpoints = Checkpoints(Path(sys.argv[1]).parent / "checkpoints", keep=1)
            facts = {"layout": state.layout(), "replicas": state.replicas()}
            checkpoints.save(step, state.tensors(), facts)
            accelerator = make_accelerator(recipe)  # as another start of the command
            objective, student, wrapped, optimizer = prepared(options, accelerator)
            found = checkpoints.latest(print)
            assert found is not None
            assert TrainingState(objective, optimizer).load(found)  # exact
        wrapped.train()
        mine = rows(step)[accelerator.process_index :: accelerator.num_processes]
        parts = mine.split(options.get("micro_batch", MICRO_BATCH))
        total = torch.zeros(())
        for n, part in enumerate(parts):
            last, wait = n == len(parts) - 1, options.get("wait", False)
            with micro_step(accelerator, wrapped, last=last, wait=wait):
                loss = wrapped(batch(part)).loss
                accelerator.backward(loss * (accelerator.num_processes / (ROWS * TOKENS)))
            total += loss.detach()
        norm = float(clip_gradients(accelerator, wrapped, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        loss_of_step = float(accelerator.reduce(total, "sum")) / (ROWS * TOKENS)
        figures.append((loss_of_step, float(norm)))
    weights = full_state_dict(accelerator, student)
    if accelerator.is_main_process and options.get("trainable") == "lora":
        weights = merged_state(weights, rank=4, alpha=8)
    return {
        "weights": weights,
        "figures": figures,
        "kind": accelerator.distributed_type.name,
        "replicas": TrainingState(objective, optimizer).replicas(),
        "units": units,
        "reduction": str(reduction(wrapped)),
    }


def prepared(options: dict[str, Any], accelerator: Any) -> tuple[Any, Any, Any, Any]:
    """Make and wrap an objective and its optimiser, compiled where the options say so."""
    objective, student = make_objective(options, accelerator)
    optim = Align(tokens=4096, batch=ROWS, lr=1e-2)
    wrapped, optimizer = prepare(accelerator, objective, optim, micro_batch=MICRO_BATCH, clip=1.0)
    if options.get("compile"):
        compile_parts(objective, backend="aot_eager")
    return objective, student, wrapped, optimizer


if __name__ == "__main__":
    with whole_process():
        trained = {name: train(options) for name, options in json.loads(sys.argv[2]).items()}
        if is_main_process():
            torch.save(trained, sys.argv[1])

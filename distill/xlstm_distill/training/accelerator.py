"""The Accelerator of a stage: refuse what differs from what was asked, wrap a task, read its weights back."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.launcher import CONFIGS, Layout, asked_layout
from xlstm_distill.runtime.ranks import on_cpu, process_count, wait_for_everyone


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The Accelerator of this process, running what the launcher asked for, in the recipe's precision.

    A bf16 teacher means bf16 compute (of fp32 weights, with gradients reduced in fp32) where there is an accelerator.

    Raises:
        UserError: what the launcher asked for is not supported, contradicts the recipe, or is not what runs.
    """
    asked = asked_layout()
    precision = _precision(recipe, asked)
    if asked.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "accelerate launch: distributed_type DEEPSPEED needs deepspeed; install xlstm-distill[deepspeed]."
        )
    accelerator = Accelerator(
        mixed_precision=precision,
        # On a machine without an accelerator, several processes run as one unless cpu is said.
        cpu=on_cpu(),
        fsdp_plugin=_fsdp_plugin(precision) if asked.kind == "fsdp" else None,
    )
    refuse_difference(asked, running_layout(accelerator), precision)
    if asked.kind == "deepspeed":
        # While transformers knows of ZeRO-3, from_pretrained would cut every model into shards, the teacher too.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return accelerator


def _precision(recipe: Recipe, asked: Layout) -> str:
    """`bf16` or `no`: what the recipe says, and the launcher must not contradict it."""
    bf16 = recipe.teacher.dtype == "bfloat16"
    on_accelerator = not on_cpu()
    if asked.precision is None:
        return "bf16" if bf16 and on_accelerator else "no"
    if asked.precision == "bf16" and not bf16:
        raise UserError(
            f"accelerate launch: mixed_precision: 'bf16' beside teacher.dtype: {recipe.teacher.dtype!r} in the recipe; "
            "launch with --mixed_precision no, or set teacher.dtype=bfloat16."
        )
    if asked.precision == "no" and bf16 and on_accelerator:
        raise UserError(
            "accelerate launch: mixed_precision: 'no' beside teacher.dtype: 'bfloat16' in the recipe; "
            "launch with --mixed_precision bf16, or set teacher.dtype=float32."
        )
    return asked.precision


def _fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launcher set it, but with fp32 reduction; accelerate's own bf16 also reduces and returns in bf16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=policy if precision == "bf16" else None,
        activation_checkpointing=False,  # prepare does it, as for every other launcher
    )


def running_layout(accelerator: Accelerator) -> Layout:
    """What an Accelerator really runs."""
    precision = str(accelerator.mixed_precision)
    processes, kind = accelerator.num_processes, accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return Layout(
            "deepspeed", processes, accelerator.state.deepspeed_plugin.zero_stage, precision
        )
    if kind == DistributedType.FSDP:
        return Layout("fsdp", processes, 2 if accelerator.is_fsdp2 else 1, precision)
    return Layout("single" if kind == DistributedType.NO else "ddp", processes, None, precision)


def refuse_difference(asked: Layout, running: Layout, precision: str) -> None:
    """Compare what was asked for with what runs.

    Raises:
        UserError: kind, number of processes, FSDP version, ZeRO stage or precision differ.
    """
    same = (asked.kind, asked.processes) == (running.kind, running.processes)
    if not same or asked.sharding not in (None, running.sharding):
        hint = "FSDP and DeepSpeed need GPUs: " if on_cpu() else ""
        raise UserError(
            f"asked for {asked}, and accelerate runs {running}; {hint}check its configuration, "
            f"or take one of {CONFIGS} ({CONFIGS}ddp-cpu.yaml without a GPU)."
        )
    if running.precision != precision:
        raise UserError(
            f"mixed_precision: {precision!r} is wanted, and accelerate runs {running.precision!r}."
        )


def prepare(
    accelerator: Accelerator,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    micro_batch: int,
    clip: float | None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap a task and its optimiser, in one call since FSDP2 and DeepSpeed replace the optimiser's parameters.

    FSDP2 shards by the models' decoder layers. `micro_batch` (rows) and `clip` go into DeepSpeed's configuration.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = _layer_classes(task)
        if asked_layout().activation_checkpointing:
            for model in task.children():
                if isinstance(model, PreTrainedModel):
                    checkpoint_activations(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, micro_batch, clip)
    wrapped, prepared = accelerator.prepare(task, optimizer)
    return wrapped, prepared


def _layer_classes(task: nn.Module) -> list[str]:
    """Classes of the decoder layers in a task; none where it holds mixers only."""
    stacks = [getattr(module, "layers", None) for module in task.modules()]
    return sorted(
        {
            type(layer).__name__
            for stack in stacks
            if isinstance(stack, nn.ModuleList)
            for layer in stack
        }
    )


def _configure_deepspeed(accelerator: Accelerator, micro_batch: int, clip: float | None) -> None:
    """Complete DeepSpeed's configuration: it has no dataloader to learn from, and clips by itself."""
    plugin = accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    config.update(
        train_micro_batch_size_per_gpu=micro_batch,
        train_batch_size="auto",
        gradient_accumulation_steps=1,  # the boundary is set by hand (micro_step)
        gradient_clipping=clip or 0.0,
        communication_data_type="fp32",
        zero_force_ds_cpu_optimizer=False,
    )
    # With stage 1 this would choose DeepSpeed's BF16_Optimizer, whose gradients are wrong under accumulation (0.19.8).
    if accelerator.mixed_precision == "bf16" and plugin.zero_stage > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}


@contextlib.contextmanager
def micro_step(accelerator: Accelerator, wrapped: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch; gradients are complete after the `last` of a step.

    DDP reduces them once, at the last one. FSDP2 and ZeRO-2/3 reduce at each: to wait they would have to hold the
    gradients of all parameters on every process.
    """
    accelerator.sync_gradients = last
    wait = not last and accelerator.distributed_type not in (
        DistributedType.FSDP,
        DistributedType.DEEPSPEED,
    )
    with accelerator.no_sync(wrapped) if wait else contextlib.nullcontext():
        yield


def clip_gradients(accelerator: Accelerator, wrapped: nn.Module, clip: float | None) -> float:
    """Clip the gradient and return its norm over all processes; under DeepSpeed the step is already done then."""
    norm = accelerator.clip_grad_norm_(wrapped.parameters(), float("inf") if clip is None else clip)
    return float(norm)


def reshard(wrapped: nn.Module) -> None:
    """Cut the parameters again that FSDP2 keeps whole after a forward without a backward (validation)."""
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_state_dict(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """Complete weights of a module of a prepared task, on the CPU of the main process; empty on the others.

    All processes must call it. Where the process computes in bf16 copies (ZeRO), the fp32 weights are returned.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in module.state_dict(keep_vars=True).items():
        source = parameters.get(name, value)
        if id(source) not in seen:
            tensor = _whole(accelerator, source, value)
            seen[id(source)] = (
                tensor.cpu().clone() if accelerator.is_main_process else tensor.new_empty(0)
            )
        if accelerator.is_main_process:
            whole[name] = seen[id(source)]
    return whole


def _whole(accelerator: Accelerator, source: Any, value: Tensor) -> Tensor:
    """A parameter or buffer in full, on every process."""
    value = value.detach()
    if isinstance(value, DTensor):
        return value.full_tensor()
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return value
    import deepspeed

    if source.requires_grad:
        master: Tensor | None = deepspeed.utils.safe_get_full_fp32_param(source)
        if master is not None:
            return master.detach().view(getattr(source, "ds_shape", source.shape))
    if hasattr(source, "ds_id"):
        with deepspeed.zero.GatheredParameters([source]):
            return source.detach().clone()
    return value


def shard_teacher(teacher: CausalLM) -> None:
    """Spread the decoder layers of a frozen teacher over the processes (FSDP2); each is gathered while it runs.

    Embeddings, final norm and head stay whole. Forward passes become collective: all processes must make as many.
    """
    if process_count() == 1:
        return
    wait_for_everyone()  # starts the process group where nothing has
    body = teacher.model
    for layer in body.layers:
        fully_shard(layer)
    inside = {id(p) for layer in body.layers for p in layer.parameters()}
    fully_shard(body, ignored_params={p for p in body.parameters() if id(p) not in inside})


def checkpoint_activations(student: CausalLM) -> None:
    """Keep only the inputs of each decoder layer for the backward pass, and compute the rest again there."""
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

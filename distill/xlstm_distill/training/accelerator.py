"""The Accelerator of a stage: check what it runs, wrap an objective, read weights back."""

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

from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.recipe import Optimization, Recipe
from xlstm_distill.runtime.launcher import CONFIGS, Layout, asked_layout
from xlstm_distill.runtime.ranks import on_cpu, process_count, wait_for_everyone
from xlstm_distill.training.objectives import Objective
from xlstm_distill.training.optim import make_optimizer


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Make the Accelerator of this process as the launcher asked, in the recipe's precision.

    A bf16 teacher means bf16 compute where there is an accelerator. Weights stay fp32, and
    gradients are reduced in fp32.

    Raises:
        UserError: what the launcher asked for is not supported, contradicts the recipe, or does not
            run.
    """
    asked = asked_layout()
    precision = choose_precision(recipe.teacher.dtype, asked, on_accelerator=not on_cpu())
    if asked.kind == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "accelerate launch: distributed_type DEEPSPEED needs deepspeed; "
            "install xlstm-distill[deepspeed]."
        )
    accelerator = Accelerator(
        mixed_precision=precision,
        # Without this, several processes on a machine without an accelerator each run alone.
        cpu=on_cpu(),
        fsdp_plugin=_fsdp_plugin(precision) if asked.kind == "fsdp" else None,
    )
    refuse_difference(asked, running_layout(accelerator), precision)
    if asked.kind == "deepspeed":
        # While transformers knows of ZeRO-3, from_pretrained cuts every model into shards, the
        # teacher too.
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return accelerator


def choose_precision(dtype: str, asked: Layout, *, on_accelerator: bool) -> str:
    """Return `bf16` or `no`: the teacher's dtype decides, and the launcher must not contradict it.

    Raises:
        UserError: it does.
    """
    bf16 = dtype == "bfloat16"
    if asked.precision is None:
        return "bf16" if bf16 and on_accelerator else "no"
    if asked.precision == "bf16" and not bf16:
        raise UserError(
            f"accelerate launch: mixed_precision: 'bf16' beside teacher.dtype: {dtype!r} in the "
            "recipe; launch with --mixed_precision no, or set teacher.dtype=bfloat16."
        )
    # On a CPU `no` is no contradiction: it is the default there.
    if asked.precision == "no" and bf16 and on_accelerator:
        raise UserError(
            f"accelerate launch: mixed_precision: 'no' beside teacher.dtype: {dtype!r} in the "
            "recipe; launch with --mixed_precision bf16, or set teacher.dtype=float32."
        )
    return asked.precision


def _fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """Return FSDP2 as the launcher set it, but with gradients reduced in fp32."""
    # accelerate's own bf16 policy also reduces and returns in bf16.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=policy if precision == "bf16" else None,
        activation_checkpointing=False,  # prepare does it, as for every other launcher
    )


def running_layout(accelerator: Accelerator) -> Layout:
    """Return what an Accelerator really runs."""
    precision = str(accelerator.mixed_precision)
    processes, kind = accelerator.num_processes, accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        return Layout("deepspeed", processes, stage, precision)
    if kind == DistributedType.FSDP:
        version = 2 if accelerator.is_fsdp2 else 1
        parallelism = accelerator.parallelism_config
        replicas = parallelism.dp_replicate_size if parallelism else 1
        return Layout("fsdp", processes, version, precision, replicas=replicas)
    return Layout("single" if kind == DistributedType.NO else "ddp", processes, None, precision)


def refuse_difference(asked: Layout, running: Layout, precision: str) -> None:
    """Compare what was asked for with what runs.

    Raises:
        UserError: kind, number of processes, FSDP version, ZeRO stage or precision differ.
    """
    same = all(
        getattr(asked, name) == getattr(running, name) for name in ("kind", "processes", "replicas")
    )
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
    objective: Objective,
    optim: Optimization,
    *,
    micro_batch: int,
    clip: float | None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap an objective, read its weights if that is still to do, and make its optimiser.

    FSDP2 gathers the decoder layers, the embedding and the head one by one. `micro_batch` (rows)
    and `clip` go into DeepSpeed's configuration.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = _layer_classes(objective)
        plugin.ignored_modules = objective.whole_modules()
        if asked_layout().activation_checkpointing:
            objective.checkpoint_activations()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, micro_batch, clip)
    device = accelerator.device
    if accelerator.distributed_type == DistributedType.FSDP:
        # accelerate wants an optimiser beside the model, to replace its parameters by the shards.
        # It knows them by their addresses, which parameters on the meta device do not have. So the
        # one it gets is empty, and the real one is made of the shards.
        wrapped, _ = accelerator.prepare(objective, torch.optim.AdamW([{"params": []}]))
        _refuse_other_mesh(wrapped, asked_layout())
        objective.load_weights(device)
        optimizer = make_optimizer(objective.named_parameters(), optim, device)
        return wrapped, accelerator.prepare_optimizer(optimizer)
    optimizer = make_optimizer(objective.named_parameters(), optim, device)
    # In one call, since DeepSpeed replaces the optimiser's parameters.
    wrapped, prepared = accelerator.prepare(objective, optimizer)
    return wrapped, prepared


def _refuse_other_mesh(wrapped: nn.Module, asked: Layout) -> None:
    """Compare the mesh on which weights lie with what was asked for.

    Raises:
        UserError: they are cut over more or fewer ranks than asked.
    """
    wanted = (asked.replicas, asked.shards) if asked.replicas > 1 else (asked.shards,)
    for name, parameter in wrapped.named_parameters():
        if isinstance(parameter, DTensor) and tuple(parameter.device_mesh.shape) != wanted:
            raise UserError(
                f"asked for {asked}, and {name} lies on a mesh of "
                f"{tuple(parameter.device_mesh.shape)} instead of {wanted}; check accelerate's "
                "parallelism_config."
            )


def _layer_classes(objective: nn.Module) -> list[str]:
    """Return the class names of decoder layers in an objective; none where it holds mixers only."""
    found = set()
    for module in objective.modules():
        stack = getattr(module, "layers", None)
        if isinstance(stack, nn.ModuleList):
            found |= {type(layer).__name__ for layer in stack}
    return sorted(found)


def _configure_deepspeed(accelerator: Accelerator, micro_batch: int, clip: float | None) -> None:
    """Complete DeepSpeed's configuration, which has no dataloader to learn the batch from."""
    plugin = accelerator.state.deepspeed_plugin
    config: dict[str, Any] = plugin.deepspeed_config
    config.update(
        train_micro_batch_size_per_gpu=micro_batch,
        train_batch_size="auto",
        gradient_accumulation_steps=1,  # the boundary is set by hand (micro_step)
        gradient_clipping=clip or 0.0,  # its engine clips by itself
        communication_data_type="fp32",
        zero_force_ds_cpu_optimizer=False,
    )
    # With stage 1 this would choose DeepSpeed's BF16_Optimizer, whose gradients are wrong under
    # accumulation (0.19.8).
    if accelerator.mixed_precision == "bf16" and plugin.zero_stage > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}


@contextlib.contextmanager
def micro_step(
    accelerator: Accelerator, wrapped: nn.Module, *, last: bool, wait: bool = False
) -> Iterator[None]:
    """Surround forward and backward of one micro-batch; `last` is the last one of a step.

    DDP reduces gradients once, at the last micro-batch. DeepSpeed reduces at every one. So does
    FSDP2, unless `wait` is set: every rank then holds the gradients of all parameters. HSDP cuts
    gradients within a replica at every micro-batch and adds up replicas at the last one, as that
    needs no more memory.
    """
    accelerator.sync_gradients = last
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_all_reduce(last)
        waits = wait and not last
    else:
        waits = not last and accelerator.distributed_type != DistributedType.DEEPSPEED
    with accelerator.no_sync(wrapped) if waits else contextlib.nullcontext():
        yield


def clip_gradients(accelerator: Accelerator, wrapped: nn.Module, clip: float | None) -> Tensor:
    """Clip the gradient and return its norm over all ranks, before clipping, on the device.

    A gradient that is not finite stays as it is, so that its parameter can be found. Under
    DeepSpeed the optimiser has already stepped then, and clipped by itself.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # It is a number there.
        limit = float("inf") if clip is None else clip
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), limit)
        return torch.as_tensor(norm, device=accelerator.device)
    gradients = [p.grad for p in wrapped.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip is not None and gradients:
        factor = (clip / (norm + 1e-6)).clamp(max=1.0)
        factor = torch.where(norm.isfinite(), factor, 1.0)
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(local, factor)
    return norm


def reshard(wrapped: nn.Module) -> None:
    """Free the parameters that FSDP2 keeps whole after a forward without a backward."""
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_state_dict(accelerator: Accelerator, module: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights of a module of a prepared objective, on the main process's CPU.

    All ranks must call this; the others get an empty dictionary. Where ranks compute in bf16 copies
    (ZeRO), the fp32 weights are returned.
    """
    whole: dict[str, Tensor] = {}
    # Tied weights are gathered once, and stay tied.
    gathered: dict[int, Tensor] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in module.state_dict(keep_vars=True).items():
        source = parameters.get(name, value)
        if id(source) not in gathered:
            tensor = _whole(accelerator, source, value)
            # The other ranks take part in gathering and drop the result.
            kept = tensor.cpu().clone() if accelerator.is_main_process else tensor.new_empty(0)
            gathered[id(source)] = kept
        if accelerator.is_main_process:
            whole[name] = gathered[id(source)]
    return whole


def _whole(accelerator: Accelerator, source: Any, value: Tensor) -> Tensor:
    """Return a parameter or buffer in full, on every rank."""
    value = value.detach()
    if isinstance(value, DTensor):
        return value.full_tensor()
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return value
    import deepspeed

    if source.requires_grad:
        master: Tensor | None = deepspeed.utils.safe_get_full_fp32_param(source)
        if master is not None:
            # It is flat under ZeRO-3, which keeps the shape in `ds_shape`.
            return master.detach().view(getattr(source, "ds_shape", source.shape))
    if hasattr(source, "ds_id"):  # ZeRO-3 has cut it
        with deepspeed.zero.GatheredParameters([source]):
            return source.detach().clone()
    return value


def shard_teacher(teacher: CausalLM, accelerator: Accelerator) -> None:
    """Spread the decoder layers of a frozen teacher over the ranks (FSDP2), with HSDP over a node.

    Each layer is gathered while it runs. Embeddings, final norm and head stay whole. A forward
    becomes collective: all ranks must make the same number of them.
    """
    if process_count() == 1:
        return
    wait_for_everyone()  # starts the process group if nothing else has
    mesh = accelerator.torch_device_mesh if accelerator.parallelism_config else None
    within = None if mesh is None else mesh["dp_shard"]
    body = teacher.model
    for layer in body.layers:
        fully_shard(layer, mesh=within)
    inside = {id(p) for layer in body.layers for p in layer.parameters()}
    outside = {p for p in body.parameters() if id(p) not in inside}
    # The body is the root of the layers: FSDP2 orders their gathers by it.
    fully_shard(body, mesh=within, ignored_params=outside)

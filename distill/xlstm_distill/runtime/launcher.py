"""What a launcher (accelerate launch, torchrun, srun) asked for, from the variables it set.

This module loads no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from xlstm_distill.errors import UserError

Kind = Literal["single", "ddp", "fsdp", "deepspeed"]

CONFIGS = "recipes/accelerate/"
HINTS = {
    "gradient_accumulation_steps": "; the recipe's batch and micro_batch decide that",
    "gradient_clipping": "; the recipe's clip decides that",
}


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes: as a launcher asked for it, or as it runs.

    `sharding` is the version of FSDP or the stage of ZeRO; `precision` is None where none was
    named. With `replicas` above 1, FSDP shards over a group of processes (a node), and each group
    holds a replica (HSDP).
    """

    kind: Kind
    processes: int
    sharding: int | None = None
    precision: str | None = None
    activation_checkpointing: bool = False
    replicas: int = 1

    @property
    def shards(self) -> int:
        """Processes that a replica is cut over."""
        return self.processes // self.replicas

    def __str__(self) -> str:
        if self.kind == "single":
            return "one process"
        name = {"ddp": "DDP", "fsdp": "FSDP", "deepspeed": "DeepSpeed ZeRO-"}[self.kind]
        sharding = "" if self.sharding is None else str(self.sharding)
        groups = (
            "" if self.replicas == 1 else f" ({self.replicas} replicas of {self.shards} shards)"
        )
        return f"{name}{sharding} on {self.processes} processes{groups}"


def parse_share(text: str) -> tuple[int, int]:
    """Read `I/N`, the share of a task in a job array.

    Raises:
        UserError: it is not of this form, or I is not below N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    # A Slurm array counts from 0, so I/N is 0/8 to 7/8.
    if match and int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise UserError(f"--shard: {text!r} must be I/N with I from 0 to N - 1, for example 0/8.")


def asked_layout(environment: Mapping[str, str] = os.environ) -> Layout:
    """Return what a launcher asked for.

    Raises:
        UserError: this project does not train under it, or accelerate would do something else.
    """
    _refuse(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION")
    processes = int(environment.get("WORLD_SIZE", "1"))
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        # 1, as accelerate has it. `_refuse` lets 2 alone through where it is set.
        version = int(environment.get("FSDP_VERSION", "1"))
        checkpointing = is_true(environment, "FSDP_ACTIVATION_CHECKPOINTING")
        replicas = _replicas(environment, processes)
        return Layout("fsdp", processes, version, precision, checkpointing, replicas)
    if is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UserError(
            "accelerate launch: parallelism_config is for distributed_type FSDP alone; remove it, "
            f"or take {CONFIGS}hsdp.yaml."
        )
    if is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return Layout("deepspeed", processes, None if stage is None else int(stage), precision)
    # torchrun sets RANK for a single process too: that is DDP of one.
    return Layout("ddp" if "RANK" in environment else "single", processes, None, precision)


def _replicas(environment: Mapping[str, str], processes: int) -> int:
    """Return how many groups of processes hold a replica each; 1 is plain FSDP.

    Raises:
        UserError: the sizes do not fit the number of processes, or ask for another parallelism.
    """
    if not is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    names = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    sizes = {
        name: int(environment.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) for name in names
    }
    for name in ("tp", "cp", "sp"):
        if sizes[name] != 1:
            raise UserError(
                f"accelerate launch: parallelism_config_{name}_size: {sizes[name]} is not "
                "supported, only 1."
            )
    replicas, shards = sizes["dp_replicate"], sizes["dp_shard"]
    if shards < 2 or replicas * shards != processes:
        raise UserError(
            f"accelerate launch: parallelism_config: {replicas} replicas "
            f"(parallelism_config_dp_replicate_size) of {shards} shards "
            f"(parallelism_config_dp_shard_size) do not make {processes} processes; the product "
            "must be num_processes, with at least 2 shards: the GPUs of a node."
        )
    return replicas


def is_true(environment: Mapping[str, str], name: str) -> bool:
    """Whether a variable is set to true, as accelerate writes it."""
    return environment.get(name, "false").lower() in ("true", "1")


def _refuse(environment: Mapping[str, str]) -> None:
    """Refuse what would be ignored, or would silently train something else."""
    # Only accelerate launch sets it, for every process that it starts.
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    if launched and "RANK" not in environment and "MASTER_ADDR" in environment:
        raise UserError(
            "accelerate launch: several processes were asked for and one was started, as with "
            f"distributed_type MULTI_CPU or NO; take {CONFIGS}ddp-cpu.yaml, or unset MASTER_ADDR "
            "if one is meant."
        )
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:
        raise UserError(
            "accelerate launch: deepspeed_config_file: parts of it would be overridden; name the "
            f"stage and offload devices in deepspeed_config itself, as {CONFIGS}zero3.yaml does."
        )
    for variable, (field, allowed) in _supported(environment).items():
        value = environment.get(variable)
        if value is not None and value.lower() not in allowed:
            values = " or ".join(map(repr, allowed))
            raise UserError(
                f"accelerate launch: {field}: {value!r} is not supported, only {values}"
                f"{HINTS.get(field, '')}. {CONFIGS} has configurations that are."
            )


def _supported(environment: Mapping[str, str]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return accelerate's fields and their supported values, by the variable that holds them."""
    supported: dict[str, tuple[str, tuple[str, ...]]] = {
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", ("no", "bf16")),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", ("1", "auto")),
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", ("auto",)),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", ("1", "2", "3")),
        "ACCELERATE_USE_MEGATRON_LM": ("use_megatron_lm", ("false",)),
    }
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        supported |= {
            "FSDP_VERSION": ("fsdp_version", ("2",)),
            "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (
                "fsdp_activation_checkpointing_offload",
                ("false",),
            ),
            # Otherwise all ranks but the first have empty weights, the teacher's too.
            "FSDP_CPU_RAM_EFFICIENT_LOADING": ("fsdp_cpu_ram_efficient_loading", ("false",)),
        }
    if is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        # With it, from_pretrained would cut every model into shards, the teacher too.
        supported["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = ("zero3_init_flag", ("false",))
    return supported


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give a task that srun started by itself the variables that torchrun would set.

    It does nothing where another launcher has set them, and for a single task.
    """
    # Only srun sets SLURM_STEP_NUM_TASKS. A batch script has SLURM_NTASKS and SLURM_PROCID too, but
    # runs once.
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "RANK" in environment:
        return
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    one_node = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    # All tasks must find the same port; two jobs, or two steps of a job, on one machine must not.
    job, step = (int(environment.get(f"SLURM_{name}_ID", "0")) for name in ("JOB", "STEP"))
    port = 20000 + (job * 7 + step) % 20000
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=environment["SLURM_LOCALID"],
    )
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else first_host(nodes))
    environment.setdefault("MASTER_PORT", str(port))


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `n[03-07,9],m1` gives `n03`.

    Raises:
        UserError: it is no such list.
    """
    # A name, then perhaps a range in brackets, whose first number counts, then its rest.
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if not found:
        raise UserError(
            f"SLURM_STEP_NODELIST: {nodes!r} is not a list of nodes; set MASTER_ADDR and "
            "MASTER_PORT."
        )
    return "".join(part or "" for part in found.groups())

"""What a launcher asked for: accelerate launch, torchrun or srun, read from the variables they set. Loads no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

from xlstm_distill.errors import UserError

Kind = Literal["single", "ddp", "fsdp", "deepspeed"]

CONFIGS = "recipes/accelerate/"


@dataclass(frozen=True)
class Layout:
    """How a run is spread over processes: as a launcher asked for it, or as it runs.

    `sharding` is the version of FSDP or the stage of ZeRO; `precision` is None where nobody named one.
    """

    kind: Kind
    processes: int
    sharding: int | None = None
    precision: str | None = None
    activation_checkpointing: bool = False

    def __str__(self) -> str:
        names = {
            "single": "one process",
            "ddp": "DDP",
            "fsdp": "FSDP",
            "deepspeed": "DeepSpeed ZeRO-",
        }
        sharding = "" if self.sharding is None else str(self.sharding)
        return f"{names[self.kind]}{sharding}" + (
            "" if self.kind == "single" else f" on {self.processes} processes"
        )


def asked_layout(environment: Mapping[str, str] = os.environ) -> Layout:
    """What accelerate launch, torchrun or srun asked for, from the variables they set.

    Raises:
        UserError: it is something this project does not train under, or accelerate would do something else.
    """
    _refuse(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION")
    processes = int(environment.get("WORLD_SIZE", "1"))
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        checkpointing = is_true(environment, "FSDP_ACTIVATION_CHECKPOINTING")
        return Layout(
            "fsdp", processes, int(environment.get("FSDP_VERSION", "1")), precision, checkpointing
        )
    if is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return Layout("deepspeed", processes, None if stage is None else int(stage), precision)
    return Layout("ddp" if "RANK" in environment else "single", processes, None, precision)


def is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")


def _refuse(environment: Mapping[str, str]) -> None:
    """Refuse what would be ignored, or would silently train something else."""
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    if launched and "RANK" not in environment and "MASTER_ADDR" in environment:
        raise UserError(
            "accelerate launch: several processes were asked for and one was started, as with distributed_type "
            f"MULTI_CPU or NO; take {CONFIGS}ddp-cpu.yaml, or unset MASTER_ADDR if one is meant."
        )
    expected = {
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", ("no", "bf16")),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", ("1", "auto")),
        "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", ("auto",)),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", ("1", "2", "3")),
        "ACCELERATE_USE_MEGATRON_LM": ("use_megatron_lm", ("false",)),
    }
    if is_true(environment, "ACCELERATE_USE_FSDP"):
        expected["FSDP_VERSION"] = ("fsdp_version", ("2",))
        expected["FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"] = (
            "fsdp_activation_checkpointing_offload",
            ("false",),
        )
        expected["FSDP_CPU_RAM_EFFICIENT_LOADING"] = ("fsdp_cpu_ram_efficient_loading", ("false",))
    if is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        expected["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = ("zero3_init_flag", ("false",))
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in environment:
        raise UserError(
            "accelerate launch: deepspeed_config_file: parts of it would be overridden; "
            f"name the stage and offload devices in deepspeed_config itself, as {CONFIGS}zero3.yaml does."
        )
    hints = {
        "gradient_accumulation_steps": "; the recipe's batch and micro_batch decide that",
        "gradient_clipping": "; the recipe's clip decides that",
    }
    for variable, (field, allowed) in expected.items():
        value = environment.get(variable)
        if value is not None and value.lower() not in allowed:
            raise UserError(
                f"accelerate launch: {field}: {value!r} is not supported, only {' or '.join(map(repr, allowed))}"
                f"{hints.get(field, '')}. {CONFIGS} has configurations that are."
            )


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give a task that srun started by itself the variables that torchrun would set; else do nothing.

    Only srun sets SLURM_STEP_NUM_TASKS; a batch script, which also has SLURM_NTASKS and SLURM_PROCID, runs once.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks < 2 or "RANK" in environment:
        return
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    one_node = environment.get("SLURM_STEP_NUM_NODES", "1") == "1"
    # The same on all tasks; different for two jobs, and two steps of a job, on the same machine.
    port = (
        20000
        + (
            int(environment.get("SLURM_JOB_ID", "0")) * 7
            + int(environment.get("SLURM_STEP_ID", "0"))
        )
        % 20000
    )
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=environment["SLURM_LOCALID"],
    )
    environment.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else first_host(nodes))
    environment.setdefault("MASTER_PORT", str(port))


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: `n[03-07,9],m1` gives `n03`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    if not found:
        raise UserError(
            f"SLURM_STEP_NODELIST: {nodes!r} is not a list of nodes; set MASTER_ADDR and MASTER_PORT."
        )
    return "".join(part or "" for part in found.groups())

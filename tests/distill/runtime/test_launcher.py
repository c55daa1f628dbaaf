"""What launchers ask for, read from the variables they set; tasks that srun starts by itself."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from processes import process_environment, run_python

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.launcher import Layout, adopt_slurm, asked_layout, first_host

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}
WORKER = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
FSDP = {**LAUNCHED, **WORKER, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
HSDP = {
    **FSDP,
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
ZERO = {
    **LAUNCHED,
    **WORKER,
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
}


@pytest.mark.parametrize(
    ("environment", "layout"),
    [
        ({}, Layout("single", 1)),
        (LAUNCHED, Layout("single", 1, None, "no")),
        (WORKER, Layout("ddp", 4)),
        ({**LAUNCHED, **WORKER}, Layout("ddp", 4, None, "no")),
        (FSDP, Layout("fsdp", 4, 2, "no")),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, Layout("fsdp", 4, 2, "no", True)),
        (HSDP, Layout("fsdp", 4, 2, "no", replicas=2)),
        (ZERO, Layout("deepspeed", 4, 3, "no")),
    ],
)
def test_what_was_asked_for(environment, layout):
    assert asked_layout(environment) == layout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {**LAUNCHED, "MASTER_ADDR": "127.0.0.1"},
            "several processes were asked for and one was started",
        ),
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version: '1' is not supported, only '2'"),
        (
            {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading: 'true'",
        ),
        (
            {**LAUNCHED, "ACCELERATE_MIXED_PRECISION": "fp16"},
            "mixed_precision: 'fp16' .* only 'no' or 'bf16'",
        ),
        ({**HSDP, "WORLD_SIZE": "8"}, r"2 replicas .* of 2 shards .* do not make 8 processes"),
        ({**HSDP, "PARALLELISM_CONFIG_DP_SHARD_SIZE": "1"}, "at least 2 shards"),
        ({**HSDP, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size: 2 is not"),
        ({**HSDP, "ACCELERATE_USE_FSDP": "false"}, "parallelism_config is for .* FSDP alone"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage: '0'"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag: 'true'"),
        (
            {**ZERO, "ACCELERATE_GRADIENT_CLIPPING": "1.0"},
            "gradient_clipping: '1.0' .* the recipe's clip decides",
        ),
        ({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file"),
        (
            {**LAUNCHED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "gradient_accumulation_steps: '4'",
        ),
    ],
)
def test_what_would_be_ignored_or_silently_replaced_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        asked_layout(environment)


def test_tasks_of_srun_find_their_place():
    step = {
        "SLURM_JOB_ID": "70", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_NTASKS": "4",
    }  # fmt: skip
    adopted = dict(step)
    adopt_slurm(adopted)
    found = {name: adopted[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    other = {**step, "SLURM_PROCID": "0", "SLURM_STEP_ID": "1"}
    adopt_slurm(other)
    assert 1024 < int(other["MASTER_PORT"]) != int(adopted["MASTER_PORT"])
    own = {**step, "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    adopt_slurm(own)
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    "environment",
    [
        {
            "SLURM_JOB_ID": "70",
            "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },  # a batch script
        {
            "SLURM_JOB_ID": "70",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
        {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            **WORKER,
        },  # torchrun in an srun task
        {},
    ],
)
def test_what_srun_did_not_start_in_several_tasks_is_left_alone(environment):
    before = dict(environment)
    adopt_slurm(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n0", "n0"),
        ("n[0-3]", "n0"),
        ("gpu[07-08,11],m1", "gpu07"),
        ("a-1,b-2", "a-1"),
        ("r[2,5]-ib", "r2-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_a_node_list_that_cannot_be_read_is_refused():
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST: ''"):
        first_host("")


WAITS = """
import torch
from torch.distributed import distributed_c10d
from xlstm_distill.runtime import ranks
ranks.wait_for_everyone()
assert not ranks.all_agree(ranks.is_main_process())
assert ranks.all_agree(True)
def wait(group):  # keeps no group: its threads must end before the interpreter does
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
default, waiting = wait(distributed_c10d._get_default_group()), wait(ranks.waiting_group())
assert default <= 1800, default
assert waiting == ranks.LONGEST_WAIT.total_seconds(), waiting
"""


@pytest.mark.multi_process
def test_ranks_wait_long_for_each_other_but_not_in_training():
    """A rank that hangs in a collective of the training must not hold the others for days."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = run_python(*launcher, sys.executable, "-c", WAITS)
    assert done.returncode == 0, done.stderr


ENDS_EARLY = """
import atexit, sys, torch
from accelerate import PartialState
from xlstm_distill.runtime import ranks
with ranks.whole_process():
    PartialState(cpu=True)
    # As a sharded model does: a group that something holds outlives torch's list of groups.
    group = torch.distributed.distributed_c10d._get_default_group()
    atexit.register(print, "registered")
    sent = [torch.ones(200_000) for _ in range(60)]
    works = [torch.distributed.all_reduce(values, async_op=True) for values in sent]
    for work in works[:-1]:
        work.wait()
    del works, work
    sys.exit(3)
"""


@pytest.mark.multi_process
def test_a_rank_ends_with_its_exit_code_whatever_its_groups_threads_do():
    """Without `whole_process`, three of four such pairs abort."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS_EARLY],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment(RANK=str(n), LOCAL_RANK=str(n), WORLD_SIZE="2", **place),
        )
        for n in range(2)
    ]
    for rank in pair:
        out, errors = rank.communicate(timeout=120)
        assert (rank.returncode, out) == (3, "registered\n"), errors

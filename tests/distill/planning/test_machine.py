"""GPUs of the planner's table, any other GPU by its memory, and the checks of options."""

from __future__ import annotations

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.planning.machine import GPUS, find_gpu, make_machine


def test_memory_in_a_gpus_name_is_its_memory() -> None:
    named = {name: gpu for name, gpu in GPUS.items() if name.endswith("gb")}
    assert len(named) == len(GPUS) - 1  # b300 is sold with more than one size
    for name, gpu in named.items():
        assert gpu.memory == 1e9 * int(name.rpartition("-")[2].removesuffix("gb"))


def test_tensor_cores_are_faster_than_fp32_and_no_rate_is_that_with_sparsity() -> None:
    for gpu in GPUS.values():
        assert gpu.bf16 is not None
        assert gpu.fp32 is not None
        assert gpu.fp32 < gpu.bf16 <= 2250e12


def test_any_other_gpu_is_planned_by_its_memory() -> None:
    other = find_gpu(None, 16)
    assert (other.name, other.memory, other.bf16) == ("GPU of 16 GB", 16e9, None)
    smaller = find_gpu("a100-80gb", 40)
    assert (smaller.memory, smaller.bf16) == (40e9, GPUS["a100-80gb"].bf16)
    assert find_gpu(None).name == "h100-80gb"


@pytest.mark.parametrize("memory", [0.0, -1.0, float("inf"), float("nan")])
def test_memory_that_is_no_size_is_refused(memory: float) -> None:
    with pytest.raises(UserError, match=r"--gpu-memory: .* must be a number of GB above 0"):
        find_gpu(None, memory)


def test_one_gpu_shards_nothing_and_several_take_fsdp2() -> None:
    assert make_machine(gpus=1).sharding == "none"
    assert make_machine(gpus=2).sharding == "fsdp2"

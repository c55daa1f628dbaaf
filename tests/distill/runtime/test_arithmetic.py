"""What the last bit depends on is named, and its changes."""

from __future__ import annotations

import torch

from xlstm_distill.runtime.arithmetic import arithmetic, differences


def test_a_cpu_is_named_with_its_threads_and_instructions():
    facts = arithmetic(torch.device("cpu"))
    assert facts["threads"] == torch.get_num_threads()
    assert facts["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert facts["torch"] == torch.__version__
    assert facts["processor"]


def test_each_change_is_named_once_whatever_the_number_of_ranks():
    cpu = {"torch": "2.13", "threads": 1, "processor": "A"}
    assert differences([cpu, cpu], [cpu, cpu]) == []
    assert differences([cpu, cpu], [{**cpu, "threads": 2}] * 2) == ["threads 1 -> 2"]
    other = {**cpu, "processor": "B"}
    assert differences([cpu, cpu], [cpu, other]) == ["processor A -> B"]
    assert differences([cpu], [{"torch": "2.13", "gpu": "H100"}]) == [
        "threads 1 -> none",
        "processor A -> none",
        "gpu none -> H100",
    ]
    # A checkpoint of before this was recorded tells nothing.
    assert differences([], [cpu]) == []

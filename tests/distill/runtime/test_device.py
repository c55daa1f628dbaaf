"""Memory of a process that trains on a CPU."""

import resource
import sys

import pytest
import torch

from xlstm_distill.runtime.device import keep_freed_memory


def step() -> int:
    """Allocate and free 256 MiB, as a training step does; return the pages that were new."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**21) for _ in range(32)]  # of 8 MiB
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_a_step_has_the_pages_of_the_step_before():
    with keep_freed_memory(torch.device("cpu")):
        assert min(step() for _ in range(5)) < 100
    # And the system has them back afterwards.
    assert step() > 30_000

"""States carried over groups of chunks, against one chunk after the other."""

import pytest
import torch

from xlstm_kernels.testing import error_ratio
from xlstm_kernels.torch.carry import FEWEST, carry, carry_back, group_size


# Too few chunks for groups; groups that fit; groups with chunks left over.
@pytest.mark.parametrize("C", [1, 2, FEWEST - 1, FEWEST, 37, 64, 100])
def test_groups_of_chunks_carry_as_single_chunks_do(C: int) -> None:
    generator = torch.Generator().manual_seed(C)
    x = torch.randn(3, C, 4, 5, dtype=torch.float64, generator=generator)
    decay = torch.rand(3, C, 1, 1, dtype=torch.float64, generator=generator)
    decay[0, C // 2] = 0.0  # as where a document starts
    forward, back = x.clone(), x.clone()
    for c in range(1, C):
        forward[:, c] += decay[:, c - 1] * forward[:, c - 1]
    for c in reversed(range(C - 1)):
        back[:, c] += decay[:, c + 1] * back[:, c + 1]
    for step, expected in ((carry, forward), (carry_back, back)):
        found = x.clone()
        step(found, decay)
        assert error_ratio(found, expected) < 1e-15


def test_many_chunks_are_carried_in_few_steps() -> None:
    assert group_size(FEWEST - 1) == FEWEST - 1
    for C in (64, 100, 251):
        size = group_size(C)
        assert size + C // size + C % size <= 2.5 * C**0.5

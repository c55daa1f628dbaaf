"""The k-th largest magnitude, exactly, from blocks."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill.merging.selection import kept_of, largest


def numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(5000, generator=generator).abs()
    # Equal numbers, zeros, a number below the normal ones, and the largest there is.
    drawn[:700] = drawn[0]
    drawn[700:900] = 0
    drawn[900] = 1e-42
    drawn[901] = torch.inf
    return drawn[torch.randperm(5000, generator=generator)]


@pytest.mark.parametrize("count", [1, 2, 17, 1000, 2500, 4799, 4800, 4801, 5000])
def test_it_is_what_sorting_gives(count):
    values = numbers()
    cut = largest(lambda: values.split(777), count)
    ordered = values.sort(descending=True).values
    assert cut.magnitude == float(ordered[count - 1])
    above = int((values > cut.magnitude).sum())
    assert above + cut.equal == count


def test_more_than_there_are_is_an_error():
    values = numbers()
    for count in (0, 5001):
        with pytest.raises(ValueError):
            largest(lambda: [values], count)


def test_a_density_keeps_at_least_one():
    assert [kept_of(10, density) for density in (0.01, 0.5, 1.0)] == [1, 5, 10]

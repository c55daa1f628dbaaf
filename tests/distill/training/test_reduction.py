"""When gradients are reduced: by the memory that the first step took, the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from xlstm_distill.training.reduction import Reduction

RANKS = 4
WHOLE = 4 * (16 * 8 + 8)
"""Bytes of the gradients below, whole."""


@pytest.fixture
def sharded() -> Iterator[nn.Module]:
    """A layer cut over four ranks, of which this process is one; nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        yield fully_shard(nn.Linear(16, 8), mesh=init_device_mesh("cpu", (RANKS,)))
    finally:
        dist.destroy_process_group()


def reduction(wrapped: nn.Module, usable: int, agreeing: int = RANKS, choice: Any = "auto") -> Any:
    """Whole gradients beside a peak of 1000 bytes; so many ranks find that they fit."""

    def reduce(mine: torch.Tensor, _: str) -> torch.Tensor:
        return mine * agreeing

    device = torch.device("cpu")
    accelerator: Any = SimpleNamespace(device=device, num_processes=RANKS, reduce=reduce)
    return Reduction(choice, wrapped, accelerator, lambda _: (1000, usable))


@pytest.mark.parametrize(
    ("usable", "agreeing", "waits"),
    [
        (round((1000 + WHOLE) / 0.9) + 1, RANKS, True),
        (round((1000 + WHOLE) / 0.9) - 1, RANKS, False),
        (10**9, RANKS - 1, False),  # one rank is fuller than the others
    ],
)
def test_gradients_wait_where_they_fit_on_every_rank(
    sharded: nn.Module, usable: int, agreeing: int, waits: bool
) -> None:
    made = reduction(sharded, usable, agreeing)
    assert (made.waits, made.chosen()) == (False, None)  # the first step always reduces
    made.decide()
    assert made.waits == made.chosen() == waits


def test_a_resumed_training_keeps_the_choice(sharded: nn.Module) -> None:
    made = reduction(sharded, 0)
    made.restore(None)  # stopped before the first step ended
    assert made.undecided
    made.restore(True)
    made.decide()
    assert made.waits


def test_a_choice_of_the_recipe_is_kept(sharded: nn.Module) -> None:
    assert reduction(sharded, 0, choice="last").waits
    assert not reduction(sharded, 10**9, choice="every").undecided
    # Without FSDP2 there is nothing to choose.
    assert not reduction(nn.Linear(2, 2), 10**9).undecided

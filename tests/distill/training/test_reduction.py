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
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from xlstm_distill.training.reduction import Reduction

RANKS = 4
WHOLE = 4 * (16 * 8 + 8)
"""Bytes of the gradients below, whole."""
PEAK = 1000 + 2 * WHOLE // RANKS
"""Bytes of a step that began with Adam's two moments."""


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
    optimizer = torch.optim.AdamW(wrapped.parameters())
    return Reduction(choice, wrapped, accelerator, optimizer, lambda _: (peak(optimizer), usable))


def peak(optimizer: torch.optim.Optimizer) -> int:
    """1000 bytes, and this rank's shards of Adam's moments where they are there."""
    held = [
        value.to_local()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, DTensor)
    ]
    return 1000 + sum(shard.nbytes for shard in held)


def step(made: Any, *, skipped: bool = False) -> None:
    """What the trainer does in a step, as far as it matters here."""
    made.begin()
    if not skipped:
        for parameter in made.optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        made.optimizer.step()
    made.decide(skipped=skipped)


@pytest.mark.parametrize(
    ("usable", "agreeing", "waits"),
    [
        (round((PEAK + WHOLE) / 0.9) + 1, RANKS, True),
        (round((PEAK + WHOLE) / 0.9) - 1, RANKS, False),
        (10**9, RANKS - 1, False),  # one rank is fuller than the others
    ],
)
def test_gradients_wait_where_they_fit_on_every_rank(
    sharded: nn.Module, usable: int, agreeing: int, waits: bool
) -> None:
    made = reduction(sharded, usable, agreeing)
    step(made)
    assert (made.waits, made.chosen()) == (False, None)  # the first steps always reduce
    step(made)
    assert made.waits == made.chosen() == waits


def test_moments_count_though_the_first_step_has_none(sharded: nn.Module) -> None:
    # The first step's peak and whole gradients fit; with the moments they do not.
    usable = round((1000 + WHOLE) / 0.9) + 1
    made = reduction(sharded, usable)
    for skipped in (True, False, True):
        step(made, skipped=skipped)
        assert made.chosen() is None
    step(made)
    assert made.chosen() is False
    # Resumed after the update that made the moments: the next step decides, as without a stop.
    resumed = reduction(sharded, usable)
    resumed.optimizer.load_state_dict(made.optimizer.state_dict())
    resumed.restore(None)
    step(resumed)
    assert resumed.chosen() is False


def test_a_resumed_training_keeps_the_choice(sharded: nn.Module) -> None:
    made = reduction(sharded, 0)
    made.restore(None)  # stopped before the second step ended
    assert made.undecided
    made.restore(True)
    step(made)
    step(made)
    assert made.waits


def test_a_choice_of_the_recipe_is_kept(sharded: nn.Module) -> None:
    assert reduction(sharded, 0, choice="last").waits
    assert not reduction(sharded, 10**9, choice="every").undecided
    # Without FSDP2 there is nothing to choose.
    assert not reduction(nn.Linear(2, 2), 10**9).undecided

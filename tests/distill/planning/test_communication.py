"""What a step sends: counted by hand, and what that does to a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.planning.architecture import Architecture
from xlstm_distill.planning.communication import (
    Bound,
    Links,
    Traffic,
    align_traffic,
    distill_traffic,
)
from xlstm_distill.planning.inputs import MemoryInputs
from xlstm_distill.planning.machine import make_machine
from xlstm_distill.planning.memory import distill_memory
from xlstm_distill.planning.plan import plan_recipe
from xlstm_distill.recipe import MixerConfig, load_recipe

ROOT = Path(__file__).parents[3]
STUDENT, EMBEDDING, NEW = 8_072_600_576, 128_256 * 4096, 42_339_328
"""Of Llama-3.1-8B: parameters of the student, of its embedding (and its head), new ones."""


@pytest.fixture
def large(facts: Callable[[str], Architecture]) -> Callable[..., MemoryInputs]:
    """Stage II of Llama-3.1-8B."""

    def make(sharding: Any, gpus: int = 8, **changes: Any) -> MemoryInputs:
        plain = MemoryInputs(
            architecture=facts("llama-3.1-8b"),
            mixer=MixerConfig(),
            teacher_dtype="bfloat16",
            gpus=gpus,
            sharding=sharding,
            rows=1,
            tokens=4096,
            accumulates=True,
            checkpointing=True,
            backend="triton",
        )
        return replace(plain, **changes)

    return make


def test_fsdp2_gathers_layers_twice_and_cuts_gradients_in_every_pass(large) -> None:
    assert (large("fsdp2").parameters.student, large("fsdp2").parameters.new) == (STUDENT, NEW)
    layers = STUDENT - 2 * EMBEDDING - 4096
    gathered = 2 * (2 * layers + 2 * EMBEDDING + EMBEDDING + 4096)  # bf16
    sent = distill_traffic(large("fsdp2"), passes=8)
    assert sent.gathered == pytest.approx(8 * 7 / 8 * gathered)
    assert sent.scattered == pytest.approx(8 * 7 / 8 * 4 * STUDENT)  # fp32
    waiting = distill_traffic(large("fsdp2", waits=True), passes=8)
    assert waiting.scattered == pytest.approx(7 / 8 * 4 * STUDENT)
    assert waiting.gathered == sent.gathered


@pytest.mark.parametrize(
    ("sharding", "gpus", "shards"), [("fsdp2", 8, 8), ("ddp", 16, 16), ("hsdp", 64, 8)]
)
def test_a_cut_teacher_gathers_its_layers_once_a_pass(
    large, sharding: str, gpus: int, shards: int
) -> None:
    """HSDP gathers them inside of a node; without FSDP2 they are cut over all GPUs."""
    layers = STUDENT - NEW - 2 * EMBEDDING - 4096
    whole = large(sharding, gpus, online=True)
    cut = replace(whole, shard_teacher=True)
    sent, more = distill_traffic(whole, passes=8), distill_traffic(cut, passes=8)
    teacher = 8 * (shards - 1) / shards * 2 * layers
    assert more.gathered - sent.gathered == pytest.approx(teacher)
    assert replace(more, gathered=sent.gathered) == sent
    # Stored targets have no teacher beside the student, and one GPU nothing to cut.
    stored = large(sharding, gpus)
    assert distill_traffic(replace(stored, shard_teacher=True), 8) == distill_traffic(stored, 8)
    held = distill_memory(cut).teacher
    outside, of_layers = 2 * (2 * EMBEDDING + 4096), 2 * layers
    assert held == pytest.approx(outside + of_layers / shards + 2 * of_layers / 32)
    alone = replace(cut, sharding="none", gpus=1)
    assert distill_memory(alone).teacher == 2 * (STUDENT - NEW)


def test_hsdp_crosses_nodes_once_in_a_step_with_gradients_alone(large) -> None:
    sent = distill_traffic(large("hsdp", 64), passes=1)
    assert sent.reduced == pytest.approx(2 * 7 / 8 * 4 * STUDENT / 8)
    inside = distill_traffic(large("fsdp2", 8), passes=1)
    assert (sent.gathered, sent.scattered) == (inside.gathered, inside.scattered)
    assert (sent.nodes, sent.replicas) == (1, 8)
    assert distill_traffic(large("fsdp2", 64), passes=1).nodes == 8


def test_ddp_and_stage_one_send_what_trains(large) -> None:
    assert distill_traffic(large("ddp"), passes=8).reduced == pytest.approx(7 / 4 * 4 * STUDENT)
    assert align_traffic(large("ddp"), passes=8).reduced == pytest.approx(7 / 4 * 4 * NEW)
    sent = align_traffic(large("fsdp2"), passes=2)
    assert (sent.gathered, sent.scattered) == (2 * 7 / 8 * 2 * NEW, 2 * 7 / 8 * 4 * NEW)
    assert distill_traffic(large("none", 1), passes=8) == Traffic()


def test_nodes_share_their_network_in_a_ring_and_not_between_replicas() -> None:
    links = Links(within=400e9, between=40e9)
    assert Traffic(gathered=400e9).seconds(links, 8) == 1
    # 8 GPUs have 320 GB/s to the next node together; one alone has 40.
    assert Traffic(gathered=400e9, nodes=2).seconds(links, 8) == 1.25
    assert Traffic(gathered=400e9, reduced=40e9, replicas=2).seconds(links, 8) == 2
    assert Bound(Traffic(), compute=1, communication=2).by_communication
    assert not Bound(Traffic(), compute=None, communication=2).by_communication


def test_waiting_gradients_take_four_bytes_a_parameter(large) -> None:
    plain, waiting = (distill_memory(large("fsdp2", waits=waits)) for waits in (False, True))
    assert waiting.gradients == 4 * STUDENT
    assert plain.gradients == 4 * STUDENT / 8
    # A step of one pass has nothing to wait for.
    assert distill_memory(large("fsdp2", waits=True, accumulates=False)).gradients < 4 * STUDENT
    assert distill_memory(large("hsdp", 64)).weights == 4 * STUDENT / 8


def planned(*, settings: tuple[str, ...] = (), **options: Any) -> Any:
    path = ROOT / "recipes" / "llama3.1-8b.yaml"
    return plan_recipe(load_recipe(path, settings), path.parent, make_machine(**options))


def test_a_plan_says_when_it_is_bound_by_communication() -> None:
    fast = planned(gpu="h100-80gb", gpus=16, backend="triton")
    slow = planned(gpu="h100-80gb", gpus=16, backend="triton", network=0.1)
    for plan, bound in ((fast, False), (slow, True)):
        stage = next(stage for stage in plan.stages if stage.stage == "distill")
        assert stage.bound.by_communication == bound
        if bound:
            assert stage.hours == pytest.approx(stage.steps * stage.bound.communication / 3600)
    # Replicas on both nodes send less over the slow network.
    hsdp = planned(gpu="h100-80gb", gpus=16, backend="triton", network=0.1, sharding="hsdp")
    theirs = next(stage for stage in hsdp.stages if stage.stage == "distill")
    assert theirs.bound.communication < stage.bound.communication


def test_a_plan_names_the_smallest_gpus_that_fit() -> None:
    plan = planned(gpu="l40s-48gb", gpus=1, backend="triton")
    assert plan.problems
    assert plan.smallest
    counts = [count for count, _ in plan.smallest]
    assert counts == sorted(counts, reverse=True)
    count, name = plan.smallest[0]
    assert not planned(gpu=name, gpus=count, backend="triton").problems
    assert planned(gpu=name, gpus=count // 2, backend="triton").problems
    assert planned(gpu="b300", gpus=8, backend="triton").smallest == ()  # it fits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 12, "sharding": "hsdp"}, "--sharding: 'hsdp' needs several whole nodes"),
        ({"gpus": 8, "sharding": "hsdp"}, "not several nodes of 8"),
        ({"node": 0}, "--node: 0 must be at least 1"),
        ({"link": -1.0}, "--link: -1 must be a number of GB/s above 0"),
        ({"network": float("inf")}, "--network: inf must be"),
    ],
)
def test_impossible_links_and_nodes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_machine(**options)

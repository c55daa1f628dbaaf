"""Ways to make a stage fit: the smallest changes, in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from xlstm_distill.planning.architecture import Architecture
from xlstm_distill.planning.fit import StageMemory, command_line, what_fits
from xlstm_distill.planning.inputs import MemoryInputs
from xlstm_distill.planning.machine import find_gpu
from xlstm_distill.planning.memory import align_memory, distill_memory
from xlstm_distill.recipe import MixerConfig


@pytest.fixture
def stage(facts: Callable[[str], Architecture]) -> Callable[..., StageMemory]:
    """Stage II of Llama-3.2-1B on one GPU: 8 rows of 4096 tokens of a batch of 24."""

    def make(**changes: Any) -> StageMemory:
        plain = MemoryInputs(
            architecture=facts("llama-3.2-1b"),
            mixer=MixerConfig(),
            teacher_dtype="bfloat16",
            gpus=1,
            sharding="none",
            rows=8,
            tokens=4096,
            accumulates=True,
            checkpointing=False,
            backend="triton",
        )
        return StageMemory("distill", distill_memory, replace(plain, **changes), batch=24)

    return make


def test_what_fits_has_no_problem(stage: Callable[..., StageMemory]) -> None:
    fit = what_fits(stage(), find_gpu(None, 1000))
    assert (fit.fits, fit.problem) == (True, None)


def test_every_way_fits_and_the_smallest_sets_come_first(
    stage: Callable[..., StageMemory],
) -> None:
    gpu = find_gpu(None, 40)
    fit = what_fits(stage(), gpu)
    assert fit.problem is not None
    assert fit.memory.total > gpu.memory
    ways = fit.problem.ways
    assert ways[0].settings == {"distill.activation_checkpointing": True}
    assert len({len(way.settings) for way in ways}) == 1
    assert all(way.memory is not None and way.memory <= gpu.memory for way in ways)
    assert str(ways[0]) in fit.problem.text


def test_an_online_teacher_is_cut_over_several_gpus_or_not_there(
    stage: Callable[..., StageMemory],
) -> None:
    crowded = stage(rows=1, gpus=8, sharding="fsdp2", checkpointing=True, online=True)
    cut = distill_memory(replace(crowded.inputs, shard_teacher=True)).total
    assert cut < distill_memory(crowded.inputs).total
    fit = what_fits(crowded, find_gpu(None, cut / 1e9))
    assert fit.problem is not None
    stored = {"capture.targets": "stored"}
    assert [dict(way.settings) for way in fit.problem.ways] == [
        {"capture.shard_teacher": True},
        stored,
    ]
    # A recipe refuses to cut a teacher beside stored targets.
    crowded = replace(crowded, inputs=replace(crowded.inputs, shard_teacher=True))
    fit = what_fits(crowded, find_gpu(None, 0.99 * cut / 1e9))
    assert fit.problem is not None
    assert fit.problem.ways[0].settings == {**stored, "capture.shard_teacher": False}
    alone = what_fits(stage(rows=1, checkpointing=True, online=True), find_gpu(None, 22))
    assert alone.problem is not None
    assert all("capture.shard_teacher" not in way.settings for way in alone.problem.ways)


def test_rows_of_a_smaller_pass_divide_the_batch(stage: Callable[..., StageMemory]) -> None:
    """A recipe refuses a `micro_batch` that does not: 7 and 5 rows would fit, 24 needs 6 or 4."""
    whole = stage(checkpointing=True, rows=8)
    needed = distill_memory(replace(whole.inputs, rows=7)).total
    fit = what_fits(whole, find_gpu(None, needed / 1e9))
    assert fit.problem is not None
    assert fit.problem.ways[0].settings == {"distill.micro_batch": 6}


def test_fewer_trained_parameters_and_more_gpus_come_last(
    stage: Callable[..., StageMemory],
) -> None:
    crowded = stage(checkpointing=True, rows=1)
    fit = what_fits(crowded, find_gpu(None, 20))
    assert fit.problem is not None
    settings = [dict(way.settings) for way in fit.problem.ways]
    assert settings[0] == {"distill.trainable": "mixer"}
    assert settings[1] == {"--gpus": 2, "--sharding": "fsdp2"}


def test_shorter_rows_are_for_a_stage_that_nothing_else_makes_fit(
    stage: Callable[..., StageMemory],
) -> None:
    crowded = stage(rows=1, checkpointing=True)
    aligned = replace(crowded, stage="align", memory=align_memory)
    halved = align_memory(replace(aligned.inputs, tokens=2048)).total
    fit = what_fits(aligned, find_gpu(None, halved / 1e9))
    assert fit.problem is not None
    assert [dict(way.settings) for way in fit.problem.ways] == [{"data.context": 2048}]


def test_stage_one_fits_with_activation_checkpointing(stage: Callable[..., StageMemory]) -> None:
    aligned = replace(stage(), stage="align", memory=align_memory)
    less = align_memory(replace(aligned.inputs, checkpointing=True)).total
    assert less < 0.5 * align_memory(aligned.inputs).total
    fit = what_fits(aligned, find_gpu(None, less / 1e9))
    assert fit.problem is not None
    assert fit.problem.ways[0].settings == {"align.activation_checkpointing": True}


def test_nothing_helps_where_the_weights_alone_are_too_large(
    stage: Callable[..., StageMemory],
) -> None:
    aligned = replace(stage(rows=1), stage="align", memory=align_memory)
    fit = what_fits(aligned, find_gpu(None, 3))
    assert fit.problem is not None
    assert fit.problem.ways == ()
    assert "take a GPU with more memory" in fit.problem.text


def test_settings_are_written_as_options() -> None:
    settings = {"distill.activation_checkpointing": True, "align.micro_batch": 2, "--gpus": 4}
    words = "--set distill.activation_checkpointing=true --set align.micro_batch=2 --gpus 4"
    assert command_line(settings) == words

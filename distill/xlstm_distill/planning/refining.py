"""Cost on-policy refinement: training beside the teacher, and sampling."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from xlstm_distill.planning import flops
from xlstm_distill.planning.communication import Bound, distill_traffic
from xlstm_distill.planning.costs import (
    FP32,
    Planner,
    StageCost,
    batch_problem,
    passes_of_step,
)
from xlstm_distill.planning.fit import Problem, StageMemory, Way, what_fits
from xlstm_distill.planning.inputs import DTYPE_BYTES
from xlstm_distill.planning.machine import SAMPLING, Machine
from xlstm_distill.planning.memory import kept_bytes_per_token, refine_memory, student_cache
from xlstm_distill.recipe import Refine
from xlstm_distill.recipe.refining import MOST_SAMPLED


def refine_cost(planner: Planner, name: str) -> StageCost:
    """Cost the on-policy refinement of one expert.

    Its hours are those of training and of reading prompts at stage II's utilisation, and of
    sampling. A sampled token reads all weights and states from memory, which takes longer than its
    operations: these are not counted.
    """
    recipe, section = planner.recipe, planner.recipe.refine
    assert section is not None
    machine, a, mixer = planner.machine, planner.architecture, recipe.student.mixer
    share = max(1, section.batch // machine.gpus)
    # A GPU has no more prompts than its share of a step.
    sampled = min(section.sample_batch or MOST_SAMPLED, share)
    inputs = replace(
        planner.training_inputs(section),
        tokens=section.row_tokens,
        online=True,
        shard_teacher=section.shard_teacher,
        top_k=section.top_k,
        sampled=sampled,
    )
    measure = functools.partial(
        refine_memory, prompt=section.prompt_tokens, context=recipe.data.context
    )
    memory = planner.reducing(StageMemory("refine", measure, inputs, section.batch))
    steps, tokens = section.steps(), section.steps() * section.batch * section.row_tokens
    per_token = flops.distill_flops(
        a,
        mixer,
        section.row_tokens,
        recipe.distill.trainable,
        lora_rank=recipe.distill.lora_rank,
        online=True,
    )
    again = flops.recomputed_flops(a, mixer, section.row_tokens) if inputs.checkpointing else 0.0
    again += flops.kept_flops(a, mixer, section.row_tokens)
    # Prompts are read at the speed of computing, and give no loss.
    prompts = (1 - section.off_policy) * section.prompt_tokens / section.row_tokens
    student = flops.student_flops(a, mixer, section.prompt_tokens)
    again += prompts * student.forward(supervised=0)
    seconds = _sampling_seconds(planner, section, share, sampled)
    cost = StageCost(
        "refine",
        name=name,
        tokens=tokens,
        steps=steps,
        flops=tokens * per_token,
        recomputed=tokens * again,
        disk=FP32 * planner.parameters.student,
        scratch=planner.checkpoints(inputs.trained),
        bound=Bound(distill_traffic(memory.inputs, passes_of_step(section, memory.inputs))),
        fit=what_fits(memory, machine.gpu, search=planner.search),
        batch_problem=_sampling_problem(machine) or batch_problem("refine", section, machine.gpus),
        sampling=None if seconds is None else steps * seconds,
    )
    return planner.timed(cost)


def _sampling_seconds(planner: Planner, section: Refine, share: int, sampled: int) -> float | None:
    """Return the seconds in which a GPU decodes its share of a step; None if it is unknown.

    A token of `sampled` rows reads the weights once, and reads and writes the state of every row.
    """
    bandwidth = planner.machine.gpu.bandwidth
    if bandwidth is None:
        return None
    size = DTYPE_BYTES[planner.recipe.teacher.dtype]
    a, mixer = planner.architecture, planner.recipe.student.mixer
    state = student_cache(a, mixer, size)
    # Kept keys are read alone, on average as many as halfway through the answer.
    tokens = section.prompt_tokens + section.new_tokens / 2
    kept = tokens * kept_bytes_per_token(a, mixer, size)
    read = size * planner.parameters.student + sampled * (2 * state + kept)
    passes = math.ceil((1 - section.off_policy) * share / sampled)
    return passes * section.new_tokens * read / (SAMPLING * bandwidth)


def _sampling_problem(machine: Machine) -> Problem | None:
    """Say that nothing samples under DeepSpeed."""
    if not machine.sharding.startswith("zero"):
        return None
    text = f"refine: impossible under DeepSpeed ({machine.sharding}); take FSDP2."
    return Problem(text, (Way({"--sharding": "fsdp2"}),))

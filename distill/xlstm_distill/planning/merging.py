"""Cost the merges: on the host where weights are known; on GPUs where they are found."""

from __future__ import annotations

import functools
from dataclasses import replace

from xlstm_distill.embedded.tasks import TASKS
from xlstm_distill.planning import flops
from xlstm_distill.planning.costs import FP32, Planner, StageCost, longest_answer
from xlstm_distill.planning.fit import StageMemory, what_fits
from xlstm_distill.planning.memory import evaluation_memory, learning_memory
from xlstm_distill.recipe import MergeSettings
from xlstm_distill.recipe.merging import embedded_domains

MERGED_AT_ONCE = 16 * 2**20
"""Numbers that a merge works on: `merging.streaming` has up to 16 threads with a block each."""
MERGE_BYTES, EXPERT_BYTES = 48, 12
"""Bytes of each such number: sums in float64, and of each expert a copy and a difference."""
READS = 4
"""Times that a step of learned weights reads every expert's files (`stages.weights.streamed`)."""


def merge_costs(planner: Planner) -> list[StageCost]:
    """Cost the recipe's merge and its variants."""
    recipe = planner.recipe
    found = [_merge_cost(planner, StageCost("merge"), recipe.merge)]
    for name, merge in recipe.merge.variants.items():
        found.append(_merge_cost(planner, StageCost("variant", name=name), merge))
    return found


def _merge_cost(planner: Planner, cost: StageCost, merge: MergeSettings) -> StageCost:
    """Cost a merge, which holds a few blocks of every expert on the host, whatever the model."""
    bytes_each = MERGE_BYTES + EXPERT_BYTES * len(planner.recipe.distill.experts)
    # A small model has no more numbers than it has.
    memory = min(MERGED_AT_ONCE, planner.parameters.student) * bytes_each
    cost = replace(cost, disk=FP32 * planner.parameters.student, host_memory=memory)
    if merge.found == "tuned":
        return _tuned(planner, cost, merge)
    return _learned(planner, cost, merge) if merge.found == "learned" else cost


def _tuned(planner: Planner, cost: StageCost, merge: MergeSettings) -> StageCost:
    """Count the merges that are scored; hours are unknown, as answers' lengths are."""
    recipe, tuning = planner.recipe, merge.tuning
    batch = recipe.evaluate.batch
    rows = 1 if batch == "auto" else batch
    inputs = replace(planner.memory_inputs(rows), tokens=longest_answer(recipe))
    measure = functools.partial(evaluation_memory, student=True)
    stage = StageMemory("evaluate", measure, inputs, rows, label=cost.label)
    tasks = _validation_tasks(planner, merge)
    items = (tuning.trials + 1) * tasks * tuning.items
    note = (
        f"{cost.label}: scores {tuning.trials} merges and the teacher on {tasks} tasks of "
        f"{tuning.items} items: {items:,} items; a merge reads {_gigabytes(planner)} of experts. "
        "Hours depend on the answers' lengths."
    )
    fit = what_fits(stage, planner.machine.gpu, search=planner.search)
    return replace(cost, steps=tuning.trials, fit=fit, note=note)


def _validation_tasks(planner: Planner, merge: MergeSettings) -> int:
    """Count the tasks that weights are tuned on."""
    if merge.tuning.tasks is not None:
        return len(merge.tuning.tasks)
    domains = embedded_domains(planner.recipe.data)
    generators = {name for names in domains.values() for name in names}
    return sum(task.domain in generators for task in TASKS.values())


def _learned(planner: Planner, cost: StageCost, merge: MergeSettings) -> StageCost:
    """Count the passes: each expert forward on its rows, the merged student over all of them.

    One GPU computes, and the others wait.
    """
    recipe, learning = planner.recipe, merge.learning
    experts, context = len(recipe.distill.experts), recipe.data.context
    tokens = learning.steps * experts * learning.rows * context
    forward = flops.student_flops(planner.architecture, recipe.student.mixer, context)
    # Of each product's backward pass both parts are computed: a weight's gradient is what the
    # coefficients' gradient is made of.
    operations = tokens * (forward.forward() + forward.training())
    again = tokens * forward.forward(supervised=0)
    inputs = planner.memory_inputs(experts * learning.rows)
    measure = functools.partial(learning_memory, experts=experts)
    stage = StageMemory("merge", measure, inputs, 1, label=cost.label)
    note = (
        f"{cost.label}: {learning.steps} steps on one GPU, of which each reads {READS} x "
        f"{_gigabytes(planner)} of experts, at best from the page cache; its hours are those of "
        "computing alone."
    )
    alone = replace(planner, machine=replace(planner.machine, gpus=1, sharding="none"))
    timed = alone.timed(
        replace(
            cost,
            steps=learning.steps,
            tokens=tokens,
            flops=operations,
            recomputed=again,
            fit=what_fits(stage, planner.machine.gpu, search=False),
            note=note,
        )
    )
    waiting = planner.machine.gpus
    gpu_hours = None if timed.gpu_hours is None else waiting * timed.gpu_hours
    price = None if timed.cost is None else waiting * timed.cost
    return replace(timed, gpu_hours=gpu_hours, cost=price)


def _gigabytes(planner: Planner) -> str:
    """Write the bytes of all experts."""
    experts = len(planner.recipe.distill.experts)
    return f"{experts * FP32 * planner.parameters.student / 1e9:,.0f} GB"

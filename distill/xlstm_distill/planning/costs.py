"""Cost one stage of a recipe: tokens, operations, memory, disk, time and price."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from xlstm_distill.data.budget import captured_rows, rows_needed
from xlstm_distill.planning import flops
from xlstm_distill.planning.architecture import Architecture, Parameters, count_parameters
from xlstm_distill.planning.communication import Bound, align_traffic, distill_traffic
from xlstm_distill.planning.fit import Fit, Problem, StageMemory, Way, what_fits
from xlstm_distill.planning.inputs import DTYPE_BYTES, MemoryInputs
from xlstm_distill.planning.machine import Machine, Utilisation, utilisation
from xlstm_distill.planning.memory import (
    ANSWER_TOKENS,
    PROMPT_TOKENS,
    Memory,
    align_memory,
    capture_memory,
    distill_memory,
    evaluation_memory,
)
from xlstm_distill.recipe import Optimization, Recipe
from xlstm_distill.recipe.problems import nearest_batches

SMALL_VOCABULARY = 2**16
"""In packed rows, token ids of a vocabulary up to this take 2 bytes, others 4."""
MASK_BYTES = 1 / 8
"""One bit per token of a packed row says whether it is supervised."""
MARGIN = 0.9
"""As `training.reduction`: the share of a GPU's memory that whole gradients may fill."""
CHECKPOINT_BYTES = 12
"""Bytes of a trained parameter in a checkpoint: fp32 weight and two moments."""
FP32 = 4.0


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage, or of one expert of stage II."""

    stage: str
    name: str | None = None
    tokens: int | None = None
    steps: int | None = None
    flops: float | None = None
    """Model FLOPs, recomputation not counted."""
    recomputed: float = 0.0
    disk: float = 0.0
    """Bytes of what the stage publishes."""
    scratch: float = 0.0
    """Bytes of its checkpoints while it trains."""
    host_memory: float | None = None
    utilisation: Utilisation | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    fit: Fit | None = None
    bound: Bound | None = None
    """What a step sends, and whether that takes longer than computing."""
    sampling: float | None = 0.0
    """Seconds in which tokens are decoded one by one; None where the GPU is not known."""
    note: str | None = None
    """What the table cannot show."""
    batch_problem: Problem | None = None
    """The batch cannot be shared evenly by the GPUs."""

    @property
    def label(self) -> str:
        """`stage` or `stage/name`."""
        return self.stage if self.name is None else f"{self.stage}/{self.name}"

    @property
    def memory(self) -> Memory | None:
        """Memory per GPU at the peak."""
        return self.fit.memory if self.fit else None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What keeps the stage from running as planned."""
        found = (self.batch_problem, self.fit.problem if self.fit else None)
        return tuple(problem for problem in found if problem is not None)


@dataclass(frozen=True)
class Planner:
    """What the costs of all stages are computed from."""

    recipe: Recipe
    architecture: Architecture
    machine: Machine
    target_bytes: Mapping[str, float]
    """Bytes per token of stored targets, by domain."""
    search: bool = True
    """Whether to look for settings with which a stage fits that does not."""

    @property
    def parameters(self) -> Parameters:
        """Parameters of teacher and student."""
        return count_parameters(self.architecture, self.recipe.student.mixer)

    def memory_inputs(self, rows: int, *, accumulates: bool = False) -> MemoryInputs:
        """Return what memory depends on, for passes of `rows` rows."""
        recipe, machine = self.recipe, self.machine
        return MemoryInputs(
            architecture=self.architecture,
            mixer=recipe.student.mixer,
            teacher_dtype=recipe.teacher.dtype,
            gpus=machine.gpus,
            sharding=machine.sharding,
            rows=rows,
            tokens=recipe.data.context,
            accumulates=accumulates,
            checkpointing=False,
            backend=machine.backend,
            online=recipe.capture.targets == "online",
            shard_teacher=recipe.capture.shard_teacher,
            top_k=recipe.capture.top_k,
            trainable=recipe.distill.trainable,
            lora_rank=recipe.distill.lora_rank,
            node=machine.node,
        )

    def training_inputs(self, section: Optimization) -> MemoryInputs:
        """Return what a training's memory depends on; rows are those of its largest pass."""
        share = max(1, section.batch // self.machine.gpus)
        # The last micro-batch of a share may be smaller than the others, as in the training loop.
        rows = min(section.micro_batch or share, share)
        inputs = self.memory_inputs(rows, accumulates=share > rows)
        return replace(
            inputs,
            waits=self.recipe.training.reduce == "last",
            checkpointing=section.activation_checkpointing,
        )

    def reducing(self, stage: StageMemory) -> StageMemory:
        """Return a training with whole gradients, where `training.reduce: auto` would choose that.

        It does so where they fit into the memory that may be planned with.
        """
        waiting = replace(stage, inputs=replace(stage.inputs, waits=True))
        sharded = stage.inputs.sharding in ("fsdp2", "hsdp") and stage.inputs.accumulates
        if not sharded or self.recipe.training.reduce != "auto":
            return stage
        fits = waiting.memory(waiting.inputs).total <= MARGIN * self.machine.gpu.memory
        return waiting if fits else stage

    def checkpoints(self, trained: int) -> float:
        """Return the disk for a training's checkpoints, the one being written included."""
        settings = self.recipe.training
        if settings.checkpoint_steps is None:
            return 0.0
        return CHECKPOINT_BYTES * trained * (settings.keep_checkpoints + 1)

    def timed(self, cost: StageCost) -> StageCost:
        """Add hours, GPU-hours and price to a stage whose operations are known.

        They stay unknown where the GPU's rate is.
        """
        assert cost.flops is not None
        machine = self.machine
        peak = machine.gpu.fp32 if self.recipe.teacher.dtype == "float32" else machine.gpu.bf16
        if peak is None:
            return cost
        assumed = utilisation(cost.stage, machine.backend, machine.mfu)
        rate = machine.gpus * peak * assumed.share
        # Recomputed work takes time, although it does not count in the MFU.
        hours = (cost.flops + cost.recomputed) / rate / 3600
        sampling = cost.sampling
        if sampling is None:
            return cost
        steps = cost.steps
        if cost.bound is not None and steps:
            bound = self._timed_bound(cost.bound, 3600 * hours / steps)
            cost = replace(cost, bound=bound)
            if bound.by_communication and bound.communication is not None:
                hours = steps * bound.communication / 3600
        hours += sampling / 3600
        gpu_hours = hours * machine.gpus
        price = None if machine.price is None else gpu_hours * machine.price
        return replace(cost, utilisation=assumed, hours=hours, gpu_hours=gpu_hours, cost=price)

    def _timed_bound(self, bound: Bound, compute: float) -> Bound:
        links = self.machine.gpu.links
        sent = None if links is None else bound.traffic.seconds(links, self.machine.node)
        return replace(bound, compute=compute, communication=sent)


def data_cost(planner: Planner) -> StageCost:
    """Cost the packed rows of all domains."""
    recipe = planner.recipe
    rows = sum(rows_needed(recipe, domain) for domain in recipe.data.domains)
    tokens = rows * recipe.data.context
    id_bytes = 2 if planner.architecture.vocabulary <= SMALL_VOCABULARY else 4
    # No hours: tokenisation runs on the CPU, at a speed that depends on the text.
    return StageCost("data", tokens=tokens, disk=tokens * (id_bytes + MASK_BYTES))


def capture_cost(planner: Planner) -> StageCost:
    """Cost the teacher's stored targets."""
    recipe, context = planner.recipe, planner.recipe.data.context
    tokens = {domain: rows * context for domain, rows in captured_rows(recipe).items()}
    rows = recipe.capture.batch
    memory = StageMemory("capture", capture_memory, planner.memory_inputs(rows), rows)
    per_token = flops.teacher_flops(planner.architecture, context).forward()
    total = sum(tokens.values())
    cost = StageCost(
        "capture",
        tokens=total,
        flops=total * per_token,
        disk=sum(count * planner.target_bytes[domain] for domain, count in tokens.items()),
        fit=what_fits(memory, planner.machine.gpu, search=planner.search),
    )
    return planner.timed(cost)


def align_cost(planner: Planner) -> StageCost:
    """Cost stage I, and the conversion before it."""
    recipe, section, context = planner.recipe, planner.recipe.align, planner.recipe.data.context
    student = DTYPE_BYTES[recipe.teacher.dtype] * planner.parameters.student
    if not planner.parameters.new:
        # Nothing to train (a mixer of the window alone): the student is only converted.
        return StageCost("align", disk=student)
    inputs = planner.training_inputs(section)
    memory = planner.reducing(StageMemory("align", align_memory, inputs, section.batch))
    steps, tokens = _steps(section, section.tokens, context)
    a, mixer = planner.architecture, recipe.student.mixer
    again = flops.align_recomputed_flops(a, mixer, context) if inputs.checkpointing else 0.0
    cost = StageCost(
        "align",
        tokens=tokens,
        steps=steps,
        flops=tokens * flops.align_flops(a, mixer, context),
        recomputed=tokens * again,
        disk=student,
        scratch=planner.checkpoints(planner.parameters.new),
        bound=Bound(align_traffic(memory.inputs, passes_of_step(section, memory.inputs))),
        fit=what_fits(memory, planner.machine.gpu, search=planner.search),
        batch_problem=batch_problem("align", section, planner.machine.gpus),
    )
    return planner.timed(cost)


def expert_cost(planner: Planner, name: str) -> StageCost:
    """Cost stage II of one expert."""
    recipe, section, context = planner.recipe, planner.recipe.distill, planner.recipe.data.context
    a, mixer, inputs = planner.architecture, recipe.student.mixer, planner.training_inputs(section)
    memory = planner.reducing(StageMemory("distill", distill_memory, inputs, section.batch))
    steps, tokens = 0, 0
    # Each phase rounds its own tokens up to whole steps.
    for phase in section.experts[name].phases:
        phase_steps, phase_tokens = _steps(section, phase.tokens, context)
        steps += phase_steps
        tokens += phase_tokens
    per_token = flops.distill_flops(
        a,
        mixer,
        context,
        section.trainable,
        lora_rank=section.lora_rank,
        online=inputs.online,
    )
    again = flops.recomputed_flops(a, mixer, context) if inputs.checkpointing else 0.0
    again += flops.kept_flops(a, mixer, context)
    cost = StageCost(
        "distill",
        name=name,
        tokens=tokens,
        steps=steps,
        flops=tokens * per_token,
        recomputed=tokens * again,
        disk=FP32 * planner.parameters.student,
        scratch=planner.checkpoints(inputs.trained),
        bound=Bound(distill_traffic(memory.inputs, passes_of_step(section, memory.inputs))),
        fit=what_fits(memory, planner.machine.gpu, search=planner.search),
        batch_problem=batch_problem("distill", section, planner.machine.gpus),
    )
    return planner.timed(cost)


def evaluation_cost(planner: Planner, *, student: bool) -> StageCost:
    """Cost an evaluation: memory alone, because hours depend on how long the answers are."""
    batch = planner.recipe.evaluate.batch
    # The evaluation itself looks for the number that fits: one row must.
    rows = 1 if batch == "auto" else batch
    name = "student" if student else "teacher"
    memory = functools.partial(evaluation_memory, student=student)
    # By its tasks, and not by `data.context`, which packed rows alone have.
    inputs = replace(planner.memory_inputs(rows), tokens=longest_answer(planner.recipe))
    stage = StageMemory("evaluate", memory, inputs, rows, label=f"evaluate/{name}")
    return StageCost(
        "evaluate", name, fit=what_fits(stage, planner.machine.gpu, search=planner.search)
    )


def longest_answer(recipe: Recipe) -> int:
    """Return the tokens of a prompt and its answer, at most."""
    answers = [task.max_gen_tokens or ANSWER_TOKENS for task in recipe.evaluate.tasks]
    return PROMPT_TOKENS + max(answers, default=ANSWER_TOKENS)


def batch_problem(name: str, section: Optimization, gpus: int) -> Problem | None:
    """Say that the GPUs cannot share a batch evenly."""
    if section.batch % gpus == 0:
        return None
    near = nearest_batches(section.batch, gpus)
    text = f"{name}.batch: {section.batch} rows cannot be shared by {gpus} GPUs; "
    text += f"take {near}, or other GPUs."
    # The batch must be a multiple of micro_batch too.
    unit = math.lcm(gpus, section.micro_batch or 1)
    batch = max(unit, section.batch // unit * unit)
    return Problem(text, (Way({f"{name}.batch": batch}),))


def passes_of_step(section: Optimization, inputs: MemoryInputs) -> int:
    """Return the passes of a GPU in an optimiser step."""
    return math.ceil(max(1, section.batch // inputs.gpus) / inputs.rows)


def _steps(section: Optimization, tokens: int, context: int) -> tuple[int, int]:
    """Return the optimiser steps, and the tokens they really read."""
    steps = math.ceil(tokens / (section.batch * context))
    return steps, steps * section.batch * context

"""What a recipe takes before it is run: tokens, operations, memory, disk, time and cost of every stage, and what would
make a stage fit that does not (docs/planning.md)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from xlstm_distill.artifacts import Run
from xlstm_distill.data.budget import captured_rows, rows_needed
from xlstm_distill.errors import UserError
from xlstm_distill.planning import flops
from xlstm_distill.planning.architecture import (
    Architecture,
    Parameters,
    count_parameters,
    find_architecture,
)
from xlstm_distill.planning.fit import Fit, Stage, what_fits
from xlstm_distill.planning.machine import Machine, Utilisation, utilisation
from xlstm_distill.planning.memory import (
    DTYPE_BYTES,
    Memory,
    Setup,
    align_memory,
    capture_memory,
    distill_memory,
    evaluation_memory,
)
from xlstm_distill.recipe import Optimization, Recipe
from xlstm_distill.recipe.problems import nearest_batches

SMALL_VOCABULARY = 2**16
"""Token ids of a vocabulary up to this take 2 bytes in a packed row, others 4; the mask of supervised tokens 1 bit."""
CHECKPOINT_BYTES = 12
"""A trained parameter in a checkpoint: fp32 weight and two moments."""
TARGET_BYTES = 160.0
"""Stored targets per token, where no run has measured them: the store's goal with adaptive k (`capture.mass`)."""
KEPT_BYTES = 2.0
"""Stored bytes of a kept token without it (docs/targets.md: 510 for 256 of a vocabulary of 128,256)."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, or one expert of stage II."""

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
    problems: tuple[str, ...] = ()
    """What keeps it from running so: memory, or a batch that cannot be shared."""

    @property
    def label(self) -> str:
        """`stage` or `stage/name`."""
        return self.stage if self.name is None else f"{self.stage}/{self.name}"

    @property
    def memory(self) -> Memory | None:
        """Memory per GPU at the peak."""
        return self.fit.memory if self.fit else None


@dataclass(frozen=True)
class Plan:
    """A recipe on a machine."""

    recipe: str
    teacher: str
    checkpointing: bool
    """Whether stage II computes activations again."""
    architecture: Architecture
    parameters: Parameters
    machine: Machine
    target_bytes: Mapping[str, float]
    """Bytes per token of stored targets, by domain."""
    measured: bool
    """Whether a run has measured them."""
    stages: tuple[StagePlan, ...]

    @property
    def problems(self) -> list[str]:
        """All that keeps the recipe from running so, each once."""
        return list(dict.fromkeys(problem for stage in self.stages for problem in stage.problems))


@dataclass(frozen=True)
class _Planner:
    """What all stages are planned from."""

    recipe: Recipe
    architecture: Architecture
    machine: Machine
    target_bytes: Mapping[str, float]

    @property
    def parameters(self) -> Parameters:
        return count_parameters(self.architecture, self.recipe.student.mixer)

    def setup(self, section: Optimization | None = None, **changes: object) -> Setup:
        """The memory model's view of a stage; rows are those of one pass of one GPU."""
        rows, passes = _rows(section, self.machine.gpus) if section else (1, 1)
        recipe, machine = self.recipe, self.machine
        plain = Setup(
            self.architecture,
            recipe.student.mixer,
            recipe.teacher.dtype,
            machine.gpus,
            machine.sharding,
            rows,
            recipe.data.context,
            passes > 1,
            recipe.distill.activation_checkpointing,
            machine.backend,
            online=recipe.capture.targets == "online",
            top_k=recipe.capture.top_k,
            trainable=recipe.distill.trainable,
            lora_rank=recipe.distill.lora_rank,
        )
        return replace(plain, **changes)  # type: ignore[arg-type]

    def checkpoints(self, trained: int) -> float:
        """Disk for the checkpoints of a training, the one being written included."""
        settings = self.recipe.training
        return (
            0.0
            if settings.checkpoint_steps is None
            else CHECKPOINT_BYTES * trained * (settings.keep_checkpoints + 1)
        )

    def timed(self, plan: StagePlan) -> StagePlan:
        """Add hours, GPU-hours and cost to a stage whose operations are known."""
        assert plan.flops is not None
        machine = self.machine
        peak = machine.gpu.bf16 if self.recipe.teacher.dtype != "float32" else machine.gpu.fp32
        assumed = utilisation(plan.stage, machine.backend, machine.mfu)
        hours = (plan.flops + plan.recomputed) / (machine.gpus * peak * assumed.share) / 3600
        gpu_hours = hours * machine.gpus
        cost = None if machine.price is None else gpu_hours * machine.price
        return replace(plan, utilisation=assumed, hours=hours, gpu_hours=gpu_hours, cost=cost)


def plan_recipe(
    recipe: Recipe,
    folder: Path,
    machine: Machine,
    *,
    config: Path | None = None,
    run: Path | None = None,
) -> Plan:
    """Plan a recipe that lies in `folder`; `config` is the teacher's config.json, `run` a run with stored targets.

    Raises:
        UserError: the teacher's architecture is not known here, or the run cannot be read.
    """
    architecture = find_architecture(recipe, folder, config)
    return make_plan(
        recipe, architecture, machine, measured_target_bytes(run, recipe) if run else None
    )


def make_plan(
    recipe: Recipe,
    architecture: Architecture,
    machine: Machine,
    measured: Mapping[str, float] | None = None,
) -> Plan:
    """Plan every stage of a recipe; `measured` are bytes per token of stored targets by domain, from a run."""
    all_kept = KEPT_BYTES * recipe.capture.top_k
    assumed = all_kept if recipe.capture.mass is None else min(TARGET_BYTES, all_kept)
    per_token = dict.fromkeys(recipe.data.domains, assumed) | dict(measured or {})
    planner = _Planner(recipe, architecture, machine, per_token)
    stages = [_data(planner)]
    if recipe.capture.targets == "stored":
        stages.append(_capture(planner))
    stages.append(_align(planner))
    stages += [_expert(planner, name) for name in recipe.distill.experts]
    stages += [_merge(planner), _evaluate(planner, student=False), _evaluate(planner, student=True)]
    return Plan(
        recipe=recipe.name,
        teacher=recipe.teacher.path,
        checkpointing=recipe.distill.activation_checkpointing,
        architecture=architecture,
        parameters=planner.parameters,
        machine=machine,
        target_bytes=per_token,
        measured=bool(measured),
        stages=tuple(stages),
    )


def _rows(section: Optimization, gpus: int) -> tuple[int, int]:
    """Rows of the largest pass, and passes of a step, as the training loop divides a batch."""
    share = max(1, section.batch // gpus)
    rows = min(section.micro_batch or share, share)
    return rows, math.ceil(share / rows)


def _batch_problems(name: str, section: Optimization, gpus: int) -> tuple[str, ...]:
    """What keeps a batch from being shared evenly. The last micro-batch of a share may be smaller than the others."""
    if section.batch % gpus == 0:
        return ()
    near = nearest_batches(section.batch, gpus)
    return (
        f"{name}.batch: {section.batch} rows cannot be shared by {gpus} GPUs; take {near}, or other GPUs.",
    )


def _data(planner: _Planner) -> StagePlan:
    recipe = planner.recipe
    tokens = (
        sum(rows_needed(recipe, domain) for domain in recipe.data.domains) * recipe.data.context
    )
    size = 2 if planner.architecture.vocabulary <= SMALL_VOCABULARY else 4
    return StagePlan("data", tokens=tokens, disk=tokens * (size + 1 / 8))


def _capture(planner: _Planner) -> StagePlan:
    recipe, a = planner.recipe, planner.architecture
    tokens = {domain: rows * recipe.data.context for domain, rows in captured_rows(recipe).items()}
    total = sum(tokens.values())
    rows = recipe.capture.batch
    fit = what_fits(
        Stage("capture", capture_memory, planner.setup(rows=rows), rows), planner.machine.gpu
    )
    plan = StagePlan(
        "capture",
        tokens=total,
        flops=total * flops.teacher_flops(a, recipe.data.context).forward(),
        disk=sum(count * planner.target_bytes[domain] for domain, count in tokens.items()),
        fit=fit,
        problems=fit.problems,
    )
    return planner.timed(plan)


def _align(planner: _Planner) -> StagePlan:
    recipe, section = planner.recipe, planner.recipe.align
    size = DTYPE_BYTES[recipe.teacher.dtype] * planner.parameters.student
    if not planner.parameters.new:
        return StagePlan("align", disk=size)  # converted, and that is all
    fit = what_fits(
        Stage("align", align_memory, planner.setup(section), section.batch), planner.machine.gpu
    )
    steps, tokens = _steps(section, section.tokens, recipe.data.context)
    plan = StagePlan(
        "align",
        tokens=tokens,
        steps=steps,
        flops=tokens
        * flops.align_flops(planner.architecture, recipe.student.mixer, recipe.data.context),
        disk=size,
        scratch=planner.checkpoints(planner.parameters.new),
        fit=fit,
        problems=(*_batch_problems("align", section, planner.machine.gpus), *fit.problems),
    )
    return planner.timed(plan)


def _expert(planner: _Planner, name: str) -> StagePlan:
    recipe, section, context = planner.recipe, planner.recipe.distill, planner.recipe.data.context
    mixer, setup = recipe.student.mixer, planner.setup(section)
    fit = what_fits(Stage("distill", distill_memory, setup, section.batch), planner.machine.gpu)
    counts = [_steps(section, phase.tokens, context) for phase in section.experts[name].phases]
    steps, tokens = (sum(column) for column in zip(*counts, strict=True))
    per_token = flops.distill_flops(
        planner.architecture,
        mixer,
        context,
        section.trainable,
        lora_rank=section.lora_rank,
        online=setup.online,
    )
    again = (
        flops.recomputed_flops(planner.architecture, mixer, context) if setup.checkpointing else 0.0
    )
    plan = StagePlan(
        "distill",
        name=name,
        tokens=tokens,
        steps=steps,
        flops=tokens * per_token,
        recomputed=tokens * again,
        disk=4.0 * planner.parameters.student,
        scratch=planner.checkpoints(setup.trained),
        fit=fit,
        problems=(*_batch_problems("distill", section, planner.machine.gpus), *fit.problems),
    )
    return planner.timed(plan)


def _merge(planner: _Planner) -> StagePlan:
    """The merge runs on the host: every expert and the merged student at once, in fp32."""
    experts, student = len(planner.recipe.distill.experts), 4.0 * planner.parameters.student
    return StagePlan("merge", disk=student, host_memory=(experts + 1) * student)


def _evaluate(planner: _Planner, *, student: bool) -> StagePlan:
    """Memory alone: hours depend on how long the answers are."""
    rows = planner.recipe.evaluate.batch
    name = "student" if student else "teacher"
    memory = functools.partial(evaluation_memory, student=student)
    stage = Stage("evaluate", memory, planner.setup(rows=rows), rows, f"evaluate/{name}")
    fit = what_fits(stage, planner.machine.gpu)
    return StagePlan("evaluate", name, fit=fit, problems=fit.problems)


def _steps(section: Optimization, tokens: int, context: int) -> tuple[int, int]:
    """Optimiser steps, and the tokens they really read."""
    steps = math.ceil(tokens / (section.batch * context))
    return steps, steps * section.batch * context


def measured_target_bytes(run: Path, recipe: Recipe) -> dict[str, float]:
    """Bytes per token of the targets that a run has stored, by domain; empty where it has stored none.

    Raises:
        UserError: there is no such run, or a manifest is damaged.
    """
    if not run.is_dir():
        raise UserError(f"--run: {run} is no directory; give a run's.")
    found = {}
    for domain in recipe.data.domains:
        artifact = Run(run, recipe).load(f"capture/{domain}")
        if artifact is not None and "bytes_per_token" in artifact.manifest.get("results", {}):
            found[domain] = float(artifact.manifest["results"]["bytes_per_token"])
    return found

"""Plan a recipe before it runs: the cost of every stage, and changes that make it fit.

docs/planning.md explains the figures and says what they were checked against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts import Run
from xlstm_distill.errors import UserError
from xlstm_distill.planning.architecture import (
    Architecture,
    Parameters,
    check_kept_attention,
    find_architecture,
)
from xlstm_distill.planning.costs import (
    Planner,
    StageCost,
    align_cost,
    capture_cost,
    data_cost,
    evaluation_cost,
    expert_cost,
)
from xlstm_distill.planning.fit import MOST_GPUS, Value
from xlstm_distill.planning.inputs import DTYPE_BYTES, Sharding
from xlstm_distill.planning.machine import GPUS, Machine
from xlstm_distill.planning.memory import kept_bytes_per_token, student_cache
from xlstm_distill.planning.merging import merge_costs
from xlstm_distill.planning.refining import refine_cost
from xlstm_distill.recipe import Recipe

TARGET_BYTES = 160.0
"""Stored targets per token, where no run has measured them: the goal of adaptive k."""
KEPT_BYTES = 2.0
"""Stored bytes of a kept token without adaptive k (docs/targets.md: 510 for 256 of 128,256)."""
COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried."""
MOST_ROUNDS = 16
"""Problems that are solved one after the other, at most, to find changes that make all fit."""


@dataclass(frozen=True)
class CostPlan:
    """What a recipe costs on a machine."""

    recipe: str
    teacher: str
    checkpointing: tuple[str, ...]
    """Stages that compute activations again."""
    architecture: Architecture
    parameters: Parameters
    machine: Machine
    target_bytes: Mapping[str, float]
    """Bytes per token of stored targets, by domain."""
    measured: bool
    """Whether a run has measured them."""
    stages: tuple[StageCost, ...]
    state_bytes: int = 0
    """What the student's decoding holds for a sequence of any length."""
    bytes_per_token: int = 0
    """What each token adds to that, where heads keep full attention."""
    teacher_bytes_per_token: int = 0
    """What each token adds to the teacher's cache, where its layers have no window."""
    changes: Mapping[str, Value] | None = None
    """Settings with which every stage fits: empty where all do, None where none were found."""
    smallest: tuple[tuple[int, str], ...] = ()
    """Where a stage does not fit: the GPUs on which the recipe runs as it is (count and name), the
    smallest GPU first, each later one for fewer of a larger GPU."""

    @property
    def problems(self) -> list[str]:
        """What keeps the recipe from running as planned, each problem once."""
        texts = [problem.text for stage in self.stages for problem in stage.problems]
        return list(dict.fromkeys(texts))


def plan_recipe(
    recipe: Recipe,
    folder: Path,
    machine: Machine,
    *,
    config: Path | None = None,
    run: Path | None = None,
) -> CostPlan:
    """Plan a recipe that lies in `folder`.

    `config` is the teacher's config.json. `run` is a run whose stored targets give their size.

    Raises:
        UserError: the teacher's architecture is not known here, it has no such layers or heads to
            keep, or the run cannot be read.
    """
    architecture = find_architecture(recipe, folder, config)
    check_kept_attention(recipe.student.mixer, architecture)
    measured = measured_target_bytes(run, recipe) if run else {}
    plan = make_plan(recipe, architecture, machine, measured)
    changes = changes_that_fit(recipe, architecture, machine, measured)
    smallest = smallest_machines(recipe, architecture, machine) if plan.problems else ()
    return replace(plan, changes=changes, smallest=smallest)


def make_plan(
    recipe: Recipe,
    architecture: Architecture,
    machine: Machine,
    measured: Mapping[str, float],
    *,
    search: bool = True,
) -> CostPlan:
    """Cost every stage; `measured`: bytes per token of stored targets by domain, from a run.

    `search`: whether to look for settings with which a stage fits that does not.
    """
    all_kept = KEPT_BYTES * recipe.capture.top_k
    assumed = all_kept if recipe.capture.mass is None else min(TARGET_BYTES, all_kept)
    target_bytes = dict.fromkeys(recipe.data.domains, assumed) | dict(measured)
    planner = Planner(recipe, architecture, machine, target_bytes, search)
    stages = [data_cost(planner)]
    if recipe.capture.targets == "stored":
        stages.append(capture_cost(planner))
    stages.append(align_cost(planner))
    stages += [expert_cost(planner, name) for name in recipe.distill.experts]
    if recipe.refine is not None:
        refined = recipe.refine.refined(recipe.distill)
        stages += [refine_cost(planner, name) for name in refined]
    stages += merge_costs(planner)
    stages += [evaluation_cost(planner, student=student) for student in (False, True)]
    mixer, size = recipe.student.mixer, DTYPE_BYTES[recipe.teacher.dtype]
    return CostPlan(
        recipe=recipe.name,
        teacher=recipe.teacher.path,
        checkpointing=tuple(
            name
            for name, section in (
                ("align", recipe.align),
                ("distill", recipe.distill),
                ("refine", recipe.refine),
            )
            if section is not None and section.activation_checkpointing
        ),
        architecture=architecture,
        parameters=planner.parameters,
        machine=machine,
        target_bytes=target_bytes,
        measured=bool(measured),
        stages=tuple(stages),
        state_bytes=int(student_cache(architecture, mixer, size)),
        bytes_per_token=kept_bytes_per_token(architecture, mixer, size),
        teacher_bytes_per_token=2
        * size
        * architecture.key_width
        * architecture.reaches.count(None),
    )


def smallest_machines(
    recipe: Recipe, architecture: Architecture, machine: Machine
) -> tuple[tuple[int, str], ...]:
    """Find the fewest GPUs of each kind on which the recipe runs as it is, by rising memory."""
    found: list[tuple[int, str]] = []
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory):
        # More of a larger GPU than of a smaller one would be no news.
        most = found[-1][0] // 2 if found else MOST_GPUS
        for count in filter(lambda count: count <= most, COUNTS):
            several: Sharding = (
                "fsdp2" if machine.sharding in ("none", "hsdp") else machine.sharding
            )
            sharding: Sharding = "none" if count == 1 else several
            on = replace(machine, gpu=gpu, gpus=count, sharding=sharding)
            if not make_plan(recipe, architecture, on, {}, search=False).problems:
                found.append((count, gpu.name))
                break
    return tuple(found)


def changes_that_fit(
    recipe: Recipe,
    architecture: Architecture,
    machine: Machine,
    measured: Mapping[str, float],
) -> dict[str, Value] | None:
    """Find settings with which every stage fits; None where none were found.

    A way out of one stage's problem can make another (more GPUs must share every batch; stored
    targets need a capture). So this solves the first problem, plans again, and goes on.
    """
    changes: dict[str, Value] = {}
    for _ in range(MOST_ROUNDS):
        changed, on = apply_changes(recipe, machine, changes)
        plan = make_plan(changed, architecture, on, measured)
        problems = [problem for stage in plan.stages for problem in stage.problems]
        if not problems:
            return changes
        if not problems[0].ways:
            return None
        # A later way may set the same key again: what it found is for the plan as changed.
        changes |= problems[0].ways[0].settings
    return None


def apply_changes(
    recipe: Recipe, machine: Machine, changes: Mapping[str, Value]
) -> tuple[Recipe, Machine]:
    """Return the recipe and the machine with changes: recipe keys, `--gpus` and `--sharding`."""
    # Validated anew, so that no change is named which a recipe would refuse.
    values = recipe.model_dump(mode="json")
    options: dict[str, Any] = {}
    for key, value in changes.items():
        if key.startswith("--"):
            options[key.removeprefix("--")] = value
        else:
            section, field = key.split(".")
            values[section][field] = value
    return Recipe.model_validate(values), replace(machine, **options)


def measured_target_bytes(run: Path, recipe: Recipe) -> dict[str, float]:
    """Read the bytes per token of a run's stored targets, by domain; empty where it has none.

    Raises:
        UserError: there is no such run, or a manifest is damaged.
    """
    if not run.is_dir():
        raise UserError(f"--run: {run} is no directory; give a run's.")
    found = {}
    for domain in recipe.data.domains:
        artifact = Run(run, recipe).load(f"capture/{domain}")
        results = {} if artifact is None else artifact.manifest.get("results", {})
        if "bytes_per_token" in results:
            found[domain] = float(results["bytes_per_token"])
    return found

"""Align: teach each mixer to reproduce its teacher layer's heads (stage I; paper, Eq. 12)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.student import convert
from xlstm_distill.models.teacher import download_teacher, load_teacher
from xlstm_distill.planning.flops import align_flops
from xlstm_distill.planning.inputs import DTYPE_BYTES
from xlstm_distill.planning.memory import kept_bytes_per_token
from xlstm_distill.runtime.console import Console
from xlstm_distill.stages.kernels import choose_kernels
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.workbench import (
    architecture_of,
    keep_training,
    kept_line,
    open_domains,
    save_model,
)
from xlstm_distill.training.accelerator import full_state_dict, make_accelerator
from xlstm_distill.training.log import check_trackers
from xlstm_distill.training.objectives import AlignObjective
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer


def align(lineage: Lineage, run: Run, console: Console) -> Artifact:
    """Convert the teacher and align the new parameters: the seed weights θ(0) of every expert."""
    check_trackers(lineage.recipe.training.trackers)
    request = lineage.request("align")
    # Whoever finds the artifact does not need the rows.
    data = (
        {} if run.has(request) else prepare_rows(lineage, run, lineage.aligned_domains(), console)
    )

    def build(draft: Draft) -> None:
        _align(lineage, run, data, draft, console)

    return run.make(request, build, together=True, console=console)


def _align(
    lineage: Lineage, run: Run, data: Mapping[str, Artifact], draft: Draft, console: Console
) -> None:
    recipe = lineage.recipe
    accelerator = make_accelerator(recipe)
    # Before `convert`, which draws feature maps: all ranks must begin with the same ones.
    torch.manual_seed(recipe.seed)
    # Both hold the same tensors: only the new parameters train, so one copy of the rest is enough.
    download_teacher(recipe.teacher)
    teacher = load_teacher(recipe.teacher, accelerator.device)
    student = convert(teacher, recipe.student.mixer, share_weights=True)
    if kept := kept_line(student):
        number = DTYPE_BYTES[recipe.teacher.dtype]
        grows = kept_bytes_per_token(architecture_of(teacher), recipe.student.mixer, number)
        console.line(f"align: {kept} ({grows:,} bytes a token); nothing is aligned there")
        draft.results["kept_attention"] = f"{kept}: {grows:,} bytes of cache for each token"
    if not any(student.new_parameters()):
        # An ablation: the window branch alone has nothing to learn here.
        branches = list(recipe.student.mixer.branches)
        console.line(f"align: no new parameters to align with branches {branches}")
        if accelerator.is_main_process:
            save_model(student, lineage.tokenizer, draft.path / "model")
        return
    for _, parameter in student.new_parameters():
        parameter.data = parameter.data.float()  # small steps would be lost in bf16
    work = run.work_directory(lineage.request("align"))
    draft.results["backend"] = choose_kernels(
        student,
        recipe,
        accelerator.device,
        work,
        console,
        precision=accelerator.mixed_precision,
    )
    domains = open_domains(recipe, data, lineage.aligned_rows())
    plan = _plan(lineage, teacher, domains)
    objective = AlignObjective(student, teacher)
    if recipe.align.activation_checkpointing:
        objective.checkpoint_activations()
    result = Trainer(objective, plan, domains, work, accelerator, console).run()
    keep_training(draft, work, plan, result)
    # A collective under sharding: all ranks gather, then rank 0 writes.
    trained = objective.folded(full_state_dict(accelerator, student))
    if accelerator.is_main_process:
        save_model(student, lineage.tokenizer, draft.path / "model", trained)
    # Relative to the teacher's power: a squared error alone says nothing across models.
    before, after = (held.get("relative_error", math.nan) for held in (result.before, result.after))
    console.line(f"align: held-out relative error {before:.3f} -> {after:.3f}")


def _plan(lineage: Lineage, teacher: CausalLM, domains: Mapping[str, DomainRows]) -> TrainingPlan:
    """One stretch over all domains that alignment reads."""
    recipe, settings = lineage.recipe, lineage.recipe.align
    tokens_per_step = settings.batch * recipe.data.context
    # Rounded up to whole steps, as the row budget is (`data.budget`).
    steps = math.ceil(settings.tokens / tokens_per_step)
    schedule = RowSchedule(domains, lineage.aligned_domains(), recipe.seed, steps * settings.batch)
    flops = align_flops(architecture_of(teacher), recipe.student.mixer, recipe.data.context)
    stretch = Stretch(schedule, steps, settings.lr)
    return TrainingPlan("align", (stretch,), settings, recipe.training, flops)

"""Align: teach each mixer to reproduce its teacher layer's heads (stage I; paper, Eq. 12)."""

from __future__ import annotations

import math

import torch

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.models.student import convert
from xlstm_distill.models.teacher import load_teacher, load_tokenizer
from xlstm_distill.planning.flops import align_flops
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.stages.workbench import (
    align_request,
    align_rows,
    aligned_domains,
    architecture_of,
    keep_training,
    open_domains,
    prepare_domains,
    save_model,
)
from xlstm_distill.training.accelerator import full_state_dict, make_accelerator
from xlstm_distill.training.log import check_trackers
from xlstm_distill.training.objectives import AlignObjective
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer


def run(recipe: Recipe, run: Run, console: Console) -> Artifact:
    """Convert the teacher and align the new parameters; the result is the seed θ(0) of every expert."""
    weights = aligned_domains(recipe)
    check_trackers(recipe.training.trackers)
    request = align_request(recipe)
    data = {} if run.has(request) else prepare_domains(recipe, run, weights, console)

    def build(draft: Draft) -> None:
        accelerator = make_accelerator(recipe)
        torch.manual_seed(recipe.seed)
        # Both hold the same tensors: only the student's new parameters train, so one copy of the weights is enough.
        teacher = load_teacher(recipe.teacher, accelerator.device)
        student = convert(teacher, recipe.student.mixer, share_weights=True)
        if not any(
            student.new_parameters()
        ):  # an ablation: the window branch alone has nothing to learn here
            console.line(
                f"align: no new parameters to align with branches {list(recipe.student.mixer.branches)}"
            )
            if accelerator.is_main_process:
                save_model(student, load_tokenizer(recipe.teacher), draft.path / "model")
            return
        for _, parameter in student.new_parameters():  # small steps would be lost in bf16
            parameter.data = parameter.data.float()
        objective = AlignObjective(student, teacher)
        domains = open_domains(recipe, data, align_rows(recipe))
        steps = math.ceil(recipe.align.tokens / (recipe.align.batch * recipe.data.context))
        schedule = RowSchedule(domains, weights, recipe.seed, steps * recipe.align.batch)
        stretch = Stretch(schedule, steps, recipe.align.lr)
        flops = align_flops(architecture_of(teacher), recipe.student.mixer, recipe.data.context)
        plan = TrainingPlan("align", (stretch,), recipe.align, recipe.training, flops)
        work = run.work_directory(request)
        result = Trainer(objective, plan, domains, work, accelerator, console).run()
        keep_training(draft, work, plan, result)
        trained = full_state_dict(accelerator, student)
        if accelerator.is_main_process:
            save_model(student, load_tokenizer(recipe.teacher), draft.path / "model", trained)
        errors = [held["mse"] / held["teacher_power"] for held in (result.before, result.after)]
        console.line(f"align: held-out relative error {errors[0]:.3f} -> {errors[1]:.3f}")

    return run.make(request, build, together=True, console=console)

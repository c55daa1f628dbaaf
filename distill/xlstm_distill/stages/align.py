"""Align: teach each mixer to reproduce its teacher layer's heads (stage I; paper, Eq. 12)."""

from __future__ import annotations

import math

import torch

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.console import Console
from xlstm_distill.data import RowSchedule
from xlstm_distill.recipe import Recipe
from xlstm_distill.stages.common import align_request, make_accelerator, open_domains, prepare_domains, save_model
from xlstm_distill.student import convert
from xlstm_distill.tasks import AlignTask
from xlstm_distill.teacher import load_teacher, load_tokenizer
from xlstm_distill.trainer import Plan, Stretch, train, validate


def run(recipe: Recipe, run: Run, console: Console) -> Artifact:
    """Convert the teacher and align the new parameters; the result is the seed θ(0) of every expert."""
    weights = recipe.align.domains or dict.fromkeys(recipe.data.domains, 1.0)
    data = prepare_domains(recipe, run, weights, console)

    def build(draft: Draft) -> None:
        accelerator = make_accelerator(recipe)
        torch.manual_seed(recipe.seed)
        # Both hold the same tensors: only the student's new parameters train, so one copy of the weights is enough.
        teacher = load_teacher(recipe.teacher, accelerator.device)
        student = convert(teacher, recipe.student.mixer, share_weights=True)
        task = AlignTask(student, teacher)
        domains = open_domains(recipe, data)
        steps = math.ceil(recipe.align.tokens / (recipe.align.batch * recipe.data.context))
        schedule = RowSchedule(domains, weights, recipe.seed, steps * recipe.align.batch)
        stretch = Stretch(schedule, steps, recipe.align.lr)
        plan = Plan("align", (stretch,), recipe.align.batch, recipe.align.micro_batch or recipe.align.batch)
        before = validate(task, domains, plan.micro_batch, accelerator.device)
        train(task, recipe.align, plan, domains, draft.path, console, accelerator)
        after = validate(task, domains, plan.micro_batch, accelerator.device)
        draft.results |= {"steps": steps, "validation_before": before, "validation_after": after}
        save_model(student, load_tokenizer(recipe.teacher), draft.path / "model")
        console.line(
            f"align: held-out relative error {before['mse'] / before['teacher_power']:.3f} -> "
            f"{after['mse'] / after['teacher_power']:.3f}"
        )

    return run.make(align_request(recipe, data), build, together=True)

"""Distill: fine-tune one expert per domain from the same seed weights (stage II; paper, Eq. 13)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.data.budget import expert_rows
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.lora import add_lora, merged_state
from xlstm_distill.models.teacher import download_teacher, load_teacher
from xlstm_distill.planning.flops import distill_flops
from xlstm_distill.recipe import Expert, Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import process_count
from xlstm_distill.stages.capture import STORE
from xlstm_distill.stages.choices import choose_experts
from xlstm_distill.stages.kernels import choose_kernels
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.workbench import (
    architecture_of,
    keep_training,
    open_domains,
    save_model,
    start_student,
)
from xlstm_distill.targets.providers import OnlineTargets, StoredTargets, TargetSource
from xlstm_distill.targets.store import Store
from xlstm_distill.training.accelerator import (
    full_state_dict,
    make_accelerator,
    shard_teacher,
)
from xlstm_distill.training.log import check_trackers
from xlstm_distill.training.objectives import DistillObjective, checkpoint_activations
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer


def distill(
    lineage: Lineage, run: Run, console: Console, expert: str | None = None
) -> list[Artifact]:
    """Train one expert, by name or index, or all of them in the recipe's order."""
    names = choose_experts(list(lineage.recipe.distill.experts), expert)
    check_trackers(lineage.recipe.training.trackers)
    return [_expert(lineage, run, name, console) for name in names]


@dataclass(frozen=True)
class Material:
    """The artifacts an expert is made of: seed student, stored targets and rows by domain."""

    aligned: Artifact
    targets: Mapping[str, Artifact]
    data: Mapping[str, Artifact]


def _expert(lineage: Lineage, run: Run, name: str, console: Console) -> Artifact:
    # A finished expert needs neither rows nor targets, which may have been deleted since.
    request = lineage.request(f"distill/{name}")
    if run.has(request):
        return run.need(request)
    # What it builds on is looked for first: a missing seed student is said before rows are made.
    aligned = run.need(lineage.request("align"))
    targets = _captured(lineage, run, name)
    data = prepare_rows(lineage, run, expert_rows(lineage.recipe, name), console)
    material = Material(aligned, targets, data)

    def build(draft: Draft) -> None:
        _train(lineage, run, name, material, draft, console)

    return run.make(request, build, together=True, console=console)


def _train(
    lineage: Lineage, run: Run, name: str, material: Material, draft: Draft, console: Console
) -> None:
    recipe, settings = lineage.recipe, lineage.recipe.distill
    accelerator = make_accelerator(recipe)
    # The same for every expert: they differ by their data alone (paper: trained independently from
    # the same seed weights).
    torch.manual_seed(recipe.seed)
    checkpointing = settings.activation_checkpointing
    student, saved = trainable_student(recipe, material.aligned, accelerator, checkpointing)
    work = run.work_directory(lineage.request(f"distill/{name}"))
    draft.results["backend"] = choose_kernels(
        student,
        recipe,
        accelerator.device,
        work,
        console,
        precision=accelerator.mixed_precision,
    )
    if settings.trainable == "lora" and architecture_of(student).experts:
        console.line(
            f"distill/{name}: LoRA leaves routers and the experts they choose as they are."
        )
    source = _targets(lineage, material.targets, accelerator)
    weights = LossWeights(settings.ce_weight, settings.kl_weight, settings.kl_tail)
    objective = DistillObjective(student, source, weights, saved)
    domains = open_domains(recipe, material.data, expert_rows(recipe, name))
    plan = _plan(recipe, name, student, domains)
    result = Trainer(objective, plan, domains, work, accelerator, console).run()
    keep_training(draft, work, plan, result)
    # A collective under sharding: all ranks gather, then rank 0 writes.
    trained = full_state_dict(accelerator, student)
    if accelerator.is_main_process:
        if settings.trainable == "lora":
            trained = merged_state(trained, settings.lora_rank, settings.lora_alpha)
        save_model(student, lineage.tokenizer, draft.path / "model", trained)
    console.line(
        f"{plan.label}: held-out CE {result.before['ce']:.3f} -> {result.after['ce']:.3f}, "
        f"KL {result.before['kl']:.3f} -> {result.after['kl']:.3f} nats"
    )


def trainable_student(
    recipe: Recipe, start: Artifact, accelerator: Accelerator, checkpointing: bool
) -> tuple[CausalLM, Path | None]:
    """Load a student with the parameters that the recipe trains; see `start_student`."""
    settings = recipe.distill
    student, saved = start_student(start, accelerator)
    if settings.trainable == "lora":
        add_lora(student, settings.lora_rank, settings.lora_alpha)
    else:
        choose_trainable(student, settings.trainable)
    if checkpointing:
        checkpoint_activations(student)
    return student, saved


def choose_trainable(student: CausalLM, which: str) -> None:
    """Let all parameters train, or only the mixers' (projections, feature maps, gates)."""
    # Embeddings, MLPs, layer norms and the head stay the teacher's with `mixer`.
    student.requires_grad_(which == "all")
    if which == "mixer":
        for mixer in student.mixers():
            mixer.requires_grad_(True)


def _captured(lineage: Lineage, run: Run, name: str) -> dict[str, Artifact]:
    """The published targets of an expert's domains; none where they are computed online.

    Raises:
        RunError: one is missing, or was made from other settings.
    """
    if lineage.recipe.capture.targets == "online":
        return {}
    domains = expert_rows(lineage.recipe, name)
    return {domain: run.need(lineage.request(f"capture/{domain}")) for domain in domains}


def _targets(
    lineage: Lineage, captured: Mapping[str, Artifact], accelerator: Accelerator
) -> TargetSource:
    kept, teacher = lineage.recipe.capture, lineage.recipe.teacher
    if kept.targets == "online":
        download_teacher(teacher)
        model = load_teacher(teacher, accelerator.device)
        if kept.shard_teacher and process_count() > 1:
            shard_teacher(model, accelerator)
        return OnlineTargets(model, kept.top_k, kept.mass, kept.min_k)
    stores = {}
    for domain, artifact in captured.items():
        # The store checks this identity itself: a folder that was copied into place by hand has a
        # right manifest and may hold wrong shards.
        stores[domain] = Store(artifact.path / STORE, lineage.store_identity(domain))
    return StoredTargets(stores)


def _plan(
    recipe: Recipe, name: str, student: CausalLM, domains: Mapping[str, DomainRows]
) -> TrainingPlan:
    """The expert's phases, and what a token costs."""
    settings = recipe.distill
    flops = distill_flops(
        architecture_of(student),
        recipe.student.mixer,
        recipe.data.context,
        settings.trainable,
        lora_rank=settings.lora_rank,
        online=recipe.capture.targets == "online",
    )
    stretches = _stretches(recipe, settings.experts[name], domains)
    return TrainingPlan(f"distill/{name}", stretches, settings, recipe.training, flops)


def _stretches(
    recipe: Recipe, expert: Expert, domains: Mapping[str, DomainRows]
) -> tuple[Stretch, ...]:
    """The expert's phases in steps.

    A phase reads rows that earlier phases did not read, for as long as there are any.
    """
    batch = recipe.distill.batch
    stretches = []
    drawn: dict[str, int] = {}
    for phase in expert.phases:
        steps = math.ceil(phase.tokens / (batch * recipe.data.context))
        schedule = RowSchedule(domains, phase.domains, recipe.seed, steps * batch, drawn)
        # A phase on the same domain goes on where the one before stopped, and does not read its
        # rows again.
        drawn = schedule.drawn()
        stretches.append(Stretch(schedule, steps, phase.lr or recipe.distill.lr))
    return tuple(stretches)

"""Distill: fine-tune one expert per domain from the same seed weights (stage II; paper, Eq. 13)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from xlstm_distill.accelerator import (
    checkpoint_activations,
    full_state_dict,
    make_accelerator,
    shard_teacher,
)
from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.console import Console
from xlstm_distill.data import DomainRows, RowSchedule
from xlstm_distill.distributed import process_count
from xlstm_distill.errors import UserError
from xlstm_distill.families import CausalLM
from xlstm_distill.lora import add_lora, merged_state
from xlstm_distill.planning_flops import distill_flops
from xlstm_distill.recipe import Expert, Recipe
from xlstm_distill.stages.common import (
    NO_PART,
    STORE,
    align_request,
    architecture_of,
    capture_request,
    data_inputs,
    expert_domains,
    keep_training,
    load_student,
    open_domains,
    part,
    prepare_domains,
    save_model,
    store_identity,
)
from xlstm_distill.store import Store
from xlstm_distill.targets import OnlineTargets, StoredTargets, TargetSource
from xlstm_distill.tasks import DistillTask
from xlstm_distill.teacher import load_teacher, load_tokenizer, teacher_hash
from xlstm_distill.tracking import check_trackers
from xlstm_distill.trainer import Plan, Stretch, Trainer


def run(recipe: Recipe, run: Run, console: Console, expert: str | None = None) -> list[Artifact]:
    """Train the named expert, or all of them in the recipe's order."""
    if expert is not None and expert not in recipe.distill.experts:
        known = ", ".join(recipe.distill.experts)
        raise UserError(f"--expert: {expert!r} is not in the recipe's distill.experts; it has {known}.")
    check_trackers(recipe.training.trackers)
    return [_run_expert(recipe, run, name, console) for name in ([expert] if expert else recipe.distill.experts)]


def expert_request(recipe: Recipe, name: str, data: Mapping[str, Artifact], seed_weights: str) -> Request:
    """What an expert is made from: settings shared by all, its own phases, seed weights, data and targets."""
    inputs = {"align": seed_weights, "teacher": teacher_hash(recipe.teacher)}
    for domain, artifact in data.items():
        if recipe.capture.targets == "stored":
            inputs[f"capture/{domain}"] = capture_request(recipe, domain, artifact).fingerprint
    parts = {
        "distill": part(recipe.distill, "experts", *NO_PART, "activation_checkpointing"),
        "expert": part(recipe.distill.experts[name]),
        "capture": part(recipe.capture, "batch", "shard_teacher"),
        "seed": recipe.seed,
    }
    return Request("distill", name=name, parts=parts, inputs={**inputs, **data_inputs(data)})


def _plan_expert(recipe: Recipe, run: Run, name: str, console: Console) -> tuple[Request, str, dict[str, Artifact]]:
    """An expert's request, the fingerprint of its seed weights, and the rows it reads."""
    aligned_on = recipe.align.domains or recipe.data.domains
    everything = prepare_domains(recipe, run, {*aligned_on, *expert_domains(recipe, name)}, console)
    data = {domain: everything[domain] for domain in expert_domains(recipe, name)}
    seed = align_request(recipe, {domain: everything[domain] for domain in aligned_on}).fingerprint
    return expert_request(recipe, name, data, seed), seed, data


def find_experts(recipe: Recipe, run: Run, console: Console) -> dict[str, Artifact]:
    """The published experts of this recipe.

    Raises:
        RunError: one is missing, or was made from other settings.
    """
    found = {}
    for name in recipe.distill.experts:
        request, _, _ = _plan_expert(recipe, run, name, console)
        found[name] = run.need(request.label, request.fingerprint)
    return found


def _run_expert(recipe: Recipe, run: Run, name: str, console: Console) -> Artifact:
    request, seed, data = _plan_expert(recipe, run, name, console)

    def build(draft: Draft) -> None:
        aligned = run.need("align", seed)
        accelerator = make_accelerator(recipe)
        torch.manual_seed(recipe.seed)
        student = load_student(aligned, torch.float32)  # on the CPU: what is sharded moves shard by shard
        settings = recipe.distill
        if settings.trainable == "lora":
            add_lora(student, settings.lora_rank, settings.lora_alpha)
        else:
            choose_trainable(student, settings.trainable)
        if settings.activation_checkpointing:
            checkpoint_activations(student)
        targets = _targets(recipe, run, data, accelerator.device)
        task = DistillTask(student, targets, settings.ce_weight, settings.kl_weight, kl_tail=settings.kl_tail)
        domains = open_domains(recipe, data)
        stretches = _stretches(recipe, recipe.distill.experts[name], domains)
        flops = distill_flops(
            architecture_of(student), recipe.student.mixer, recipe.data.context, settings.trainable,
            lora_rank=settings.lora_rank, online=recipe.capture.targets == "online",
        )  # fmt: skip
        micro_batch = settings.micro_batch or settings.batch
        plan = Plan(f"distill/{name}", stretches, settings.batch, micro_batch, flops)
        work = run.work_directory(request)
        trainer = Trainer(task, settings, plan, domains, work, accelerator, training=recipe.training, console=console)
        outcome = trainer.run()
        keep_training(draft, work, plan, outcome)
        weights = full_state_dict(accelerator, student)
        if accelerator.is_main_process:
            if settings.trainable == "lora":
                weights = merged_state(weights, settings.lora_rank, settings.lora_alpha)
            save_model(student, load_tokenizer(recipe.teacher), draft.path / "model", weights)
        console.line(
            f"{plan.label}: held-out CE {outcome.before['ce']:.3f} -> {outcome.after['ce']:.3f}, "
            f"KL {outcome.before['kl']:.3f} -> {outcome.after['kl']:.3f} nats"
        )

    return run.make(request, build, together=True, console=console)


def choose_trainable(student: CausalLM, which: str) -> None:
    """Let all parameters train, or only the mixers' (projections, feature maps, gates)."""
    student.requires_grad_(which == "all")
    if which == "mixer":
        for mixer in student.mixers():
            mixer.requires_grad_(True)


def _targets(recipe: Recipe, run: Run, data: Mapping[str, Artifact], device: torch.device) -> TargetSource:
    if recipe.capture.targets == "online":
        kept = recipe.capture
        teacher = load_teacher(recipe.teacher, device)
        if kept.shard_teacher and process_count() > 1:
            shard_teacher(teacher)
        return OnlineTargets(teacher, kept.top_k, kept.mass, kept.min_k)
    stores = {}
    for domain, artifact in data.items():
        request = capture_request(recipe, domain, artifact)
        directory = run.need(request.label, request.fingerprint).path / STORE
        stores[domain] = Store(directory, store_identity(recipe, domain, artifact))
    return StoredTargets(stores)


def _stretches(recipe: Recipe, expert: Expert, domains: Mapping[str, DomainRows]) -> tuple[Stretch, ...]:
    """The expert's phases in steps; a phase reads rows that earlier ones did not, as long as there are any."""
    batch = recipe.distill.batch
    stretches = []
    drawn: dict[str, int] = {}
    for phase in expert.phases:
        steps = math.ceil(phase.tokens / (batch * recipe.data.context))
        schedule = RowSchedule(domains, phase.domains, recipe.seed, steps * batch, drawn)
        drawn = schedule.drawn()
        stretches.append(Stretch(schedule, steps, phase.lr or recipe.distill.lr))
    return tuple(stretches)

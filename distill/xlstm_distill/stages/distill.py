"""Distill: fine-tune one expert per domain from the same seed weights (stage II; paper, Eq. 13)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.data.budget import expert_rows
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.errors import UserError
from xlstm_distill.losses.plain import LossWeights
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.teacher import load_teacher, load_tokenizer, teacher_hash
from xlstm_distill.planning.flops import distill_flops
from xlstm_distill.recipe import Expert, Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import process_count
from xlstm_distill.stages.workbench import (
    NO_PART,
    STORE,
    align_request,
    architecture_of,
    capture_identity,
    capture_request,
    data_inputs,
    keep_training,
    load_student,
    open_domains,
    part,
    prepare_domains,
    save_model,
    store_identity,
)
from xlstm_distill.targets.providers import OnlineTargets, StoredTargets, TargetSource
from xlstm_distill.targets.store import Store
from xlstm_distill.training.accelerator import (
    checkpoint_activations,
    full_state_dict,
    make_accelerator,
    shard_teacher,
)
from xlstm_distill.training.log import check_trackers
from xlstm_distill.training.lora import add_lora, merged_state
from xlstm_distill.training.objectives import DistillTask
from xlstm_distill.training.trainer import Plan, Stretch, Trainer


def run(recipe: Recipe, run: Run, console: Console, expert: str | None = None) -> list[Artifact]:
    """Train one expert, by name or index, or all of them in the recipe's order."""
    names = choose_experts(list(recipe.distill.experts), expert)
    check_trackers(recipe.training.trackers)
    return [_run_expert(recipe, run, name, console) for name in names]


def choose_experts(names: Sequence[str], wanted: str | None) -> Sequence[str]:
    """All experts, or the one of this name, else of this index (that of a task in a job array).

    Raises:
        UserError: there is none of this name or index.
    """
    if wanted is None:
        return names
    if wanted in names:
        return [wanted]
    if re.fullmatch(r"[0-9]{1,9}", wanted) and int(wanted) < len(names):
        return [names[int(wanted)]]
    raise UserError(
        f"--expert: {wanted!r} is not in the recipe's distill.experts; it has {', '.join(names)} "
        f"(or by index: 0 to {len(names) - 1})."
    )


def expert_request(recipe: Recipe, name: str) -> Request:
    """What an expert is made from: settings shared by all, its own phases, seed weights, data and targets."""
    domains = expert_rows(recipe, name)
    inputs = {"align": align_request(recipe).fingerprint, "teacher": teacher_hash(recipe.teacher)}
    if recipe.capture.targets == "stored":
        inputs |= {f"capture/{domain}": capture_identity(recipe, domain) for domain in domains}
    parts = {
        "distill": part(recipe.distill, "experts", *NO_PART, "activation_checkpointing"),
        "expert": part(recipe.distill.experts[name]),
        "capture": part(recipe.capture, "batch", "shard_teacher"),
        "seed": recipe.seed,
    }
    return Request(
        "distill", name=name, parts=parts, inputs={**inputs, **data_inputs(recipe, domains)}
    )


def find_experts(recipe: Recipe, run: Run) -> dict[str, Artifact]:
    """The published experts of this recipe.

    Raises:
        RunError: one is missing, or was made from other settings.
    """
    found = {}
    for name in recipe.distill.experts:
        request = expert_request(recipe, name)
        found[name] = run.need(request.label, request.fingerprint)
    return found


def _run_expert(recipe: Recipe, run: Run, name: str, console: Console) -> Artifact:
    request = expert_request(recipe, name)
    if run.has(request):
        return run.need(request.label, request.fingerprint)
    aligned = run.need("align", request.inputs["align"])
    targets = _find_targets(recipe, run, name)
    data = prepare_domains(recipe, run, expert_rows(recipe, name), console)

    def build(draft: Draft) -> None:
        accelerator = make_accelerator(recipe)
        torch.manual_seed(recipe.seed)
        student = load_student(
            aligned, torch.float32
        )  # on the CPU: what is sharded moves shard by shard
        settings = recipe.distill
        if settings.trainable == "lora":
            add_lora(student, settings.lora_rank, settings.lora_alpha)
        else:
            choose_trainable(student, settings.trainable)
        if settings.activation_checkpointing:
            checkpoint_activations(student)
        source = _targets(recipe, targets, accelerator.device)
        loss_weights = LossWeights(settings.ce_weight, settings.kl_weight, settings.kl_tail)
        task = DistillTask(student, source, loss_weights)
        domains = open_domains(recipe, data, expert_rows(recipe, name))
        stretches = _stretches(recipe, recipe.distill.experts[name], domains)
        flops = distill_flops(
            architecture_of(student), recipe.student.mixer, recipe.data.context, settings.trainable,
            lora_rank=settings.lora_rank, online=recipe.capture.targets == "online",
        )  # fmt: skip
        micro_batch = settings.micro_batch or settings.batch
        plan = Plan(f"distill/{name}", stretches, settings.batch, micro_batch, flops)
        work = run.work_directory(request)
        trainer = Trainer(
            task,
            settings,
            plan,
            domains,
            work,
            accelerator,
            training=recipe.training,
            console=console,
        )
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


def _find_targets(recipe: Recipe, run: Run, name: str) -> dict[str, Artifact]:
    """The published targets of an expert's domains; none where they are computed online.

    Raises:
        RunError: one is missing, or was made from other settings.
    """
    if recipe.capture.targets == "online":
        return {}
    requests = {domain: capture_request(recipe, domain) for domain in expert_rows(recipe, name)}
    return {
        domain: run.need(request.label, request.fingerprint) for domain, request in requests.items()
    }


def _targets(
    recipe: Recipe, captured: Mapping[str, Artifact], device: torch.device
) -> TargetSource:
    if recipe.capture.targets == "online":
        kept = recipe.capture
        teacher = load_teacher(recipe.teacher, device)
        if kept.shard_teacher and process_count() > 1:
            shard_teacher(teacher)
        return OnlineTargets(teacher, kept.top_k, kept.mass, kept.min_k)
    return StoredTargets(
        {
            domain: Store(a.path / STORE, store_identity(recipe, domain))
            for domain, a in captured.items()
        }
    )


def _stretches(
    recipe: Recipe, expert: Expert, domains: Mapping[str, DomainRows]
) -> tuple[Stretch, ...]:
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

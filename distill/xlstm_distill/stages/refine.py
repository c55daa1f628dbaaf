"""Refine: train experts on continuations that they sample themselves (optional; not in the paper).

The teacher scores the samples in each step (arXiv 2306.13649). docs/refine.md has measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.data.budget import expert_rows
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.loading import allocate, empty_student
from xlstm_distill.models.lora import add_lora, merged_state
from xlstm_distill.models.teacher import download_teacher, load_teacher
from xlstm_distill.planning.flops import distill_flops
from xlstm_distill.recipe import Recipe, Refine
from xlstm_distill.recipe.refining import MOST_SAMPLED
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import process_count
from xlstm_distill.stages.choices import choose_refined
from xlstm_distill.stages.distill import trainable_student
from xlstm_distill.stages.kernels import choose_kernels
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.workbench import (
    architecture_of,
    keep_training,
    open_domains,
    save_model,
)
from xlstm_distill.targets.providers import OnlineTargets
from xlstm_distill.training.accelerator import (
    full_state_dict,
    make_accelerator,
    shard_teacher,
)
from xlstm_distill.training.log import check_trackers
from xlstm_distill.training.on_policy.objective import RefineObjective
from xlstm_distill.training.on_policy.prompts import Cutter
from xlstm_distill.training.on_policy.sampler import Sampler, SampleSettings
from xlstm_distill.training.plan import Stretch, TrainingPlan
from xlstm_distill.training.trainer import Trainer


def refine(
    lineage: Lineage, run: Run, console: Console, expert: str | None = None
) -> list[Artifact]:
    """Refine one expert, by name or index, or all that the recipe refines, in its order.

    Raises:
        UserError: the recipe refines none, or has none of this name.
    """
    names = choose_refined(lineage.recipe, expert)
    check_trackers(lineage.recipe.training.trackers)
    return [_expert(lineage, run, name, console) for name in names]


@dataclass(frozen=True)
class Work:
    """What one refinement is done with."""

    lineage: Lineage
    run: Run
    name: str
    settings: Refine
    trained: Artifact
    """The expert as stage II has left it."""
    console: Console

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.lineage.recipe


def _expert(lineage: Lineage, run: Run, name: str, console: Console) -> Artifact:
    # A finished one needs neither rows nor the expert of stage II, which may have been deleted.
    request = lineage.request(f"refine/{name}")
    if run.has(request):
        return run.need(request)
    assert lineage.recipe.refine is not None
    trained = run.need(lineage.request(f"distill/{name}"))
    data = prepare_rows(lineage, run, expert_rows(lineage.recipe, name), console)
    work = Work(lineage, run, name, lineage.recipe.refine, trained, console)

    def build(draft: Draft) -> None:
        _train(work, data, draft)

    return run.make(request, build, together=True, console=console)


def _train(work: Work, data: Mapping[str, Artifact], draft: Draft) -> None:
    recipe, settings, console = work.recipe, work.settings, work.console
    accelerator = make_accelerator(recipe)
    _refuse_deepspeed(accelerator)
    torch.manual_seed(recipe.seed)  # of adapters
    checkpointing = settings.activation_checkpointing
    student, saved = trainable_student(recipe, work.trained, accelerator, checkpointing)
    folder = work.run.work_directory(work.lineage.request(f"refine/{work.name}"))
    draft.results["backend"] = choose_kernels(
        student,
        recipe,
        accelerator.device,
        folder,
        console,
        precision=accelerator.mixed_precision,
    )
    domains = open_domains(recipe, data, expert_rows(recipe, work.name))
    objective = RefineObjective(
        student,
        _teacher(work, accelerator),
        _sampler(work, student, accelerator),
        Cutter(settings.prompt_tokens, settings.new_tokens, settings.off_policy, recipe.seed),
        kl_tail=settings.kl_tail,
        width=settings.row_tokens if recipe.training.compile == "on" else None,
        saved=saved,
    )
    plan = _plan(work, student, domains)
    result = Trainer(objective, plan, domains, folder, accelerator, console).run()
    keep_training(draft, folder, plan, result)
    # A collective under sharding: all ranks gather, then rank 0 writes.
    weights = full_state_dict(accelerator, student)
    if accelerator.is_main_process:
        if recipe.distill.trainable == "lora":
            weights = merged_state(weights, recipe.distill.lora_rank, recipe.distill.lora_alpha)
        save_model(student, work.lineage.tokenizer, draft.path / "model", weights)
    console.line(
        f"{plan.label}: held-out CE {result.before['ce']:.3f} -> {result.after['ce']:.3f}, "
        f"KL {result.before['kl']:.3f} -> {result.after['kl']:.3f} nats; on its own text KL "
        f"{result.last['kl']:.3f}"
        if result.last
        else f"{plan.label}: done"
    )


def _refuse_deepspeed(accelerator: Accelerator) -> None:
    """Refuse a launcher under which nobody has sampled.

    Raises:
        UserError: DeepSpeed's engine holds the weights.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "refine: impossible under DeepSpeed, which holds the weights that are to sample; "
            "launch with recipes/accelerate/fsdp2.yaml or ddp.yaml."
        )


def _teacher(work: Work, accelerator: Accelerator) -> OnlineTargets:
    teacher = work.recipe.teacher
    download_teacher(teacher)
    model = load_teacher(teacher, accelerator.device)
    if work.settings.shard_teacher and process_count() > 1:
        shard_teacher(model, accelerator)
    return OnlineTargets(model, work.settings.top_k)


def _sampler(work: Work, student: CausalLM, accelerator: Accelerator) -> Sampler:
    """Make what samples: the student itself, or a whole copy of it in the format it computes in."""
    settings, recipe = work.settings, work.recipe
    share = settings.batch // accelerator.num_processes
    found = SampleSettings(
        new_tokens=settings.new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        rows=settings.sample_batch or min(MOST_SAMPLED, max(1, share)),
        seed=recipe.seed,
        ends=end_tokens(student, work.lineage.tokenizer),
    )
    bf16 = accelerator.mixed_precision == "bf16"
    if not bf16 and accelerator.distributed_type != DistributedType.FSDP:
        return Sampler(student, found)
    folder = work.trained.model_path
    copy = empty_student(folder, torch.bfloat16 if bf16 else torch.float32)
    if recipe.distill.trainable == "lora":
        add_lora(copy, recipe.distill.lora_rank, recipe.distill.lora_alpha)
    # Not read from the files: the sampler writes all weights before each use.
    allocate(copy, accelerator.device, folder)
    copy.to(accelerator.device).requires_grad_(False)
    for mixer, own in zip(copy.mixers(), student.mixers(), strict=True):
        mixer.backend = own.backend
    return Sampler(student, found, copy)


def end_tokens(student: CausalLM, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that end a text: of the generation settings, and of the tokenizer.

    Empty where there are none: every continuation then has all its tokens.
    """
    given = student.generation_config.eos_token_id
    ends = list(given) if isinstance(given, list | tuple) else [given]
    found = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
    return tuple(sorted(found))


def _plan(work: Work, student: CausalLM, domains: Mapping[str, DomainRows]) -> TrainingPlan:
    """One stretch over the domains of stage II, by the tokens that it gave to each."""
    recipe, settings = work.recipe, work.settings
    steps = settings.steps()
    weights = mixture(recipe, work.name)
    schedule = RowSchedule(domains, weights, recipe.seed, steps * settings.batch)
    # Of training alone: decoding is bound by memory, and no part of the MFU.
    flops = distill_flops(
        architecture_of(student),
        recipe.student.mixer,
        settings.row_tokens,
        recipe.distill.trainable,
        lora_rank=recipe.distill.lora_rank,
        online=True,
    )
    stretch = Stretch(schedule, steps, settings.lr)
    return TrainingPlan(
        f"refine/{work.name}",
        (stretch,),
        settings,
        recipe.training,
        flops,
        row_tokens=settings.row_tokens,
    )


def mixture(recipe: Recipe, expert: str) -> dict[str, float]:
    """Return how many tokens of each domain stage II has given an expert, in the recipe's order."""
    found = dict.fromkeys(expert_rows(recipe, expert), 0.0)
    for phase in recipe.distill.experts[expert].phases:
        total = sum(phase.domains.values())
        for domain, weight in phase.domains.items():
            found[domain] += phase.tokens * weight / total
    return found

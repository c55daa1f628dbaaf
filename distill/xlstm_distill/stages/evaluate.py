"""Evaluate: score the teacher, the experts and the merged student on the same tasks, through lm-eval."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.artifacts.hashing import hash_path
from xlstm_distill.data.rows import DomainRows, load_batch
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.models.teacher import load_teacher, load_tokenizer, teacher_hash
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import is_main_process
from xlstm_distill.stages.merge import merge_request
from xlstm_distill.stages.workbench import (
    data_inputs,
    load_student,
    open_domains,
    part,
    prepare_domains,
)
from xlstm_distill.training.accelerator import make_accelerator
from xlstm_eval.harness import LoadedSuite, check_suite, evaluate_model, load_suite
from xlstm_eval.results import write_samples
from xlstm_eval.suites import Suite

TEACHER, MERGED = "teacher", "merged"
GATE_ROWS = 16
"""Held-out rows of each domain over which the output gates are averaged."""


def run(recipe: Recipe, run: Run, console: Console) -> list[Artifact]:
    """Evaluate every model under the same settings; each has its own artifact, so a new merge redoes only itself."""
    tokenizer = load_tokenizer(recipe.teacher)
    suite = functools.cache(
        lambda: load_suite(_suite(recipe))
    )  # takes seconds: only when something is to be scored
    planned = _plan(recipe, run)
    done = all(run.has(request) for request, _ in planned.values())
    data = {} if done else prepare_domains(recipe, run, recipe.data.domains, console)

    def build(name: str, source: Artifact | None, draft: Draft) -> None:
        device = make_accelerator(recipe).device
        dtype = getattr(torch, recipe.teacher.dtype)
        model = (
            load_student(source, dtype, device) if source else load_teacher(recipe.teacher, device)
        )
        _score(model.eval(), tokenizer, suite(), name, recipe, draft, console)
        if source is not None:
            held_out = open_domains(recipe, data, dict.fromkeys(data, recipe.data.validation_rows))
            draft.write_json("gates.json", mean_gates(model, held_out, device))

    return [
        run.make(request, functools.partial(build, name, source))
        for name, (request, source) in planned.items()
    ]


def check(recipe: Recipe, run: Run) -> None:
    """Refuse before any training what could not be evaluated after it; one process does, as one evaluates.

    A teacher that has been evaluated under these settings shows that they are good.

    Raises:
        EvalError: an unknown task, metric or filter, data that cannot be loaded, unsafe code that is not confirmed,
            or more tokens to generate than the context holds.
    """
    if not is_main_process() or run.find(_request(recipe, TEACHER, None, {})):
        return
    tokenizer, teacher = load_tokenizer(recipe.teacher), recipe.teacher
    config = AutoConfig.from_pretrained(
        teacher.path,
        revision=teacher.revision or "main",
        trust_remote_code=teacher.trust_remote_code,
    )
    check_suite(_suite(recipe), config, tokenizer)


def find_evaluations(recipe: Recipe, run: Run) -> dict[str, Artifact]:
    """The published evaluations of this recipe, the teacher's first.

    Raises:
        RunError: one is missing, or was made from other settings.
    """
    planned = _plan(recipe, run)
    return {
        name: run.need(request.label, request.fingerprint) for name, (request, _) in planned.items()
    }


def _plan(recipe: Recipe, run: Run) -> dict[str, tuple[Request, Artifact | None]]:
    """What is evaluated: each model's request and the artifact that holds it (None for the teacher)."""
    sources: dict[str, Artifact | None] = {TEACHER: None, **_students(recipe, run)}
    data = data_inputs(recipe, recipe.data.domains)
    return {
        name: (_request(recipe, name, source, data), source) for name, source in sources.items()
    }


def _students(recipe: Recipe, run: Run) -> dict[str, Artifact]:
    """The merged student, then the experts where the recipe wants them scored."""
    request, experts = merge_request(recipe, run)
    students = {MERGED: run.need(request.label, request.fingerprint)}
    return {**students, **(experts if recipe.evaluate.experts else {})}


def _request(recipe: Recipe, name: str, source: Artifact | None, data: dict[str, str]) -> Request:
    if source is None:
        inputs = {"teacher": teacher_hash(recipe.teacher)}
    else:
        inputs = {f"{source.manifest['stage']}/{name}": source.fingerprint, **data}
    if recipe.evaluate.include is not None:
        inputs["tasks"] = hash_path(Path(recipe.evaluate.include))
    parts = {
        "evaluate": part(recipe.evaluate, "include", "experts"),
        "dtype": recipe.teacher.dtype,
        "seed": recipe.seed,
    }
    return Request("evaluate", name=name, parts=parts, inputs=inputs)


def _suite(recipe: Recipe) -> Suite:
    """The recipe's section `evaluate` as a suite: their fields have the same names."""
    settings = recipe.evaluate.model_dump(include=set(Suite.model_fields) - {"name"})
    return Suite(name=recipe.name, **settings)


def _score(
    model: CausalLM,
    tokenizer: Any,
    suite: LoadedSuite,
    name: str,
    recipe: Recipe,
    draft: Draft,
    console: Console,
) -> None:
    """Run lm-eval and write the results, the samples, and the proof that all models were asked the same."""
    with console.progress(f"evaluate/{name}", None, unit="requests") as progress:
        counted = 0

        def advance(done: int, total: int) -> None:
            nonlocal counted
            progress.update(done - counted, total=total)
            counted = done

        result = evaluate_model(
            model,
            tokenizer,
            suite,
            batch_size=recipe.evaluate.batch,
            seed=recipe.seed,
            progress=advance,
        )
    for warning in result.warnings:
        console.line(f"evaluate/{name}: {warning}")
    draft.write_json("results.json", [task.model_dump(mode="json") for task in result.tasks])
    write_samples(result, draft.path / "samples")
    draft.results |= {
        "requests_hash": result.requests_hash,
        "settings_hash": result.settings_hash,
        "warnings": list(result.warnings),
        "mean_score": sum(task.score for task in result.tasks) / len(result.tasks),
    }


@torch.no_grad()
def mean_gates(
    model: CausalLM, domains: dict[str, DomainRows], device: torch.device
) -> list[list[float]]:
    """Mean output gate of every layer and head over held-out rows, layers x heads; empty where there are no gates.

    Rows go through the model one by one: all of them at once do not fit beside a large one.
    """
    rows = [
        (name, row)
        for name, held in domains.items()
        for row in range(min(GATE_ROWS, held.validation))
    ]
    with GateMeter(model) as meter:
        for row in rows:
            batch = load_batch(domains, [row]).to(device)
            meter.expect(batch.real)
            model.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                segment_ids=batch.segment_ids,
                use_cache=False,
            )
    return meter.means()

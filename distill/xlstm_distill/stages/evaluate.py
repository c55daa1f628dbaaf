"""Evaluate: score teacher, experts and merged student on the same tasks, through lm-eval."""

from __future__ import annotations

import functools

import torch
from transformers import AutoConfig

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.data.rows import DomainRows, Row, load_batch
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.models.teacher import load_teacher
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import is_main_process
from xlstm_distill.stages.lineage import TEACHER, Lineage
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.workbench import choose_kernels, load_student, open_domains
from xlstm_distill.training.accelerator import make_accelerator
from xlstm_eval.harness import LoadedSuite, check_suite, evaluate_model, load_suite
from xlstm_eval.records import EvalError
from xlstm_eval.results import write_samples
from xlstm_eval.suites import Suite

GATE_ROWS = 16
"""Held-out rows of each domain over which the output gates are averaged."""


def evaluate(lineage: Lineage, run: Run, console: Console) -> list[Artifact]:
    """Score every model under the same settings.

    Each model has an artifact of its own, so that a new merge redoes only its own evaluation.
    """
    recipe = lineage.recipe
    sources = _sources(lineage, run)
    requests = {name: lineage.request(f"evaluate/{name}") for name in sources}
    # The ranks agree on each answer, so that all stop asking at the same one.
    done = all(run.has(request) for request in requests.values())
    data = {} if done else prepare_rows(lineage, run, recipe.data.domains, console)

    @functools.cache  # takes seconds: only when something is to be scored
    def suite() -> LoadedSuite:
        return load_suite(_suite(recipe))

    def build(name: str, draft: Draft) -> None:
        device = make_accelerator(recipe).device
        source = sources[name]
        if source is None:
            model = load_teacher(recipe.teacher, device)
        else:
            # In the teacher's dtype, so that rounding favours neither side of the comparison.
            model = load_student(source, getattr(torch, recipe.teacher.dtype), device)
            draft.results["backend"] = choose_kernels(model, recipe, device)
        _score(model.eval(), lineage, suite(), name, draft, console)
        # A teacher has no gates.
        if source is not None:
            limits = dict.fromkeys(data, recipe.data.validation_rows)
            held_out = open_domains(recipe, data, limits)
            draft.write_json("gates.json", mean_gates(model, held_out, device))

    return [
        run.make(request, functools.partial(build, name), console=console)
        for name, request in requests.items()
    ]


def check(lineage: Lineage, run: Run) -> None:
    """Refuse before any training what could not be evaluated after it.

    Rank 0 checks, as rank 0 evaluates. A teacher that has been evaluated under these settings shows
    that they are good.

    Raises:
        EvalError: an unknown task, metric or filter, data that cannot be loaded, unsafe code that
            is not confirmed, or more tokens to generate than the context holds.
    """
    # `find` and not `has`: only rank 0 asks here, and `has` is a collective.
    if not is_main_process() or run.find(lineage.request(f"evaluate/{TEACHER}")):
        return
    check_tasks(lineage)


def check_tasks(lineage: Lineage) -> None:
    """Check the recipe's tasks against the teacher's tokenizer and context; raises as `check`."""
    # First: it refuses a teacher that is not there, or not a model, in one line.
    tokenizer = lineage.tokenizer
    teacher = lineage.recipe.teacher
    config = AutoConfig.from_pretrained(
        teacher.path,
        revision=teacher.revision or "main",
        trust_remote_code=teacher.trust_remote_code,
    )
    try:
        check_suite(_suite(lineage.recipe), config, tokenizer)
    except EvalError as error:
        # What the evaluation calls its suite is the recipe's section `evaluate`.
        raise EvalError(str(error).replace("suite.", "evaluate.", 1)) from None


def find_evaluations(lineage: Lineage, run: Run) -> dict[str, Artifact]:
    """The published evaluations of this recipe, the teacher's first.

    Raises:
        RunError: one is missing, or was made from other settings.
    """
    _sources(lineage, run)  # a missing student is said before its missing evaluation
    models = lineage.evaluated_models()
    return {name: run.need(lineage.request(f"evaluate/{name}")) for name in models}


def _sources(lineage: Lineage, run: Run) -> dict[str, Artifact | None]:
    """The artifact that holds each model; None for the teacher."""
    found: dict[str, Artifact | None] = {}
    for name in lineage.evaluated_models():
        if name == TEACHER:
            found[name] = None
        else:
            found[name] = run.need(lineage.request(lineage.model_label(name)))
    return found


def _suite(recipe: Recipe) -> Suite:
    """The recipe's section `evaluate` as a suite: their fields have the same names."""
    settings = recipe.evaluate.model_dump(include=set(Suite.model_fields) - {"name"})
    return Suite(name=recipe.name, **settings)


def _score(
    model: CausalLM,
    lineage: Lineage,
    suite: LoadedSuite,
    name: str,
    draft: Draft,
    console: Console,
) -> None:
    """Run lm-eval; write results, samples, and hashes that show what the model was asked."""
    with console.progress(f"evaluate/{name}", None, unit="requests") as progress:
        counted = 0  # lm-eval tells how many are done in all; a bar wants how many more

        def advance(done: int, total: int) -> None:
            nonlocal counted
            progress.update(done - counted, total=total)
            counted = done

        result = evaluate_model(
            model,
            lineage.tokenizer,
            suite,
            batch_size=lineage.recipe.evaluate.batch,
            seed=lineage.recipe.seed,
            progress=advance,
        )
    for warning in result.warnings:
        console.line(f"evaluate/{name}: {warning}")
    draft.write_json("results.json", [task.model_dump(mode="json") for task in result.tasks])
    write_samples(result, draft.path / "samples")
    # The report refuses to compare models that were not asked the same.
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
    """Mean output gate of every layer and head over held-out rows: layers x heads.

    Empty where there are no gates.
    """
    rows: list[Row] = []
    for name, held in domains.items():
        # The first rows of a domain are the held-out ones (`DomainRows`).
        rows += [(name, row) for row in range(min(GATE_ROWS, held.validation))]
    with GateMeter(model) as meter:
        # One by one: all rows at once do not fit beside a large model.
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

"""Evaluate: score teacher, experts and merged student on the same tasks, through lm-eval."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.data.rows import DomainRows, Row, load_batch
from xlstm_distill.errors import RunError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.gates import GateMeter
from xlstm_distill.models.teacher import load_teacher
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.products import fast_linear_layers, fast_prompts
from xlstm_distill.runtime.ranks import (
    from_rank_zero,
    gather_objects,
    is_main_process,
    process_count,
    process_index,
    scatter_object,
)
from xlstm_distill.stages.choices import choose_models
from xlstm_distill.stages.kernels import choose_kernels
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.measuring.judging import (
    RESULTS_FILE,
    SAMPLES_FOLDER,
    Unjudged,
    find_unjudged,
)
from xlstm_distill.stages.measuring.long_context import (
    check_long_context,
    help_to_score,
    score_long_context,
)
from xlstm_distill.stages.measuring.speed import measure_speed
from xlstm_distill.stages.outline import MERGED, TEACHER
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.workbench import bar, load_student, open_domains
from xlstm_distill.training.accelerator import make_accelerator
from xlstm_eval.answering.processes import processes_for, side_by_side
from xlstm_eval.earlier import judge_anew, judged_alone
from xlstm_eval.harness import Session, check_suite, evaluate_model, help_to_evaluate
from xlstm_eval.loading import LoadedSuite, load_suite
from xlstm_eval.records import EvalError, TaskResult
from xlstm_eval.report.speed import SPEED_FILE
from xlstm_eval.results import ITEMS_FILE, EvaluationResult, write_items, write_samples
from xlstm_eval.suites import Suite

GATE_ROWS = 16
"""Held-out rows of each domain over which the output gates are averaged."""
GATE_TOKENS = 4096
"""Tokens that are read at a time for it: all rows at once do not fit beside a large model."""


def evaluate(
    lineage: Lineage, run: Run, console: Console, model: str | None = None
) -> list[Artifact]:
    """Score one model, by name or index, or all of them, under the same settings.

    Each model has an artifact of its own, so that a new merge redoes only its own evaluation.
    """
    recipe = lineage.recipe
    names = choose_models(lineage, model)
    sources = _sources(lineage, run, names)
    requests = {name: lineage.request(f"evaluate/{name}") for name in names}
    # The ranks agree on each answer, so that all stop asking at the same one.
    missing = [name for name, request in requests.items() if not run.has(request)]
    # For gates alone, which a teacher does not have.
    students = [name for name in missing if sources[name] is not None]
    data = prepare_rows(lineage, run, recipe.data.domains, console) if students else {}

    @functools.cache  # takes seconds: only when something is to be scored, and on rank 0 alone
    def suite() -> LoadedSuite:
        return load_suite(suite_of(recipe), lineage.tokenizer)

    def build(name: str, draft: Draft) -> None:
        before = find_unjudged(run, requests[name])
        if before is not None:
            console.line(f"evaluate/{name}: another judge alone; all other scores stay")
            if from_rank_zero(lambda: before.has_answers(suite())):
                if is_main_process():
                    _judge_anew(before, lineage, run, suite(), name, draft, console)
                return
        device = make_accelerator(recipe).device
        source = sources[name]
        if source is None:
            loaded = load_teacher(recipe.teacher, device)
        else:
            # In the teacher's dtype, so that rounding favours neither side of the comparison.
            loaded = load_student(source, getattr(torch, recipe.teacher.dtype), device)
            work = run.work_directory(requests[name])
            draft.results["backend"] = choose_kernels(
                loaded, recipe, device, work, console, decodes=True
            )
        session = _session(lineage, run, name)
        with run.working(f"evaluate/{name}"):
            if not is_main_process():
                help_to_evaluate(loaded.eval(), lineage.tokenizer, session)
                if before is None:
                    help_to_score(loaded, lineage, session)
                return
            if before is not None:
                judged = _ask(loaded, lineage, judged_alone(suite()), name, session, console)
                _judge_anew(before, lineage, run, suite(), name, draft, console, judged)
                return
            _keep(_ask(loaded, lineage, suite(), name, session, console), draft)
            score_long_context(loaded, lineage, run, name, session, draft, console)
            if source is not None:
                limits = dict.fromkeys(data, recipe.data.validation_rows)
                held_out = open_domains(recipe, data, limits)
                draft.write_json("gates.json", mean_gates(loaded, held_out, device))
            # Of the students, the merged one alone: the experts have its shapes.
            if name in (TEACHER, MERGED):
                _time_decoding(loaded, recipe, draft, device)

    return [
        run.make(request, functools.partial(build, name), together=True, console=console)
        for name, request in requests.items()
    ]


def ask(model: CausalLM, lineage: Lineage) -> tuple[TaskResult, ...]:
    """Ask a model that is no artifact the recipe's tasks, in this process; nothing is kept."""
    batch = lineage.recipe.evaluate.batch
    session = Session(batch_size=None if batch == "auto" else batch)
    suite, seed = suite_of(lineage.recipe), lineage.recipe.seed
    result = evaluate_model(model.eval(), lineage.tokenizer, suite, session, seed=seed)
    return result.tasks


class AllRanks:
    """The processes of this run, for an evaluation."""

    @property
    def index(self) -> int:
        """Number of this rank."""
        return process_index()

    @property
    def count(self) -> int:
        """Number of ranks."""
        return process_count()

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """Return this rank's value of rank 0's list."""
        return scatter_object(values)

    def gather(self, value: Any) -> list[Any] | None:
        """Return the values of all ranks on rank 0."""
        return gather_objects(value)


def _session(lineage: Lineage, run: Run, name: str) -> Session:
    """Where one model's evaluation keeps its answers, and what they belong to."""
    request = lineage.request(f"evaluate/{name}")
    batch = lineage.recipe.evaluate.batch
    # A batch size that is found once holds for every model with the same settings: teacher and
    # students are compared, whatever task of a job array each of them is.
    settings = lineage.settings(request.label)
    # A judge that is added or changed asks for no other batches.
    evaluated = {key: value for key, value in settings["evaluate"].items() if key != "judge"}
    name = digest(settings | {"evaluate": evaluated})[:12]
    return Session(
        batch_size=None if batch == "auto" else batch,
        sizes=run.directory / "evaluation" / f"batch-{name}",
        # Removed when the evaluation has been published, and not before.
        journal=run.work_directory(request),
        identity=request.fingerprint,
        ranks=AllRanks(),
    )


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
        check_suite(suite_of(lineage.recipe), config, tokenizer)
    except EvalError as error:
        # What the evaluation calls its suite is the recipe's section `evaluate`.
        raise EvalError(str(error).replace("suite.", "evaluate.", 1)) from None
    try:
        check_long_context(lineage, config)
    except EvalError as error:
        raise EvalError(f"evaluate.long_context.{error}") from None


def find_evaluations(lineage: Lineage, run: Run) -> dict[str, Artifact]:
    """The published evaluations of this recipe, the teacher's first.

    Raises:
        RunError: one is missing, or was made from other settings.
    """
    models = lineage.evaluated_models()
    _sources(lineage, run, models)  # a missing student is said before its missing evaluation
    requests = {name: lineage.request(f"evaluate/{name}") for name in models}
    try:
        # It looks again for a minute where another machine may have published a moment ago.
        return {name: run.need(request) for name, request in requests.items()}
    except RunError:
        missing = [name for name, request in requests.items() if run.find(request) is None]
        if len(missing) < 2:  # what was raised says more of a single one
            raise
    raise RunError(
        f"{run.path('evaluate')}: evaluations of {', '.join(missing)} are not there yet, or were "
        "made from other settings; run 'evaluate' (--model NAME does a single one)."
    )


def _sources(lineage: Lineage, run: Run, names: Sequence[str]) -> dict[str, Artifact | None]:
    """The artifact that holds each model; None for the teacher."""
    found: dict[str, Artifact | None] = {}
    for name in names:
        if name == TEACHER:
            found[name] = None
        else:
            found[name] = run.need(lineage.request(lineage.model_label(name)))
    return found


def suite_of(recipe: Recipe, other: Mapping[str, Any] | None = None) -> Suite:
    """The recipe's section `evaluate` as a suite: their fields have the same names.

    `other` replaces settings of it, for other tasks that are asked alike.
    """
    settings = recipe.evaluate.model_dump(include=set(Suite.model_fields) - {"name"})
    # The report takes it from the recipe, so that it can change without a new evaluation.
    settings["tasks"] = [task | {"chance": None} for task in settings["tasks"]]
    return Suite(name=recipe.name, **{**settings, **(other or {})})


def _ask(
    model: CausalLM,
    lineage: Lineage,
    suite: LoadedSuite,
    name: str,
    session: Session,
    console: Console,
) -> EvaluationResult:
    """Run lm-eval, with a bar and its warnings."""
    reading = fast_prompts(model) if name == TEACHER else contextlib.nullcontext()
    with bar(console, f"evaluate/{name}") as progress, reading:
        session = replace(session, progress=progress)
        seed = lineage.recipe.seed
        result = evaluate_model(model.eval(), lineage.tokenizer, suite, session, seed=seed)
    for warning in result.warnings:
        console.line(f"evaluate/{name}: {warning}")
    return result


def _judge_anew(
    before: Unjudged,
    lineage: Lineage,
    run: Run,
    suite: LoadedSuite,
    name: str,
    draft: Draft,
    console: Console,
    judged: EvaluationResult | None = None,
) -> None:
    """Write an earlier evaluation with its judged task judged by this recipe's judge."""
    folder = run.work_directory(lineage.request(f"evaluate/{name}"))
    with run.working(f"evaluate/{name}"):
        result = judge_anew(
            before.earlier, suite, seed=lineage.recipe.seed, folder=folder, judged=judged
        )
        before.take_over(draft)
        _keep(result, draft)


def _keep(result: EvaluationResult, draft: Draft) -> None:
    """Write results, samples, and hashes that show what the model was asked."""
    tasks = [task.model_dump(mode="json", exclude={"items"}) for task in result.tasks]
    draft.write_json(RESULTS_FILE, tasks)
    write_items(result, draft.path / ITEMS_FILE)
    write_samples(result, draft.path / SAMPLES_FOLDER)
    # The report refuses to compare models that were not asked the same.
    draft.results |= {
        "requests_hash": result.requests_hash,
        "settings_hash": result.settings_hash,
        "protocol": dict(result.protocol),
        "warnings": list(result.warnings),
        "mean_score": sum(task.score for task in result.tasks) / len(result.tasks),
    }


def _time_decoding(model: CausalLM, recipe: Recipe, draft: Draft, device: torch.device) -> None:
    """Write what decoding costs over the context."""
    found = measure_speed(model, recipe.evaluate.speed, device)
    if found is not None:
        backend = draft.results.get("backend", "")
        draft.write_json(SPEED_FILE, found.model_dump(mode="json") | {"backend": backend})


def mean_gates(
    model: CausalLM, domains: dict[str, DomainRows], device: torch.device
) -> list[list[float | None]]:
    """Mean output gate of every layer and head over held-out rows: layers x heads.

    None for heads that keep full attention. Empty where there are no gates.
    """
    rows: list[Row] = []
    for name, held in domains.items():
        # The first rows of a domain are the held-out ones (`DomainRows`).
        rows += [(name, row) for row in range(min(GATE_ROWS, held.validation))]
    context = max((held.context for held in domains.values()), default=1)
    at_once = max(1, GATE_TOKENS // context)
    parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]

    @torch.no_grad()
    def measure(part: list[Row]) -> tuple[list[list[float | None]], int]:
        """Mean gates over some rows, and over how many tokens."""
        batch = load_batch(domains, part).to(device)
        with GateMeter(model) as meter, fast_linear_layers(device):
            meter.expect(batch.real)
            model.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                segment_ids=batch.segment_ids,
                use_cache=False,
            )
        return meter.means(), int(batch.real.sum())

    measured = list(side_by_side(measure, parts, processes_for(model, process_count())))
    total = sum(tokens for _, tokens in measured)
    # A head that keeps full attention has no gate in any part: not a number, and none at the end.
    weighted = [np.array(means, dtype=float) * (tokens / total) for means, tokens in measured]
    found = np.sum(weighted, axis=0).tolist() if weighted else []
    return [[None if isnan(mean) else round(mean, 6) for mean in layer] for layer in found]

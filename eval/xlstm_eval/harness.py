"""Run a loaded model through lm-eval on a suite, on one or several ranks.

This module, `loading` and `answering` alone import lm_eval. Its import takes seconds, so it happens
inside the functions.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_eval.answering.batches import PROTOCOL, draws
from xlstm_eval.answering.coordinator import Coordinator, OneRank, Progress, Ranks, Tally
from xlstm_eval.answering.journal import Answered, Journal
from xlstm_eval.answering.sizes import BatchSizes
from xlstm_eval.beside import (
    generate,
    mt_bench,
    open_judge,
    sandbox_protocol,
    sandbox_warnings,
    skipped,
)
from xlstm_eval.loading import LoadedSuite, leaves_of, load_suite
from xlstm_eval.protocol import task_protocols, text_hash
from xlstm_eval.records import EvalError, TaskResult
from xlstm_eval.results import (
    EvaluationResult,
    hash_requests,
    pick_metric,
    settings_hash,
    task_result,
)
from xlstm_eval.suites import Suite, SuiteTask
from xlstm_eval.tasks.local import task_length
from xlstm_eval.tasks.mt_bench import MT_BENCH
from xlstm_eval.tasks.sandbox import require_sandbox
from xlstm_eval.terminal import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SAMPLING = ("top_p", "top_k", "min_p")
"""Settings that matter only where tokens are drawn at random."""


@dataclass(frozen=True)
class Session:
    """Where an evaluation runs and what it keeps.

    ``journal`` is a folder for answers until they are published, ``identity`` says which model is
    asked what: answers under another identity are not used. ``batch_size`` is the rows of a forward
    pass; None finds it, and keeps it in ``sizes`` for the models that are compared. Prompts of more
    than ``prefill`` tokens are read in chunks of so many; None reads them at once. ``processes``
    answer beside each other; None: one for each thread where the model is small and on a CPU.
    """

    batch_size: int | None = None
    sizes: Path | None = None
    journal: Path | None = None
    identity: str = ""
    ranks: Ranks = field(default_factory=OneRank)
    progress: Progress | None = None
    prefill: int | None = None
    processes: int | None = None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite | LoadedSuite,
    session: Session,
    *,
    seed: int = 0,
) -> EvaluationResult:
    """Score a causal LM on every task of a suite, by lm-eval (rank 0).

    The other ranks must call `help_to_evaluate` meanwhile. A LoadedSuite is not read again. Raises
    EvalError: a task that needs a longer context than the model has, unsafe code that is not
    confirmed, an unknown metric or filter, a score that is not finite, a request that does not fit
    the device's memory.
    """
    from xlstm_eval.answering.language_model import AskedModel
    from xlstm_eval.answering.processes import processes_for

    started = time.perf_counter()
    loaded = suite if isinstance(suite, LoadedSuite) else load_suite(suite, tokenizer)
    sizes = BatchSizes(session.batch_size, session.sizes)
    progress = _on_terminal(session.progress, sys.stderr)
    with in_evaluation(model), settled_objects(), quiet() as warnings:
        lm = AskedModel(model, tokenizer, warnings, sizes, seed, session.prefill)
        lm.lengths = loaded.lengths.of(tokenizer)
        _check(loaded, lm)
        talk = mt_bench(loaded, lm)
        judge = open_judge(loaded, seed, session.journal)
        processes = session.processes or processes_for(model, session.ranks.count)
        lm.coordinator = Coordinator(
            lm.compute,
            _journal(session),
            session.ranks,
            progress,
            loaded.count_requests,
            processes,
        )
        raw = _run_all(lm, loaded, seed)
        answers = talk.answer(functools.partial(generate, lm)) if talk else []
        lm.coordinator.finish()
        batches = lm.coordinator.results()
        # The two know each other: the model would stay until garbage is collected.
        lm.coordinator = None
        warnings = [*warnings, *sandbox_warnings(loaded), *skipped(loaded)]
    said = [message for batch in batches for message in batch.warnings]
    samples = {leaf.task_name: raw["samples"][leaf.task_name] for _, leaf in loaded.leaves()}
    results = {task.name: _result_of(task, loaded, raw) for task in loaded.harnessed()}
    if talk and judge:
        results[MT_BENCH], samples[MT_BENCH] = talk.judged(answers, judge)
        raw["protocols"][MT_BENCH] = talk.protocol(judge.settings)
    return EvaluationResult(
        tasks=tuple(results[task.name] for task in loaded.suite.tasks if task.name in results),
        samples=samples,
        seconds=time.perf_counter() - started,
        requests_hash=hash_requests(samples),
        settings_hash=settings_hash(loaded.suite, seed),
        # First those of the batches, in their order: also of other ranks and of earlier runs.
        warnings=tuple(dict.fromkeys([*said, *warnings])),
        groups=loaded.groups(),
        protocol={
            **_protocol(sizes, batches),
            "lm_eval": importlib.metadata.version("lm_eval"),
            "seed": seed,
            # Without "torch.", as in recipes.
            "dtype": str(model.dtype).removeprefix("torch."),
            "context": lm.max_length,
            "limit": loaded.suite.limit,
            "chat_template": text_hash(
                tokenizer.chat_template if loaded.suite.apply_chat_template else None
            ),
            "tasks": raw["protocols"],
            **sandbox_protocol(loaded),
        },
    )


def help_to_evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, session: Session
) -> None:
    """Answer what rank 0 deals out while it is in `evaluate_model` (all other ranks)."""
    from xlstm_eval.answering.language_model import BatchModel

    with in_evaluation(model), quiet() as warnings:
        lm = BatchModel(model, tokenizer, warnings, session.prefill)
        Coordinator(lm.compute, _journal(session), session.ranks).follow()


def _journal(session: Session) -> Journal:
    return Journal(session.journal, session.identity, session.ranks.index)


def _protocol(sizes: BatchSizes, batches: Sequence[Answered]) -> dict[str, Any]:
    """Say how the answers were made, as far as the suite does not: it goes into the results."""
    return {
        "version": PROTOCOL,
        "batch": dict(sizes.used),
        # Batches that did not fit the memory: their answers may differ in the last digits.
        "halved": sum(batch.pieces > 1 for batch in batches),
        "answer_seconds": round(sum(batch.seconds for batch in batches), 3),
        "tokens": sum(batch.tokens for batch in batches),
    }


@contextlib.contextmanager
def in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into evaluation mode for the block: lm-eval leaves it there."""
    was_training = model.training
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def settled_objects() -> Iterator[None]:
    """Have garbage collection leave alone, inside the block, the objects that are there before it.

    The libraries' million objects stay: to look through them takes 0.3 s, and lm-eval makes so many
    objects of its own that it happens for every second model. Where the caller has done the same,
    that stays.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _on_terminal(progress: Progress | None, stderr: Any) -> Callable[[Tally], None] | None:
    """Give a caller's bar the terminal that `quiet` takes away."""
    if progress is None:
        return None

    def report(tally: Tally) -> None:
        with contextlib.redirect_stderr(stderr):
            progress(tally)

    return report


def check_suite(suite: Suite, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what evaluate_model would refuse of a model of this config, in seconds and without it.

    Raises EvalError as load_suite and evaluate_model do.
    """
    # Which metrics a task reports shows only when it has been run: a stand-in answers one item.
    loaded = load_suite(suite.model_copy(update={"limit": 1}), tokenizer)
    with quiet():
        lm = _stand_in(config, tokenizer)
        _check(loaded, lm)
        raw = _run_all(lm, loaded, seed=0)
    for entry in loaded.harnessed():
        pick_metric(entry, raw["results"][entry.name])


def _check(loaded: LoadedSuite, lm: Any) -> None:
    """Refuse, before anything is run, what would fail or be cut short in the middle."""
    if loaded.runs_code() and loaded.suite.confirm_run_unsafe_code:
        require_sandbox()
    for entry, leaf in loaded.leaves():
        if getattr(leaf, "UNSAFE_CODE", False) and not loaded.suite.confirm_run_unsafe_code:
            raise EvalError(
                f"{entry.name}: runs code that a model wrote. Allow it with --run-code, or with "
                "confirm_run_unsafe_code: true; it runs in a sandbox (docs/evaluation.md)."
            )
        if leaf.task_name in loaded.unconfined:
            raise EvalError(
                f"{entry.name}: runs code that a model wrote by means of its own, outside the "
                "sandbox. Leave it out, or score it with xlstm_eval.tasks.code.pass_at_k."
            )
        length = task_length(entry.name)
        if length > lm.max_length:
            raise EvalError(
                f"{entry.name}: its prompts and answers have {length} tokens, the model's context "
                f"{lm.max_length}. Leave it out."
            )
        if leaf.get_config("output_type") != "generate_until":
            continue
        settings = leaf.get_config("generation_kwargs") or {}
        given = [name for name in SAMPLING if entry.generation.get(name) is not None]
        if given and not draws(settings):
            raise EvalError(
                f"{entry.name}.generation: the task is greedy, so {given[0]} has no effect. Give a "
                "temperature above 0 too, or leave it out."
            )
        _require_room(entry.name, settings.get("max_gen_toks", lm.max_gen_toks), lm.max_length)
    talk = mt_bench(loaded)
    if talk is not None:
        _require_room(MT_BENCH, talk.budget, lm.max_length)


def _require_room(task: str, budget: int, context: int) -> None:
    # lm-eval keeps context - budget tokens of a prompt: nothing would be left of it.
    if budget >= context:
        raise EvalError(
            f"{task}.max_gen_tokens: {budget} leaves no room for a prompt; the model's context is "
            f"{context}. Give fewer."
        )


def context_of(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the context (tokens) within which lm-eval asks a model."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import resolve_max_length

    return int(resolve_max_length(config, tokenizer, default=HFLM._DEFAULT_MAX_LENGTH))


def _stand_in(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make lm-eval a model that answers nothing, with a real one's context and chat template."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    class StandIn(LM):
        max_gen_toks = HFLM.max_gen_toks
        tokenizer_name = HFLM.tokenizer_name
        apply_chat_template = HFLM.apply_chat_template

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.chat_template_args: dict[str, Any] = {}
            self.max_length = context_of(config, tokenizer)

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [""] * len(requests)

        # Any finite number will do: only the names of the metrics are looked at.
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-1.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [-1.0] * len(requests)

    return StandIn()


def _run_all(lm: Any, loaded: LoadedSuite, seed: int) -> dict[str, dict[str, Any]]:
    """Evaluate the suite in one lm-eval call for each style of few-shot prompts."""
    # lm-eval batches requests of equal generation settings across the tasks of one call. The style
    # of few-shot prompts is a setting of the whole call.
    parts = ("results", "samples", "higher_is_better")
    raw: dict[str, dict[str, Any]] = {part: {} for part in (*parts, "protocols")}
    for multiturn in (False, True):
        chosen = [task.name for task in loaded.harnessed() if task.multiturn is multiturn]
        if chosen:
            lm.multiturn = multiturn
            output = _run(lm, loaded, chosen, multiturn, seed)
            for part in parts:
                raw[part] |= output[part]
            raw["protocols"] |= task_protocols(output, multiturn)
    return raw


def _run(
    lm: Any, loaded: LoadedSuite, names: Sequence[str], multiturn: bool, seed: int
) -> dict[str, Any]:
    """Evaluate some of the suite's tasks in one lm-eval call."""
    import lm_eval
    import numpy
    import torch

    # Tasks may draw from any of these generators, for example to shuffle the choices of an item.
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    # Tasks that are loaded already are taken as they are, not read again.
    chosen = loaded.manager.load([loaded.tasks[name] for name in names])
    for leaf in chosen["tasks"].values():
        leaf.set_fewshot_seed(seed=seed)
    output: dict[str, Any] = lm_eval.evaluate(
        lm=lm,
        task_dict=chosen,
        limit=loaded.suite.limit,
        # 100,000 resamplings for standard errors would take minutes; results.py has a formula.
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=loaded.suite.apply_chat_template,
        fewshot_as_multiturn=multiturn,
        confirm_run_unsafe_code=loaded.suite.confirm_run_unsafe_code,
    )
    return output


def _result_of(entry: SuiteTask, loaded: LoadedSuite, raw: dict[str, dict[str, Any]]) -> TaskResult:
    rows, written = [], True
    for leaf in leaves_of(loaded.tasks[entry.name]):
        rows.extend(raw["samples"][leaf.task_name])
        written = written and leaf.get_config("output_type") == "generate_until"
    higher_is_better = raw["higher_is_better"].get(entry.name) or {}
    result = task_result(entry, raw["results"][entry.name], rows, higher_is_better)
    return result.model_copy(update={"kind": "generation" if written else "loglikelihood"})

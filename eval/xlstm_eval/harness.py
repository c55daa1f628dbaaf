"""Run a loaded model through lm-eval on a suite. The only importer of lm_eval, which takes seconds: always lazily.

Offline by construction where the suite's task files are local. All tasks of a suite go into one lm-eval call, so that
batches fill up across tasks whose generation settings are equal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from xlstm_eval.problems import did_you_mean
from xlstm_eval.records import EvalError, TaskResult
from xlstm_eval.results import EvaluationResult, hash_requests, hash_value, pick_metric, task_result
from xlstm_eval.suites import Suite, SuiteTask

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

FILE_BUILDERS = ("json", "csv", "parquet", "text")


@dataclass(frozen=True)
class LoadedSuite:
    """Hold a suite's lm-eval task objects, loaded once and used for every model."""

    suite: Suite
    tasks: dict[str, Any]  # name -> lm_eval Task or Group
    manager: Any

    def leaves(self) -> Iterator[tuple[SuiteTask, Any]]:
        """Yield each lm-eval task with the suite's entry it comes from (a group's members share one)."""
        for entry in self.suite.tasks:
            for leaf in _leaves(self.tasks[entry.name]):
                yield entry, leaf


def load_suite(suite: Suite) -> LoadedSuite:
    """Find the suite's tasks, apply its overrides, and read their data.

    Local task files come first; lm-eval's own index is read only when a name is not among them. Relative
    ``data_files`` are taken from the folder of the task file that names them.
    Raises EvalError: no such folder, unknown task, data that cannot be loaded.
    """
    with _quiet():
        from lm_eval.tasks import TaskManager

        if suite.include_path is not None and not suite.include_path.is_dir():
            raise EvalError(
                f"suite.include_path: {suite.include_path} is not a folder. Give a folder of task files."
            )
        names = [task.name for task in suite.tasks]
        path = None if suite.include_path is None else str(suite.include_path.resolve())
        manager = TaskManager(include_path=path, include_defaults=False)
        if missing := [name for name in names if name not in manager.all_tasks]:
            known = manager.all_tasks
            manager = TaskManager(include_path=path, include_defaults=True)
            if unknown := [name for name in missing if name not in manager.all_tasks]:
                raise EvalError(
                    f"suite.tasks: unknown task {unknown[0]!r}. {_suggest(unknown[0], known, manager)}"
                )
        loaded = LoadedSuite(suite, {name: _load_task(manager, name) for name in names}, manager)
        for entry, leaf in loaded.leaves():
            _override(entry, leaf)
    return loaded


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite | LoadedSuite,
    *,
    batch_size: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score a causal LM on every task of a suite, by lm-eval.

    ``progress(done, total)`` is called as requests finish. A suite given as LoadedSuite is not read again.
    Raises EvalError: a task that needs a longer context than the model has, unsafe code not confirmed, an unknown
    metric or filter, a score that is not finite.
    """
    started = time.perf_counter()
    loaded = suite if isinstance(suite, LoadedSuite) else load_suite(suite)
    was_training, stderr = model.training, sys.stderr
    with _quiet() as warnings:
        lm = _language_model(model, tokenizer, batch_size)
        _check(loaded, lm)
        if progress is not None:
            lm.set_cache_hook(_ProgressHook(progress, loaded, stderr))
        raw = _run_all(lm, loaded, seed)
    model.train(was_training)
    samples = {leaf.task_name: raw["samples"][leaf.task_name] for _, leaf in loaded.leaves()}
    return EvaluationResult(
        tasks=tuple(_result_of(entry, loaded, raw) for entry in loaded.suite.tasks),
        samples=samples,
        seconds=time.perf_counter() - started,
        requests_hash=hash_requests(samples),
        settings_hash=hash_value(
            [loaded.suite.model_dump(mode="json", exclude={"include_path"}), seed]
        ),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def check_suite(suite: Suite, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what evaluate_model would refuse of a model of this config, without the model and in seconds.

    The first item of each task is asked of a stand-in, whose answers are empty: what a task reports as its metrics
    shows only then. Raises EvalError as load_suite and evaluate_model do.
    """
    loaded = load_suite(suite.model_copy(update={"limit": 1}))
    with _quiet():
        lm = _stand_in(config, tokenizer)
        _check(loaded, lm)
        raw = _run_all(lm, loaded, seed=0)
    for entry in suite.tasks:
        pick_metric(entry, raw["results"][entry.name])


def _load_task(manager: Any, name: str) -> Any:
    """Load one task or group; a task file's relative data files are made absolute first."""
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = manager.task_index[name]
    spec: str | dict[str, Any] = name
    if entry.yaml_path is not None:
        config = load_yaml(entry.yaml_path)
        files = (config.get("dataset_kwargs") or {}).get("data_files")
        if config.get("dataset_path") in FILE_BUILDERS and files is not None:
            absolute = _absolute(files, Path(entry.yaml_path).parent)
            spec = config | {"dataset_kwargs": config["dataset_kwargs"] | {"data_files": absolute}}
    try:
        loaded = manager.load([spec])
    except (OSError, ValueError, KeyError, ImportError, DatasetsError) as error:
        raise EvalError(f"suite.tasks: {name} cannot be loaded: {_first_line(error)}") from error
    return loaded["groups"].get(name) or loaded["tasks"][name]


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    if "://" in files:
        return files
    path = (folder / files).resolve()
    if not path.exists() and not any(mark in files for mark in "*?["):
        raise EvalError(
            f"data_files: {files} is not in {folder}. Paths are relative to the task file."
        )
    return str(path)


def _override(entry: SuiteTask, leaf: Any) -> None:
    shots = leaf.get_config("num_fewshot") or 0 if entry.num_fewshot is None else entry.num_fewshot
    leaf.set_config(key="num_fewshot", value=shots)
    changes: dict[str, Any] = dict(entry.generation)
    if entry.max_gen_toks is not None:
        changes["max_gen_toks"] = entry.max_gen_toks
    if changes and leaf.get_config("output_type") == "generate_until":
        leaf.set_config(key="generation_kwargs", value=changes, update=True)


def _check(loaded: LoadedSuite, lm: Any) -> None:
    """Refuse, before anything is run, what would fail or be cut short in the middle."""
    for entry, leaf in loaded.leaves():
        if getattr(leaf, "UNSAFE_CODE", False) and not loaded.suite.confirm_run_unsafe_code:
            raise EvalError(
                f"{entry.name}: runs generated code. Set confirm_run_unsafe_code to allow it, in a sandbox."
            )
        if leaf.get_config("output_type") == "generate_until":
            budget = (leaf.get_config("generation_kwargs") or {}).get(
                "max_gen_toks", lm.max_gen_toks
            )
            if budget >= lm.max_length:
                raise EvalError(
                    f"{entry.name}.max_gen_toks: {budget} leaves no room for a prompt; the model's context is "
                    f"{lm.max_length}. Give fewer."
                )


def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _stand_in(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make a language model for lm-eval that answers nothing, with a real one's context and chat template."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import resolve_max_length

    class StandIn(LM):
        max_gen_toks = HFLM.max_gen_toks
        tokenizer_name = HFLM.tokenizer_name
        apply_chat_template = HFLM.apply_chat_template

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.chat_template_args: dict[str, Any] = {}
            self.max_length = resolve_max_length(
                config, tokenizer, default=HFLM._DEFAULT_MAX_LENGTH
            )

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [""] * len(requests)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(-1.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return [-1.0] * len(requests)

    return StandIn()


def _run_all(lm: Any, loaded: LoadedSuite, seed: int) -> dict[str, dict[str, Any]]:
    """Evaluate the suite: all tasks in one lm-eval call, or in two where the styles of few-shot prompts differ."""
    raw: dict[str, dict[str, Any]] = {"results": {}, "samples": {}, "higher_is_better": {}}
    for multiturn in (False, True):
        chosen = [e.name for e in loaded.suite.tasks if e.fewshot_as_multiturn is multiturn]
        if chosen:
            output = _run(lm, loaded, chosen, multiturn, seed)
            for part in raw:
                raw[part] |= output[part]
    return raw


def _run(
    lm: Any, loaded: LoadedSuite, names: Sequence[str], multiturn: bool, seed: int
) -> dict[str, Any]:
    """Evaluate some of the suite's tasks in one lm-eval call."""
    import lm_eval
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    chosen = loaded.manager.load([loaded.tasks[name] for name in names])
    for leaf in chosen["tasks"].values():
        leaf.set_fewshot_seed(seed=seed)
    # bootstrap_iters=0: standard errors of means are computed from the items; 100,000 resamplings are not needed.
    output: dict[str, Any] = lm_eval.evaluate(
        lm=lm,
        task_dict=chosen,
        limit=loaded.suite.limit,
        bootstrap_iters=0,
        log_samples=True,
        system_instruction=loaded.suite.system_instruction,
        apply_chat_template=loaded.suite.apply_chat_template,
        fewshot_as_multiturn=multiturn,
        confirm_run_unsafe_code=loaded.suite.confirm_run_unsafe_code,
    )
    return output


def _result_of(entry: SuiteTask, loaded: LoadedSuite, raw: dict[str, dict[str, Any]]) -> TaskResult:
    rows = [
        row for leaf in _leaves(loaded.tasks[entry.name]) for row in raw["samples"][leaf.task_name]
    ]
    return task_result(
        entry, raw["results"][entry.name], rows, raw["higher_is_better"].get(entry.name) or {}
    )


def _leaves(task: Any) -> list[Any]:
    from lm_eval.api.group import Group

    return list(task.get_all_tasks()) if isinstance(task, Group) else [task]


def _suggest(name: str, local: list[str], manager: Any) -> str:
    return did_you_mean(name, local) if local else did_you_mean(name, manager.all_tasks)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _ProgressHook:
    """Count finished requests: lm-eval calls its cache hook once for each."""

    def __init__(self, progress: Progress, loaded: LoadedSuite, stderr: TextIO) -> None:
        self._progress, self._loaded, self._stderr = progress, loaded, stderr
        self._done = self._total = 0

    def add_partial(self, *_: object) -> None:
        if (
            self._done == self._total
        ):  # the first request, or the first after the other few-shot style was built
            leaves = [leaf for _, leaf in self._loaded.leaves()]
            self._total = sum(
                instance.repeats for leaf in leaves for instance in leaf.instances or ()
            )
        self._done += 1
        with contextlib.redirect_stderr(self._stderr):
            self._progress(self._done, self._total)


class _Collect(logging.Handler):
    """Keep the messages that a reader of the scores must know."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "trunc" in (message := record.getMessage()).lower():
            self.messages.append(message)


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Keep lm-eval's log and bars off the terminal; yield the list of its warnings on truncation."""
    logger, handler = logging.getLogger("lm_eval"), _Collect()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate

"""Run a loaded model through lm-eval on a suite.

No other module imports lm_eval. Its import takes seconds, so it happens inside the functions.
With local task files nothing is downloaded.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlstm_eval.problems import did_you_mean
from xlstm_eval.records import EvalError, TaskResult
from xlstm_eval.results import EvaluationResult, hash_requests, hash_value, pick_metric, task_result
from xlstm_eval.suites import Suite, SuiteTask
from xlstm_eval.terminal import Progress, ProgressHook, quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FILE_BUILDERS = ("json", "csv", "parquet", "text")
"""What a task file names as ``dataset_path`` to read its own ``data_files``."""


@dataclass(frozen=True)
class LoadedSuite:
    """Hold a suite's lm-eval task objects, loaded once and used for every model."""

    suite: Suite
    tasks: dict[str, Any]  # name -> lm_eval Task or Group
    manager: Any

    def leaves(self) -> Iterator[tuple[SuiteTask, Any]]:
        """Yield each lm-eval task with the suite's entry; the members of a group share one."""
        for entry in self.suite.tasks:
            for leaf in _leaves(self.tasks[entry.name]):
                yield entry, leaf

    def count_requests(self) -> int:
        """Return how many requests lm-eval has built for the suite so far."""
        total = 0
        for _, leaf in self.leaves():
            total += sum(instance.repeats for instance in leaf.instances or ())
        return total


def load_suite(suite: Suite) -> LoadedSuite:
    """Find the suite's tasks, apply its overrides, and read their data.

    Relative ``data_files`` are taken from the folder of the task file that names them.
    Raises EvalError: no such folder, unknown task, data that cannot be loaded.
    """
    with quiet():
        manager = _find_tasks(suite)
        tasks = {task.name: _load_task(manager, task.name) for task in suite.tasks}
        loaded = LoadedSuite(suite, tasks, manager)
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

    ``progress(done, total)`` is called as requests finish. A LoadedSuite is not read again.
    Raises EvalError: a task that needs a longer context than the model has, unsafe code that is not
    confirmed, an unknown metric or filter, a score that is not finite.
    """
    started = time.perf_counter()
    loaded = suite if isinstance(suite, LoadedSuite) else load_suite(suite)
    was_training, stderr = model.training, sys.stderr
    with quiet() as warnings:
        lm = _language_model(model, tokenizer, batch_size)
        _check(loaded, lm)
        if progress is not None:
            lm.set_cache_hook(ProgressHook(progress, loaded.count_requests, stderr))
        raw = _run_all(lm, loaded, seed)
    # lm-eval leaves the model in evaluation mode.
    model.train(was_training)
    samples = {leaf.task_name: raw["samples"][leaf.task_name] for _, leaf in loaded.leaves()}
    # Where the task files lie does not change what is asked.
    settings = loaded.suite.model_dump(mode="json", exclude={"include"})
    return EvaluationResult(
        tasks=tuple(_result_of(entry, loaded, raw) for entry in loaded.suite.tasks),
        samples=samples,
        seconds=time.perf_counter() - started,
        requests_hash=hash_requests(samples),
        settings_hash=hash_value([settings, seed]),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def check_suite(suite: Suite, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what evaluate_model would refuse of a model of this config, in seconds and without it.

    Raises EvalError as load_suite and evaluate_model do.
    """
    # Which metrics a task reports shows only when it has been run: a stand-in answers one item.
    loaded = load_suite(suite.model_copy(update={"limit": 1}))
    with quiet():
        lm = _stand_in(config, tokenizer)
        _check(loaded, lm)
        raw = _run_all(lm, loaded, seed=0)
    for entry in suite.tasks:
        pick_metric(entry, raw["results"][entry.name])


def _find_tasks(suite: Suite) -> Any:
    """Return lm-eval's index of tasks that knows every task of the suite."""
    from lm_eval.tasks import TaskManager

    folder = suite.include
    if folder is not None and not folder.is_dir():
        raise EvalError(f"suite.include: {folder} is not a folder. Give a folder of task files.")
    path = None if folder is None else str(folder.resolve())
    # lm-eval's own index takes seconds to read, so it is read only for a name that is not local.
    manager = TaskManager(include_path=path, include_defaults=False)
    local = manager.all_tasks
    missing = [task.name for task in suite.tasks if task.name not in local]
    if not missing:
        return manager
    manager = _with_defaults(path)
    for name in missing:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, local or manager.all_tasks)
            raise EvalError(f"suite.tasks: unknown task {name!r}. {hint}")
    return manager


@functools.lru_cache(maxsize=4)
def _with_defaults(path: str | None) -> Any:
    """Read lm-eval's 14,000 own tasks and those of a folder: 8 seconds, so once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=path, include_defaults=True)


def _load_task(manager: Any, name: str) -> Any:
    """Load one task or group; make a task file's relative data files absolute first."""
    from datasets.exceptions import DatasetsError

    spec = _task_spec(manager.task_index[name])
    try:
        loaded = manager.load([spec])
    except (OSError, ValueError, KeyError, ImportError, DatasetsError) as error:
        raise EvalError(f"suite.tasks: {name} cannot be loaded: {_first_line(error)}") from error
    return loaded["groups"].get(name) or loaded["tasks"][name]


def _task_spec(entry: Any) -> str | dict[str, Any]:
    """Return what lm-eval loads a task from: its name, or its settings with absolute data files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.yaml_path is None:
        return str(entry.name)
    config: dict[str, Any] = load_yaml(entry.yaml_path)
    settings = config.get("dataset_kwargs") or {}
    if config.get("dataset_path") not in FILE_BUILDERS or settings.get("data_files") is None:
        return str(entry.name)
    # lm-eval would take the paths from the working directory.
    absolute = _absolute(settings["data_files"], Path(entry.yaml_path).parent)
    return config | {"dataset_kwargs": settings | {"data_files": absolute}}


def _absolute(files: Any, folder: Path) -> Any:
    """Make ``data_files`` absolute: a path, a list of them, or a mapping by split."""
    if isinstance(files, dict):
        return {split: _absolute(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    if "://" in files:
        return files
    path = (folder / files).resolve()
    is_pattern = any(mark in files for mark in "*?[")
    if not is_pattern and not path.exists():
        raise EvalError(
            f"data_files: {files} is not in {folder}. Paths are relative to the task file."
        )
    return str(path)


def _override(entry: SuiteTask, leaf: Any) -> None:
    """Apply the suite's settings of one task to lm-eval's task object."""
    shots = entry.shots
    if shots is None:
        shots = leaf.get_config("num_fewshot") or 0
    # Set even where it is the task's own number, so that the task object says what is run.
    leaf.set_config(key="num_fewshot", value=shots)
    # Only what the suite names changes; a task's stop sequences stay.
    changes: dict[str, Any] = dict(entry.generation)
    if entry.max_gen_tokens is not None:
        changes["max_gen_toks"] = entry.max_gen_tokens
    if changes and leaf.get_config("output_type") == "generate_until":
        leaf.set_config(key="generation_kwargs", value=changes, update=True)


def _check(loaded: LoadedSuite, lm: Any) -> None:
    """Refuse, before anything is run, what would fail or be cut short in the middle."""
    for entry, leaf in loaded.leaves():
        if getattr(leaf, "UNSAFE_CODE", False) and not loaded.suite.confirm_run_unsafe_code:
            raise EvalError(
                f"{entry.name}: runs generated code. "
                "Set confirm_run_unsafe_code to allow it, in a sandbox."
            )
        if leaf.get_config("output_type") != "generate_until":
            continue
        settings = leaf.get_config("generation_kwargs") or {}
        budget = settings.get("max_gen_toks", lm.max_gen_toks)
        # lm-eval keeps max_length - budget tokens of a prompt: nothing would be left of it.
        if budget >= lm.max_length:
            raise EvalError(
                f"{entry.name}.max_gen_tokens: {budget} leaves no room for a prompt; the model's "
                f"context is {lm.max_length}. Give fewer."
            )


def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _stand_in(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make lm-eval a model that answers nothing, with a real one's context and chat template."""
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
    raw: dict[str, dict[str, Any]] = {"results": {}, "samples": {}, "higher_is_better": {}}
    for multiturn in (False, True):
        chosen = [task.name for task in loaded.suite.tasks if task.multiturn is multiturn]
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
    rows = []
    for leaf in _leaves(loaded.tasks[entry.name]):
        rows.extend(raw["samples"][leaf.task_name])
    higher_is_better = raw["higher_is_better"].get(entry.name) or {}
    return task_result(entry, raw["results"][entry.name], rows, higher_is_better)


def _leaves(task: Any) -> list[Any]:
    from lm_eval.api.group import Group

    return list(task.get_all_tasks()) if isinstance(task, Group) else [task]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

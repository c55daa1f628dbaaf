"""Load a suite's tasks from lm-eval and from task files, with the suite's settings applied.

lm_eval's import takes seconds, so it happens inside the functions. With local task files nothing is
downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xlstm_eval.problems import did_you_mean
from xlstm_eval.records import EvalError
from xlstm_eval.suites import Suite, SuiteTask
from xlstm_eval.tasks.code import is_confined, runs_programs, sandboxed_metrics
from xlstm_eval.tasks.local import local_tasks
from xlstm_eval.tasks.mt_bench import MT_BENCH, Question, load_questions
from xlstm_eval.tasks.ruler import drawn_alike, tokenizer_folder
from xlstm_eval.terminal import quiet

FILE_BUILDERS = ("json", "csv", "parquet", "text")
"""What a task file names as ``dataset_path`` to read its own ``data_files``."""
LONG_TASKS = ("niah_", "ruler", "longbench")
"""How those of lm-eval's tasks begin that need the extra `long-context`."""


@dataclass
class Lengths:
    """Tokens of each question's prompt and answer, by its key: the same for every model.

    Of one tokenizer; for another all are counted anew.
    """

    tokenizer: Any = None
    counted: dict[str, tuple[int, int]] = field(default_factory=dict)

    def of(self, tokenizer: Any) -> dict[str, tuple[int, int]]:
        """Return what was counted with a tokenizer, to be added to."""
        if self.tokenizer is not tokenizer:
            self.tokenizer, self.counted = tokenizer, {}
        return self.counted


@dataclass(frozen=True)
class LoadedSuite:
    """Hold a suite's lm-eval task objects, loaded once and used for every model."""

    suite: Suite
    tasks: dict[str, Any]  # name -> lm_eval Task or Group
    manager: Any
    unconfined: frozenset[str] = frozenset()
    """Tasks that run generated code outside the sandbox, by lm-eval's names."""
    questions: tuple[Question, ...] = ()
    """Those of MT-Bench, where it is in the suite and there is a judge."""
    lengths: Lengths = field(default_factory=Lengths)

    def harnessed(self) -> list[SuiteTask]:
        """Return the suite's tasks that lm-eval runs: all but MT-Bench."""
        return _harnessed(self.suite)

    def leaves(self) -> Iterator[tuple[SuiteTask, Any]]:
        """Yield each lm-eval task with the suite's entry; the members of a group share one."""
        for entry in self.harnessed():
            for leaf in leaves_of(self.tasks[entry.name]):
                yield entry, leaf

    def groups(self) -> dict[str, list[str]]:
        """Return the members of the tasks that are groups, in the order of their items."""
        found: dict[str, list[str]] = {}
        for entry, leaf in self.leaves():
            found.setdefault(entry.name, []).append(leaf.task_name)
        return {name: members for name, members in found.items() if members != [name]}

    def runs_code(self) -> bool:
        """Tell whether a task of the suite runs code that the model wrote."""
        return any(getattr(leaf, "UNSAFE_CODE", False) for _, leaf in self.leaves())

    def count_requests(self) -> int:
        """Return how many requests lm-eval has built for the suite so far."""
        total = 2 * len(self.questions)
        for _, leaf in self.leaves():
            total += sum(instance.repeats for instance in leaf.instances or ())
        return total


def load_suite(suite: Suite, tokenizer: Any = None) -> LoadedSuite:
    """Find the suite's tasks, apply its overrides, and read their data.

    Relative ``data_files`` are taken from the folder of the task file that names them. Prompts of
    RULER's tasks are sized by ``tokenizer``.
    Raises EvalError: no such folder, unknown task, data that cannot be loaded.
    """
    with quiet(), _own_draws():
        manager = _find_tasks(suite)
        with sandboxed_metrics(), tokenizer_folder(tokenizer) as folder:
            tasks = {
                task.name: _load_task(manager, task.name, folder) for task in _harnessed(suite)
            }
        loaded = LoadedSuite(suite, tasks, manager, questions=_questions(suite))
        _check_generation(loaded)
        unconfined = set()
        for entry, leaf in loaded.leaves():
            check_sentences(leaf.task_name)
            _override(entry, leaf)
            if runs_programs(leaf):
                # Also where a task's file does not say so: without it, nobody would be asked.
                leaf.UNSAFE_CODE = True
            if getattr(leaf, "UNSAFE_CODE", False) and not is_confined(leaf):
                unconfined.add(leaf.task_name)
    return replace(loaded, unconfined=frozenset(unconfined))


@contextlib.contextmanager
def _own_draws() -> Iterator[None]:
    """Leave the caller's generator as it was: libraries that tasks import may draw."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _harnessed(suite: Suite) -> list[SuiteTask]:
    return [task for task in suite.tasks if task.name != MT_BENCH]


def _questions(suite: Suite) -> tuple[Question, ...]:
    """Read the questions of MT-Bench, where it is to be run."""
    if suite.judge is not None and len(_harnessed(suite)) < len(suite.tasks):
        return load_questions(suite.judge, suite.limit)
    if not _harnessed(suite):
        raise EvalError(f"suite.judge: none, and {MT_BENCH} is the only task. Name a judge.")
    return ()


def load_configs(suite: Suite, configs: Sequence[Mapping[str, Any]]) -> LoadedSuite:
    """Make a suite's tasks from settings that are in no file; nothing else is read."""
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = TaskManager(include_defaults=False)
        loaded = manager.load([dict(config) for config in configs])
    return LoadedSuite(suite, loaded["tasks"], manager)


def shared_data(first: LoadedSuite, second: LoadedSuite) -> Iterator[tuple[str, str]]:
    """Yield pairs of tasks, one of each suite, that are scored on the same items.

    Told by data set, configuration, files and split: a task of another name may read the same.
    """
    known = {_data_of(leaf): entry.name for entry, leaf in second.leaves()}
    for entry, leaf in first.leaves():
        if (found := known.get(_data_of(leaf))) is not None:
            yield entry.name, found


def _data_of(leaf: Any) -> str:
    """What a task's items are read from, in words that can be compared."""
    # A task without a test split is scored on its validation split, as lm-eval does.
    split = leaf.get_config("test_split") or leaf.get_config("validation_split")
    found = [leaf.get_config("dataset_path"), leaf.get_config("dataset_name"), split]
    files = (leaf.get_config("dataset_kwargs") or {}).get("data_files")
    # Of files, those of the split alone: two tasks may name one file for different splits.
    found.append(files.get(split, files) if isinstance(files, dict) else files)
    if leaf.get_config("custom_dataset") is not None:
        # Items that a function makes have no data set's name.
        found.append(leaf.task_name)
    return repr(found)


def leaves_of(task: Any) -> list[Any]:
    """Return the tasks of a group and its groups, or the task itself."""
    from lm_eval.api.group import Group

    return list(task.get_all_tasks()) if isinstance(task, Group) else [task]


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
    names = [_original(task.name) for task in _harnessed(suite)]
    missing = [name for name in names if name not in local]
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


def _load_task(manager: Any, name: str, tokenizer: str | None) -> Any:
    """Load one task or group; make a task file's relative data files absolute first."""
    from datasets.exceptions import DatasetsError

    try:
        spec = _task_spec(manager, name, tokenizer)
        with drawn_alike(name):
            loaded = manager.load([spec])
    # lm-eval's tasks assert the versions of what they import, or say what to install.
    except (ImportError, AssertionError) as error:
        extra = "long-context" if _original(name).startswith(LONG_TASKS) else "suites"
        raise EvalError(
            f"suite.tasks: {name} needs further packages, or other versions. "
            f"Run pip install 'xlstm-distill[{extra}]'. ({_first_line(error)})"
        ) from error
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise EvalError(f"suite.tasks: {name} cannot be loaded: {_first_line(error)}") from error
    return loaded["groups"].get(name) or loaded["tasks"][name]


def check_sentences(name: str) -> None:
    """Refuse IFEval without the data by which it splits answers into sentences.

    lm-eval downloads it when the task is loaded. Where that fails it only prints a line, and stops
    when answers are scored.
    """
    if not name.endswith("ifeval"):
        return
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise EvalError(
            f"suite.tasks: {name} needs nltk's punkt_tab, which is not here and could not be "
            "downloaded. Run python -m nltk.downloader punkt_tab where there is a network, and "
            "set NLTK_DATA to its folder."
        ) from error


def _original(name: str) -> str:
    """Return the name of the lm-eval task that a task is, or is made from."""
    own = local_tasks().get(name)
    return name if own is None else own.original


def _task_spec(manager: Any, name: str, tokenizer: str | None) -> str | dict[str, Any]:
    """Return what lm-eval loads a task from: its name, or its settings.

    Settings are those of a task of our own, or those with absolute data files.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    entry, own = manager.task_index[_original(name)], local_tasks().get(name)
    if own is not None:
        return own.settings(load_yaml(entry.yaml_path), tokenizer)
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
    # Only what the suite names changes.
    changes = _generation(entry)
    if entry.max_gen_tokens is not None:
        changes["max_gen_toks"] = entry.max_gen_tokens
    if changes and leaf.get_config("output_type") == "generate_until":
        leaf.set_config(key="generation_kwargs", value=changes, update=True)


def _check_generation(loaded: LoadedSuite) -> None:
    """Refuse settings of answers for tasks that none of them would reach."""
    written = {
        entry.name
        for entry, leaf in loaded.leaves()
        if leaf.get_config("output_type") == "generate_until"
    }
    for entry in loaded.suite.tasks:
        if entry.name not in written and (given := _generation(entry)):
            field = "stop" if "until" in given else "generation"
            why = (
                "MT-Bench has settings of its own"
                if entry.name == MT_BENCH
                else "the task generates nothing, it compares probabilities"
            )
            raise EvalError(f"{entry.name}.{field}: {why}. Leave it out.")


def _generation(entry: SuiteTask) -> dict[str, Any]:
    """Return the settings of lm-eval's that a task's `generation` and `stop` replace."""
    given: dict[str, Any] = dict(entry.generation)
    found = {key: value for key, value in given.items() if value is not None}
    if "temperature" in found:
        # Tasks that are greedy say so, and lm-eval then reads no temperature.
        found.setdefault("do_sample", float(found["temperature"] or 0) > 0)
    if entry.stop is not None:
        found["until"] = list(entry.stop)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

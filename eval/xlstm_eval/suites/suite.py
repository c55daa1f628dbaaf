"""Suites: which tasks are run, and how. Plain data; `harness` runs them.

The fields have the names of the recipe's keys, so its section `evaluate` is passed on as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from xlstm_eval.problems import FieldError
from xlstm_eval.records import Chance, Frozen, Name

# Strict, since Python would take true for the number 1.
Shots = Annotated[int, Field(strict=True, ge=0)]
Tokens = Annotated[int, Field(strict=True, ge=1)]


class SuiteTask(Frozen):
    """Name one task, and what differs from its own file.

    ``shots`` and ``max_gen_tokens`` are lm-eval's ``num_fewshot`` and ``max_gen_toks``; None keeps
    the task's own. ``multiturn`` gives the examples as turns of a chat. ``metric`` and ``filter``
    pick the score to report (results.pick_metric says what happens without them). ``stop`` replaces
    the texts that end an answer, ``generation`` single settings of transformers' ``generate``, for
    example ``{"temperature": 0.6}``, which also draws answers at random; None keeps the task's own.
    ``chance`` is the score of guessing; None takes it from the choices of a multiple-choice task.
    """

    name: Name
    domain: Name | None = None
    shots: Shots | None = None
    max_gen_tokens: Tokens | None = None
    stop: tuple[Name, ...] | None = None
    generation: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    multiturn: bool = False
    metric: Name | None = None
    filter: Name | None = None
    chance: Chance | None = None


class Judge(Frozen):
    """Name the judge of MT-Bench: a model behind an OpenAI-compatible endpoint.

    ``questions`` is a JSONL file, or a data set of the hub with ``split``. ``api_key_env`` names
    the environment variable that holds the key. ``settings`` go into each request as they are.
    """

    endpoint: Name
    model: Name
    questions: Name
    split: Name = "train"
    api_key_env: Name = "OPENAI_API_KEY"
    settings: dict[str, Any] = Field(default_factory=lambda: dict(JUDGE_SETTINGS))
    workers: Annotated[int, Field(strict=True, ge=1)] = 8


JUDGE_SETTINGS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 2048}


class Suite(Frozen):
    """Name the tasks that teacher and students are measured on.

    ``include`` is a folder of lm-eval task files (YAML). If it holds every named task, nothing else
    is read. ``limit`` takes only the first items of each task. Tasks that run generated code
    (humaneval, mbpp, cruxeval) need ``confirm_run_unsafe_code``. Without a ``judge``, the task
    mt_bench is skipped.
    """

    name: Name = "suite"
    tasks: Annotated[tuple[SuiteTask, ...], Field(min_length=1)]
    include: Path | None = None
    limit: Annotated[int, Field(strict=True, ge=1)] | None = None
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    judge: Judge | None = None

    @model_validator(mode="after")
    def _tasks_are_unique(self) -> Self:
        first: dict[str, int] = {}
        for index, task in enumerate(self.tasks):
            if task.name in first:
                raise FieldError(
                    f"tasks[{index}].name",
                    f"{task.name!r} is already tasks[{first[task.name]}]. Give each task once.",
                )
            first[task.name] = index
        return self

    def domains(self) -> dict[str, str | None]:
        """Return each task's domain, in the suite's order."""
        return {task.name: task.domain for task in self.tasks}

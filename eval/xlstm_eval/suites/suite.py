"""Suites: which tasks are run, and how. Plain data; `harness` runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from xlstm_eval.records import Frozen, Name

Shots = Annotated[int, Field(strict=True, ge=0)]

Tokens = Annotated[int, Field(strict=True, ge=1)]


class SuiteTask(Frozen):
    """Name one task and what differs from its own file.

    ``metric`` and ``filter`` pick the score to report (harness.pick_metric says what happens without them).
    ``generation`` overrides single generation settings, for example ``{"temperature": 0.6, "do_sample": True}``.
    """

    name: Name
    domain: Name | None = None
    num_fewshot: Shots | None = None
    max_gen_toks: Tokens | None = None
    generation: dict[str, bool | int | float | str] = Field(default_factory=dict)
    fewshot_as_multiturn: bool = False
    metric: Name | None = None
    filter: Name | None = None


class Suite(Frozen):
    """Name the tasks that teacher and students are measured on.

    ``include_path`` is a folder of lm-eval task files (YAML); when it holds every named task, nothing else is read.
    ``limit`` takes the first so many items of each task. Tasks that run generated code (humaneval, mbpp, cruxeval)
    need ``confirm_run_unsafe_code``.
    """

    name: Name = "suite"
    tasks: Annotated[tuple[SuiteTask, ...], Field(min_length=1)]
    include_path: Path | None = None
    limit: Annotated[int, Field(strict=True, ge=1)] | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    confirm_run_unsafe_code: bool = False

    @model_validator(mode="after")
    def _tasks_are_unique(self) -> Self:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if (first := names.index(name)) < index:
                raise ValueError(
                    f"tasks[{index}].name: {name!r} is already tasks[{first}]. Give each task once."
                )
        return self

    def domains(self) -> dict[str, str | None]:
        """Return each task's domain, in the suite's order."""
        return {task.name: task.domain for task in self.tasks}

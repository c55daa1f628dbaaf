"""The sections for evaluation and report."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from xlstm_distill.recipe.fields import (
    Count,
    CountOrZero,
    FieldError,
    Flag,
    Folder,
    Fraction,
    Section,
    Text,
)


class EvalTask(Section):
    """One task of the evaluation, and what differs from its own file."""

    name: Text = Field(
        description="Name of the task: lm-eval's, or a YAML task's in the folder `include`."
    )
    domain: Text | None = Field(default=None, description="Group under which the report shows it.")
    shots: CountOrZero | None = Field(
        default=None, description="Examples in the prompt; null means the task's own number."
    )
    max_gen_tokens: Count | None = Field(
        default=None, description="Longest answer (tokens); null means the task's own."
    )
    multiturn: Flag = Field(default=False, description="Give the examples as turns of a chat.")
    metric: Text | None = Field(
        default=None, description="Score to report; null means the task's first."
    )
    filter: Text | None = Field(
        default=None, description="lm-eval filter whose answer counts; null means the task's first."
    )


class Evaluate(Section):
    """What teacher and students are measured on, with the same settings for both."""

    include: Folder | None = Field(
        default=None, description="Folder of lm-eval YAML tasks, relative to the recipe."
    )
    tasks: tuple[EvalTask, ...] = Field(min_length=1, description="The tasks.")
    batch: Count = Field(default=8, description="Prompts per forward pass.")
    apply_chat_template: Flag = Field(
        default=False, description="Wrap prompts in the teacher's chat template."
    )
    limit: Count | None = Field(
        default=None, description="Items of each task to use at most; null means all."
    )
    confirm_run_unsafe_code: Flag = Field(
        default=False, description="Allow tasks that run the code a model wrote."
    )
    experts: Flag = Field(
        default=True, description="Evaluate each expert too, not only the merged student."
    )

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if names.index(name) < index:
                raise FieldError(
                    f"tasks[{index}].name",
                    f"{name!r} is already tasks[{names.index(name)}]; keep one.",
                )
        return self


class Report(Section):
    """The report of a run."""

    title: Text | None = Field(
        default=None,
        description="Heading of the report; null means one made from the recipe's name.",
    )
    alphas: tuple[Fraction, ...] = Field(
        default=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
        min_length=1,
        description="Tolerances at which the Win-and-Tie rate is listed, ascending.",
    )

    @model_validator(mode="after")
    def _alphas_ascend(self) -> Self:
        if list(self.alphas) != sorted(set(self.alphas)):
            raise FieldError(
                "alphas",
                f"{list(self.alphas)} is not strictly ascending; sort it and drop repetitions.",
            )
        return self

"""The sections for evaluation and report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from xlstm_distill.recipe.fields import (
    Count,
    CountOrZero,
    FieldError,
    Flag,
    Folder,
    Fraction,
    NonNegative,
    Section,
    Text,
)


class EvalTask(Section):
    """One task of the evaluation, with settings that replace those of its own file."""

    name: Text = Field(
        description="Name of an lm-eval task, or of a YAML task in the folder `include`."
    )
    domain: Text | None = Field(
        default=None, description="Group in which the report shows the task."
    )
    shots: CountOrZero | None = Field(
        default=None, description="Examples in the prompt; null means the task's own number."
    )
    max_gen_tokens: Count | None = Field(
        default=None, description="Longest answer (tokens); null means the task's own length."
    )
    multiturn: Flag = Field(default=False, description="Write the examples as turns of a chat.")
    metric: Text | None = Field(
        default=None, description="Score to report; null means the task's first."
    )
    # One task can report the same metric under several filters (gsm8k: strict-match and
    # flexible-extract), with quite different scores.
    filter: Text | None = Field(
        default=None, description="lm-eval filter whose answer counts; null means the task's first."
    )
    # Not a part of the evaluation's fingerprint: it changes no answer.
    chance: Fraction | None = Field(
        default=None,
        lt=1,
        description="Score of guessing: a teacher that is not above it leaves nothing to compare; "
        "null means that of the choices, or 0 without choices.",
    )


class SpeedSettings(Section):
    """How long the decoding of the teacher and of the merged student is timed; no score depends on
    it, so that a change holds for evaluations that are made later."""

    seconds: NonNegative = Field(
        default=60.0,
        description="Seconds for each model, within which contexts double; 0 measures nothing.",
    )
    longest: Count = Field(
        default=32_768, ge=128, description="Longest context (tokens), from 128 on by doubling."
    )


class Evaluate(Section):
    """What teacher and students are measured on, under the same settings."""

    include: Folder | None = Field(
        default=None, description="Folder of lm-eval YAML tasks, relative to the recipe."
    )
    tasks: tuple[EvalTask, ...] = Field(min_length=1, description="The tasks.")
    batch: Count | Literal["auto"] = Field(
        default="auto",
        description="Prompts per forward pass; auto tries what fits the memory, 32 on a CPU.",
    )
    apply_chat_template: Flag = Field(
        default=False, description="Wrap prompts in the teacher's chat template."
    )
    limit: Count | None = Field(
        default=None, description="Maximum number of items of each task; null means all."
    )
    # False by default, as in lm-eval: humaneval and mbpp run what the model wrote, without a
    # sandbox.
    confirm_run_unsafe_code: Flag = Field(
        default=False, description="Allow tasks that run code which a model wrote."
    )
    experts: Flag = Field(
        default=True, description="Evaluate each expert too, not only the merged student."
    )
    # Not a part of the evaluation's fingerprint: no answer depends on it.
    speed: SpeedSettings = Field(
        default=SpeedSettings(),
        description="Memory and tokens a second of decoding over the context, for the report.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error for every task that is named a second time."""
        yield from repeated_tasks(self.tasks)


def repeated_tasks(tasks: Sequence[EvalTask]) -> Iterator[FieldError]:
    """Yield an error for every task that is named a second time."""
    names = [task.name for task in tasks]
    # Results are kept by task name, so a second entry would overwrite the first.
    for index, name in enumerate(names):
        first = names.index(name)
        if first < index:
            yield FieldError(
                f"tasks[{index}].name", f"{name!r} is already tasks[{first}]; keep one."
            )


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
    margin: Fraction = Field(
        default=0.02,
        description="Share of the teacher's score that may be lost, for the decision over all "
        "tasks.",
    )
    items: CountOrZero = Field(
        default=10_000,
        description="Most items (prompt and both answers) that the page holds, those on which the "
        "models differ first; 0 keeps prompts and answers out of it, as some benchmarks ask.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error if the tolerances do not ascend."""
        if list(self.alphas) != sorted(set(self.alphas)):
            yield FieldError(
                "alphas",
                f"{list(self.alphas)} is not strictly ascending; sort it and drop repetitions.",
            )

"""The sections for evaluation and report."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from xlstm_distill.recipe.fields import (
    Count,
    CountOrZero,
    FieldError,
    File,
    Flag,
    Folder,
    Fraction,
    HubOrPath,
    NonNegative,
    Positive,
    Section,
    ShareOfAll,
    Text,
)
from xlstm_eval.problems import did_you_mean
from xlstm_eval.records import EvalError
from xlstm_eval.suites import joined_settings, suite_names

SUITE_NAME: dict[str, Any] = {"enum": list(suite_names()), "type": "string"}
"""A suite's name in the schema. The field itself stays empty: the section takes the tasks."""

# The values of `xlstm_eval.long_context.settings`, which a recipe does not load.
NeedleKind = Literal["single", "multi-key", "multi-value", "multi-query"]
NEEDLE_KINDS: tuple[NeedleKind, ...] = ("single", "multi-key", "multi-value", "multi-query")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


class Generation(Section):
    """How a task's answers are made; null means the task's own setting."""

    temperature: NonNegative | None = Field(
        default=None, description="0 is greedy; above 0, tokens are drawn at random (seeded)."
    )
    top_p: ShareOfAll | None = Field(
        default=None, description="Draw from the most probable tokens that have this much mass."
    )
    top_k: CountOrZero | None = Field(
        default=None, description="Draw from so many of the most probable tokens; 0 means all."
    )
    min_p: Fraction | None = Field(
        default=None, description="Draw from tokens of at least this share of the best one's mass."
    )
    repetition_penalty: Positive | None = Field(
        default=None, description="Above 1, tokens that are there already become less probable."
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error for settings of draws where nothing says that tokens are drawn.

        Some tasks draw by themselves; which ones, only lm-eval knows, and a recipe is read without
        it. So the temperature must stand beside.
        """
        for name in ("top_p", "top_k", "min_p"):
            if getattr(self, name) is not None and not self.temperature:
                yield FieldError(
                    name,
                    "has no effect on greedy answers; give a temperature above 0 beside it, or "
                    "leave it out.",
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
    stop: tuple[Text, ...] | None = Field(
        default=None,
        description="Texts that end an answer, beside the end of text; null means the task's own.",
    )
    generation: Generation = Field(
        default=Generation(), description="Settings of sampling that replace the task's own."
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

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error for settings that MT-Bench would not take."""
        if self.name == "mt_bench":
            for name, given in (
                ("generation", self.generation != Generation()),
                ("stop", self.stop),
            ):
                if given:
                    yield FieldError(name, "MT-Bench has settings of its own; leave it out.")


class Judge(Section):
    """The judge of the task `mt_bench`: a model behind an OpenAI-compatible endpoint."""

    endpoint: Text = Field(description="Address, as `http://localhost:8000/v1`.")
    model: Text = Field(description="Name of the judge at the endpoint.")
    questions: HubOrPath = Field(
        description="MT-Bench's questions: a JSONL file with `turns` and `category`, relative to "
        "the recipe, or a data set of the hub."
    )
    split: Text = Field(default="train", description="Split of the data set.")
    api_key_env: Text = Field(
        default="OPENAI_API_KEY",
        description="Environment variable that holds the API key, which is never written.",
    )
    settings: dict[str, bool | int | float | str | None] = Field(
        default={"temperature": 0.0, "max_tokens": 2048},
        description="Further fields of each request; null leaves one out (`seed: null`).",
    )
    workers: Count = Field(default=8, description="Requests at the same time.")

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error for an address that is none, or that holds a secret."""
        address = urllib.parse.urlsplit(self.endpoint)
        if address.scheme not in ("http", "https") or not address.hostname:
            yield FieldError("endpoint", f"{self.endpoint!r}; give http://HOST:PORT/v1.")
        # The recipe is saved in the run directory and shown in the report.
        if address.username or address.password or address.query:
            yield FieldError(
                "endpoint",
                "has a user, a password or a query; give the address alone, and the key in the "
                f"environment variable {self.api_key_env}.",
            )
        if not self.api_key_env.isidentifier():
            yield FieldError(
                "api_key_env", "must be the name of an environment variable, not the key itself."
            )


class LongContext(Section):
    """Needles in long texts, and loss by position, beside the tasks."""

    lengths: tuple[Count, ...] = Field(
        default=LENGTHS,
        min_length=1,
        description="Tokens of prompt and answer, ascending; what the teacher's context does not "
        "hold is left out.",
    )
    kinds: tuple[NeedleKind, ...] = Field(
        default=NEEDLE_KINDS,
        description="Kinds of needles: one key, several keys, values, or questions.",
    )
    items: Count = Field(default=100, description="Items of each kind and length.")
    documents: CountOrZero = Field(
        default=16, description="Documents of the greatest length for the loss by position."
    )
    seed: CountOrZero = Field(default=0, description="Seed of items and documents.")
    haystack: File | None = Field(
        default=None,
        description="Text file (UTF-8) for haystacks and documents; null means synthetic "
        "sentences.",
    )

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error for lengths out of order, a kind given twice, or nothing to measure."""
        if list(self.lengths) != sorted(set(self.lengths)):
            yield FieldError(
                "lengths",
                f"{list(self.lengths)} is not strictly ascending; sort, drop repetitions.",
            )
        if len(set(self.kinds)) < len(self.kinds):
            yield FieldError("kinds", f"{list(self.kinds)} names a kind twice; keep one.")
        if not self.kinds and not self.documents:
            yield FieldError("documents", "0, and kinds is empty: nothing would be measured.")


class SpeedSettings(Section):
    """How long the decoding of the teacher and of the merged student is timed; no score depends on
    it, so that a change holds for evaluations that are made later."""

    seconds: NonNegative = Field(
        default=20.0,
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
    # Not kept: the recipe that a run saves holds the suite's tasks, so a later version of the suite
    # changes no run that has begun.
    suite: tuple[Text, ...] | None = Field(
        default=None,
        exclude=True,
        json_schema_extra={
            "anyOf": [SUITE_NAME, {"items": SUITE_NAME, "type": "array"}, {"type": "null"}]
        },
        description="A suite that comes with the package, or several: tasks, "
        "`apply_chat_template` and `long_context` are theirs where the recipe does not say.",
    )
    leave_out: tuple[Text, ...] = Field(
        default=(),
        exclude=True,
        description="Tasks of the suite to leave out: names, or patterns such as `longbench_*`.",
    )
    tasks: tuple[EvalTask, ...] = Field(
        default=(),
        description="The tasks. With a suite: further tasks, and tasks of the suite by name, with "
        "the settings that differ.",
    )
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
    # False by default, as in lm-eval: humaneval, mbpp and cruxeval run what the model wrote.
    confirm_run_unsafe_code: Flag = Field(
        default=False,
        description="Allow tasks that run code which a model wrote, in a sandbox; "
        "`--run-code` does the same.",
    )
    judge: Judge | None = Field(
        default=None, description="Judge of `mt_bench`, which is skipped without one."
    )
    long_context: LongContext | None = Field(
        default=None,
        description="Needles in long texts, and loss by position ([long-context.md]"
        "(long-context.md)); null means none.",
    )
    experts: Flag = Field(
        default=True, description="Evaluate each expert too, not only the merged student."
    )
    # Not a part of the evaluation's fingerprint: no answer depends on it.
    speed: SpeedSettings = Field(
        default=SpeedSettings(),
        description="Memory and tokens a second of decoding over the context, for the report.",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_tasks_of_suite(cls, data: Any, info: ValidationInfo) -> Any:
        """Replace the name of a suite by its tasks."""
        if not isinstance(data, Mapping) or not (names := _suites(data.get("suite"))):
            return data
        own = data.get("tasks") or []
        left_out = data.get("leave_out") or []
        # What is no list of mappings or of names is said by its field.
        if not _are_named(own) or not isinstance(left_out, list | tuple):
            return {key: value for key, value in data.items() if key != "suite"}
        settings = _settings_of(names, [str(name) for name in left_out], data.get("include"), info)
        rest = {key: value for key, value in data.items() if key not in ("suite", "leave_out")}
        # A recipe's own keys of the section replace the suite's one by one; null leaves it out.
        long = rest.get("long_context")
        if isinstance(long, Mapping) and "long_context" in settings:
            rest["long_context"] = settings["long_context"] | long
        return settings | rest | {"tasks": merged_tasks(settings["tasks"], own)}

    def broken_rules(self) -> Iterator[FieldError]:
        """Yield an error where there are no tasks, or a task is named a second time."""
        if not self.tasks:
            allowed = ", ".join(suite_names())
            yield FieldError("tasks", f"missing; name a suite ({allowed}) or list tasks.")
        if self.leave_out:
            yield FieldError("leave_out", "leaves tasks out of a suite; name one in `suite`.")
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


def _suites(value: Any) -> list[str]:
    """Return the suites that a recipe names; none where its field says what is wrong with them."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return []
    for name in names:
        if name not in suite_names():
            raise FieldError("suite", f"{name!r} is unknown. {did_you_mean(name, suite_names())}")
    if len(set(names)) < len(names):
        raise FieldError("suite", f"{list(names)} names a suite twice; keep one.")
    return list(names)


def _settings_of(
    suites: list[str], left_out: list[str], include: Any, info: ValidationInfo
) -> dict[str, Any]:
    """Read suites; a folder of tasks is relative to the recipe's."""
    beside: Path = (info.context or {}).get("folder") or Path()
    folder = beside / Path(include).expanduser() if isinstance(include, str) else None
    try:
        return joined_settings(suites, folder, left_out)
    except EvalError as error:
        raise FieldError("suite", str(error).removeprefix("suite: ")) from None


def merged_tasks(suite: list[Any], own: list[Any]) -> list[Any]:
    """Return a suite's tasks with the recipe's own settings, and then the recipe's other tasks."""
    changes = {task["name"]: task for task in own}
    names = [task["name"] for task in suite]
    merged = [task | changes.get(task["name"], {}) for task in suite]
    # Named twice, one stays as it is, and is refused as a task that is already there.
    rest = [task for task in own if task["name"] not in names or changes[task["name"]] is not task]
    return merged + rest


def _are_named(tasks: Any) -> bool:
    """Tell whether these are mappings with names, as far as a suite is merged with them."""
    if not isinstance(tasks, list | tuple):
        return False
    return all(isinstance(task, Mapping) and isinstance(task.get("name"), str) for task in tasks)


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

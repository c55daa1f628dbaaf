"""The recipe: everything a run is made from, validated where it is declared. Imports no torch.

Sections are immutable, numbers strict, unknown keys errors; `recipe_io.load_recipe` reads a YAML file into a `Recipe`.
The reference of all fields, `docs/recipes.md`, is generated from the descriptions here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from xlstm_distill.recipe_fields import (
    Count,
    CountOrZero,
    FieldError,
    Flag,
    Folder,
    Fraction,
    HubOrPath,
    Name,
    Number,
    Positive,
    Section,
    Text,
)
from xlstm_distill.recipe_training import (
    Align,
    Capture,
    Distill,
    Expert,
    Merge,
    Optimization,
    Phase,
    Training,
)

__all__ = [
    "Align", "Capture", "Data", "Distill", "Domain", "Evaluate", "Expert", "Merge", "MixerConfig", "Optimization",
    "Phase", "Recipe", "Report", "Source", "Student", "Task", "Teacher", "Training",
]  # fmt: skip
SUM_TOLERANCE = 1e-6
USED_BY_GENERATORS = ("generator", "documents", "weight")
LongDocuments = Literal["split", "truncate", "drop", "error"]


class Teacher(Section):
    """The causal language model to distill: Llama, Qwen2, Qwen3, Olmo2 or Olmo3."""

    path: HubOrPath = Field(description="Local directory, relative to the recipe, or hub id `owner/name`.")
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit on the hub; pin it to reproduce a run."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Number format of the weights."
    )
    trust_remote_code: Flag = Field(default=False, description="Run code that comes with the teacher.")


class MixerConfig(Section):
    """The mixer that takes the place of every attention layer (paper, Eq. 11)."""

    window: Count = Field(
        default=512, description="Keys each query sees in the window branch, itself included (tokens)."
    )
    sinks: CountOrZero = Field(default=4, description="First tokens of each document that stay visible (tokens).")
    feature_map: Literal["softmax", "hedgehog"] = Field(
        default="softmax",
        description="Map of queries and keys for the mLSTM branch, after a linear map per head: `softmax` over "
        "features (the paper's), or `hedgehog`, softmax of x and of -x side by side.",
    )
    feature_dim: Count | None = Field(
        default=None, description="Width of the linear map; null means the head's dimension."
    )
    forget_bias: Number = Field(default=3.0, description="Initial bias of the forget gate (before the sigmoid).")
    output_gate_bias: Number = Field(
        default=-2.0,
        description="Initial bias of the output gate (before the sigmoid); below 0 starts near window attention.",
    )
    branches: tuple[Literal["mlstm", "window"], ...] = Field(
        default=("mlstm", "window"),
        min_length=1,
        description="Branches to use; both is the paper's mixer, one is an ablation.",
    )

    @model_validator(mode="after")
    def _branches_differ(self) -> Self:
        if len(set(self.branches)) < len(self.branches):
            raise FieldError("branches", f"{list(self.branches)} names a branch twice; name each once.")
        return self


class Student(Section):
    """The student: the teacher with other mixers."""

    mixer: MixerConfig = Field(default_factory=MixerConfig, description="The mixer of every layer.")


class Source(Section):
    """Documents from the hub, a local file or folder, or an embedded generator.

    Without column names the first of these that the data has is used: `messages`; `prompt` and `response`; `text`.
    """

    path: HubOrPath | None = Field(
        default=None, description="Hub id, local file or folder; paths are relative to the recipe."
    )
    generator: Literal["math", "code", "stem", "chat"] | None = Field(
        default=None, description="An embedded domain instead."
    )
    name: Text | None = Field(default=None, description="Configuration (subset) of the data set.")
    split: Text = Field(default="train", description="Split of the data set.")
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit on the hub; pin it to reproduce a run."
    )
    streaming: Flag = Field(
        default=True,
        description="Read hub data as it is needed; false downloads all of it first, and finds it again offline.",
    )
    weight: Positive = Field(default=1.0, description="Share of the domain's tokens, relative to its other sources.")
    documents: Count | None = Field(default=None, description="Documents to read at most; a generator needs it.")
    text: Text | None = Field(default=None, description="Column that holds plain text.")
    prompt: Text | None = Field(default=None, description="Column that holds the prompt; with `response`.")
    response: Text | None = Field(default=None, description="Column that holds the response; with `prompt`.")
    system: Text | None = Field(
        default=None, description="Column that holds a system message, to stand before `prompt`; empty means none."
    )
    messages: Text | None = Field(default=None, description="Column that holds chat messages (role, content).")
    sample_by: Literal["line", "paragraph", "document"] = Field(
        default="line",
        description="What a document is in local `.txt` files: a line, a paragraph (up to an empty line), or a file.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.generator is None):
            found = "neither" if self.path is None else "both"
            raise FieldError("", f"has {found} of 'path' and 'generator'; give exactly one.")
        if self.generator is None:
            return self
        if self.documents is None:
            raise FieldError("documents", "missing; a generator needs the number of documents to make.")
        fields = {name: field for name, field in type(self).model_fields.items() if name not in USED_BY_GENERATORS}
        if unused := [name for name, field in fields.items() if getattr(self, name) != field.default]:
            raise FieldError(unused[0], "does not apply to a generator; leave it out.")
        return self

    @model_validator(mode="after")
    def _hub_settings(self) -> Self:
        """A local path comes absolute from validation; what only the hub has must not be ignored there."""
        if self.path is not None and Path(self.path).is_absolute():
            for field in ("name", "revision", "streaming"):
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise FieldError(field, f"does not apply to the local path {self.path}; leave it out.")
        elif self.path is not None and self.sample_by != "line":
            raise FieldError("sample_by", f"does not apply to {self.path!r} on the hub, only to local files.")
        return self

    @model_validator(mode="after")
    def _one_style(self) -> Self:
        if (self.prompt is None) != (self.response is None):
            missing = "prompt" if self.prompt is None else "response"
            raise FieldError(missing, "missing; 'prompt' and 'response' go together.")
        if self.system is not None and self.prompt is None:
            raise FieldError("system", "given without 'prompt' and 'response'; it stands before a prompt.")
        styles = [name for name in ("text", "prompt", "messages") if getattr(self, name) is not None]
        if len(styles) > 1:
            raise FieldError(styles[1], f"given beside '{styles[0]}'; name the columns of one style only.")
        return self


class Domain(Section):
    """A named kind of text, mixed from sources by tokens."""

    sources: tuple[Source, ...] = Field(min_length=1, description="Where the documents come from.")
    weights_sum: Positive | None = Field(
        default=None,
        description="What the sources' weights must sum to where they are meant as shares: 1 or 100, say; null lets "
        "them be relative.",
    )

    @model_validator(mode="after")
    def _weights_add_up(self) -> Self:
        total = math.fsum(source.weight for source in self.sources)
        if self.weights_sum is not None and abs(total - self.weights_sum) > SUM_TOLERANCE * self.weights_sum:
            raise FieldError(
                "weights_sum",
                f"the sources' weights sum to {total:.6g}, not {self.weights_sum:.6g}; mend them, or leave weights_sum "
                "out to have them relative.",
            )
        return self


class Data(Section):
    """The text: domains, packed into rows of a fixed number of tokens."""

    context: int = Field(strict=True, ge=2, description="Length of a packed row (tokens).")
    domains: dict[Name, Domain] = Field(min_length=1, description="Domains by name.")
    validation_rows: Count = Field(default=64, description="Rows of each domain held out for validation (rows).")
    long_documents: LongDocuments = Field(
        default="split",
        description="What happens to a document longer than `context`: `split` into rows of its own, nothing lost; "
        "`truncate` to its first `context` tokens; `drop`; or `error`.",
    )
    workers: CountOrZero | None = Field(
        default=None,
        description="Processes that tokenise beside the main one; 0 means none, null one per free core (at most 16) "
        "where there is enough text. The rows are the same for any number.",
    )


class Task(Section):
    """One task of the evaluation, and what differs from its own file."""

    name: Text = Field(description="Name of the task: lm-eval's, or a YAML task's in the folder `include`.")
    domain: Text | None = Field(default=None, description="Group under which the report shows it.")
    shots: CountOrZero | None = Field(
        default=None, description="Examples in the prompt; null means the task's own number."
    )
    max_gen_tokens: Count | None = Field(
        default=None, description="Longest answer (tokens); null means the task's own."
    )
    multiturn: Flag = Field(default=False, description="Give the examples as turns of a chat.")
    metric: Text | None = Field(default=None, description="Score to report; null means the task's first.")
    filter: Text | None = Field(
        default=None, description="lm-eval filter whose answer counts; null means the task's first."
    )


class Evaluate(Section):
    """What teacher and students are measured on, with the same settings for both."""

    include: Folder | None = Field(default=None, description="Folder of lm-eval YAML tasks, relative to the recipe.")
    tasks: tuple[Task, ...] = Field(min_length=1, description="The tasks.")
    batch: Count = Field(default=8, description="Prompts per forward pass.")
    apply_chat_template: Flag = Field(default=False, description="Wrap prompts in the teacher's chat template.")
    limit: Count | None = Field(default=None, description="Items of each task to use at most; null means all.")
    confirm_run_unsafe_code: Flag = Field(default=False, description="Allow tasks that run the code a model wrote.")
    experts: Flag = Field(default=True, description="Evaluate each expert too, not only the merged student.")

    @model_validator(mode="after")
    def _tasks_differ(self) -> Self:
        names = [task.name for task in self.tasks]
        for index, name in enumerate(names):
            if names.index(name) < index:
                raise FieldError(f"tasks[{index}].name", f"{name!r} is already tasks[{names.index(name)}]; keep one.")
        return self


class Report(Section):
    """The report of a run."""

    title: Text | None = Field(
        default=None, description="Heading of the report; null means one made from the recipe's name."
    )
    alphas: tuple[Fraction, ...] = Field(
        default=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
        min_length=1,
        description="Tolerances at which the Win-and-Tie rate is listed, ascending.",
    )

    @model_validator(mode="after")
    def _alphas_ascend(self) -> Self:
        if list(self.alphas) != sorted(set(self.alphas)):
            raise FieldError("alphas", f"{list(self.alphas)} is not strictly ascending; sort it and drop repetitions.")
        return self


class Recipe(Section):
    """One run, from teacher to report."""

    name: Name = Field(description="Name of the recipe; the run directory is `runs/NAME` unless given.")
    seed: int = Field(default=0, strict=True, ge=0, lt=2**32, description="Seed of everything random.")
    teacher: Teacher = Field(description="The model to distill.")
    student: Student = Field(default_factory=Student, description="The student's architecture.")
    data: Data = Field(description="The text to train on.")
    capture: Capture = Field(default_factory=Capture, description="Teacher targets.")
    align: Align = Field(description="Stage I.")
    distill: Distill = Field(description="Stage II.")
    merge: Merge = Field(default_factory=Merge, description="Stage III.")
    training: Training = Field(default_factory=Training, description="Checkpoints and logs of stages I and II.")
    evaluate: Evaluate = Field(description="The evaluation.")
    report: Report = Field(default_factory=Report, description="The report.")

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        mixer = self.student.mixer
        if "window" in mixer.branches and mixer.window >= self.data.context:
            raise FieldError(
                "student.mixer.window", f"{mixer.window} must be below data.context ({self.data.context})."
            )
        if not self.distill.kl_tail and self.capture.mass is not None:
            raise FieldError(
                "distill.kl_tail",
                f"false renormalises over targets that capture.mass ({self.capture.mass:g}) cuts to a few tokens, and "
                "leaves little of the KL divergence; set capture.mass to null, or distill.kl_tail to true.",
            )
        self._check_domains("align.domains", self.align.domains or {})
        self._check_steps("align", self.align, self.align.tokens)
        for name, expert in self.distill.experts.items():
            for index, phase in enumerate(expert.phases):
                self._check_domains(f"distill.experts.{name}.phases[{index}].domains", phase.domains)
                self._check_tokens(f"distill.experts.{name}.phases[{index}].tokens", phase.tokens, self.distill.batch)
            self._check_steps("distill", self.distill, expert.tokens)
        return self

    @model_validator(mode="after")
    def _merge_fits_experts(self) -> Self:
        weights, experts = self.merge.weights, self.distill.experts
        if weights == "uniform":
            return self
        if unknown := [name for name in weights if name not in experts]:
            raise FieldError(f"merge.weights.{unknown[0]}", f"no such expert. Experts: {', '.join(experts)}.")
        if missing := [name for name in experts if name not in weights]:
            raise FieldError("merge.weights", f"no weight for expert {missing[0]!r}; give one (0 leaves it out).")
        total = math.fsum(weights.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise FieldError("merge.weights", f"they sum to {total:.6g}; they must sum to 1.")
        return self

    def _check_domains(self, field: str, mixture: dict[str, float]) -> None:
        known = self.data.domains
        if unknown := [name for name in mixture if name not in known]:
            raise FieldError(f"{field}.{unknown[0]}", f"no such domain. Domains: {', '.join(known)}.")

    def _check_tokens(self, field: str, tokens: int, batch: int) -> None:
        step = batch * self.data.context
        if tokens < step:
            raise FieldError(field, f"{tokens} is less than one optimiser step (batch x data.context = {step} tokens).")

    def _check_steps(self, section: str, settings: Optimization, tokens: int) -> None:
        self._check_tokens(f"{section}.tokens", tokens, settings.batch)
        steps = math.ceil(tokens / (settings.batch * self.data.context))
        if settings.warmup_steps >= steps:
            raise FieldError(
                f"{section}.warmup_steps", f"{settings.warmup_steps} must be below the {steps} steps there are."
            )

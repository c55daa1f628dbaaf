"""`validate`: check a recipe's keys, files, teacher, data and tasks, and show prepared examples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from xlstm_distill.cli.failures import USER_ERROR, one_line_errors
from xlstm_distill.cli.options import AsJson, Debug, Overrides, RecipePath
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import Console

if TYPE_CHECKING:
    from rich.text import Text

    from xlstm_distill.data.preview import Example, SourcePreview
    from xlstm_distill.recipe import MergeSettings, Recipe

EXAMPLES = 3
"""Prepared documents to show of each source."""
MOST_CHARACTERS = 300
"""Longest piece of an example that is shown whole."""


@dataclass
class Findings:
    """What was found: the problems, and what teacher, data and tasks are."""

    recipe: str
    problems: list[str] = field(default_factory=list)
    teacher: dict[str, str] = field(default_factory=dict)
    sources: list[SourcePreview] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the findings as JSON."""
        return {"valid": not self.problems, **asdict(self)}


def validate(
    recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Check a recipe before a run: keys, files, teacher, data and tasks.

    Shows three prepared examples of every source, and which of their tokens are supervised. Writes
    nothing. Exits with 2 if there are problems, after listing all of them.
    """
    with one_line_errors(debug):
        from xlstm_distill.recipe import load_recipe

        console = Console()
        try:
            loaded = load_recipe(recipe, overrides or ())
        except UserError as error:
            if not as_json:
                raise
            findings = Findings(str(recipe), list(error.problems))
        else:
            if not as_json:
                # The libraries that read the rest take seconds to load.
                console.line(f"{loaded.name}: keys and files are valid; reading data and tasks.")
            findings = examine(loaded)
        if as_json:
            typer.echo(json.dumps(findings.to_json(), indent=2, ensure_ascii=False))
            # The JSON holds the problems, so nothing goes to stderr.
            raise typer.Exit(USER_ERROR if findings.problems else 0)
        for line in _lines(findings):
            console.rich().print(line, soft_wrap=True)
        if findings.problems:
            raise UserError(*findings.problems)
        console.line(f"{findings.recipe}: valid.")


def examine(recipe: Recipe) -> Findings:
    """Check a recipe's teacher, data and tasks; the problems are collected, not raised."""
    from xlstm_distill.data.preview import preview_sources
    from xlstm_distill.models.teacher import check_teacher
    from xlstm_distill.runtime.libraries import quiet_libraries
    from xlstm_distill.stages.lineage import Lineage
    from xlstm_distill.stages.workbench import check_kept

    quiet_libraries()
    findings = Findings(recipe.name, tasks=[task.name for task in recipe.evaluate.tasks])
    lineage = Lineage(recipe)
    try:
        tokenizer = lineage.tokenizer
        family = _teacher_config(recipe).model_type
        check_teacher(recipe.teacher)
        check_kept(recipe)
    except (UserError, OSError) as error:
        # Without a tokenizer there is nothing to prepare examples with, or to measure tasks by.
        findings.problems += error.problems if isinstance(error, UserError) else [str(error)]
        return findings
    findings.teacher = {"path": recipe.teacher.path, "family": family}
    findings.sources = preview_sources(recipe, tokenizer, EXAMPLES)
    findings.problems += [source.problem for source in findings.sources if source.problem]
    findings.problems += _task_problems(recipe)
    findings.problems += _tuning_problems(recipe)
    return findings


def _teacher_config(recipe: Recipe) -> Any:
    from transformers import AutoConfig

    teacher = recipe.teacher
    return AutoConfig.from_pretrained(
        teacher.path,
        revision=teacher.revision or "main",
        trust_remote_code=teacher.trust_remote_code,
    )


def _task_problems(recipe: Recipe) -> list[str]:
    """Check all tasks together; if that fails, check each alone to list every problem."""
    first = _task_problem(recipe)
    if first is None:
        return []
    found = []
    for task in recipe.evaluate.tasks:
        # Without a judge it is skipped, so alone it would leave nothing.
        if task.name == "mt_bench" and recipe.evaluate.judge is None:
            continue
        alone = recipe.evaluate.model_copy(update={"tasks": (task,)})
        problem = _task_problem(recipe.model_copy(update={"evaluate": alone}))
        if problem is not None:
            found.append(problem)
    # A problem can lie in the tasks together: then each alone passes, and the first finding stands.
    return list(dict.fromkeys(found)) or [first]


def _task_problem(recipe: Recipe) -> str | None:
    from xlstm_distill.stages.evaluate import check_tasks
    from xlstm_distill.stages.lineage import Lineage
    from xlstm_eval.records import EvalError

    try:
        check_tasks(Lineage(recipe))
    except (EvalError, UserError, OSError) as error:
        return str(error)
    return None


def _tuning_problems(recipe: Recipe) -> list[str]:
    """Check what merge weights would be tuned on."""
    from xlstm_distill.stages.weights.validation import check_tuning
    from xlstm_eval.records import EvalError

    merges: dict[str, MergeSettings] = {"merge": recipe.merge}
    merges |= {f"variant/{name}": variant for name, variant in recipe.merge.variants.items()}
    found = []
    for label, merge in merges.items():
        try:
            if merge.found == "tuned":
                check_tuning(recipe, label, merge.tuning)
        except (EvalError, UserError, OSError) as error:
            found.append(str(error))
    return found


def _lines(findings: Findings) -> Iterator[Text]:
    """Lay out tasks and sources, line by line; what is supervised is green on a terminal."""
    from rich.text import Text

    if findings.teacher:
        yield Text("teacher.path: {path} ({family})".format(**findings.teacher))
    yield Text(f"evaluate.tasks: {', '.join(findings.tasks)}")
    for source in findings.sources:
        columns = ", ".join(
            column if column == role else f"{column} as {role}"
            for role, column in source.columns.items()
        )
        yield Text(
            f"{source.field}: {source.origin}" + (f" (columns: {columns})" if columns else "")
        )
        for number, example in enumerate(source.examples, start=1):
            yield from _example_lines(number, example)
        if source.left_out:
            yield Text(f"  {source.left_out}")


def _example_lines(number: int, example: Example) -> Iterator[Text]:
    from rich.text import Text

    yield Text(
        f"  example {number}: {example.tokens} tokens, {example.supervised} of them supervised",
        style="bold",
    )
    for text, supervised in example.pieces:
        head = "supervised" if supervised else "context"
        style = "green" if supervised else "dim"
        for line in printable(text).splitlines() or [""]:
            yield Text.assemble(f"    {head:<10} | ", (line, style))
            head = ""


def printable(text: str) -> str:
    """Shorten a long piece in its middle, and write control characters as escapes."""
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        hidden = len(text) - 2 * half
        text = f"{text[:half]} [... {hidden} characters ...] {text[-half:]}"
    return "".join(
        letter
        # Text from a data set must not send control sequences to the terminal.
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )

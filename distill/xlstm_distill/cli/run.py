"""`run` and the commands of the single stages: parse, check, call the stage, say how it ended."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xlstm_distill.cli import completion, reports
from xlstm_distill.cli.failures import in_run, one_line_errors
from xlstm_distill.cli.options import (
    Debug,
    Full,
    Overrides,
    RecipePath,
    Replace,
    RunCode,
    RunPath,
    with_consent,
)
from xlstm_distill.cli.processes.launch import LaunchArgs, LaunchConfig, dispatch
from xlstm_distill.cli.processes.preflight import check_batches, check_words
from xlstm_distill.runtime.console import Console, QuietConsole
from xlstm_distill.runtime.libraries import quiet_libraries
from xlstm_distill.runtime.ranks import is_main_process, process_count

if TYPE_CHECKING:
    from xlstm_distill.artifacts import Run
    from xlstm_distill.recipe import Recipe
    from xlstm_distill.stages.lineage import Lineage

STAGES = ("capture", "align", "distill", "refine", "merge", "evaluate", "report")

Check = Callable[["Recipe", int], None]
"""Raises UserError if a recipe and a number of processes do not fit."""


@dataclass(frozen=True)
class Invocation:
    """What the user asked for, whichever the stage."""

    recipe: Path
    run_dir: Path | None
    overrides: Sequence[str] | None
    launch: Path | None = None
    launch_args: str = ""
    replace: bool = False

    def directory(self, recipe: Recipe) -> Path:
        """Return the run directory: the one given, or that of the recipe's name."""
        return self.run_dir or Path("runs") / recipe.name

    def check(self, stages: Sequence[str], **options: Any) -> Check:
        """Make the check that runs once the recipe and the number of processes are known.

        `options` are the arguments that a single stage alone takes.
        """
        expert = options.get("expert")

        def check(recipe: Recipe, processes: int) -> None:
            # Before the run directory changes: a word that is refused must leave no trace.
            check_words(recipe, stages[0], **options)
            check_batches(recipe, stages, processes, self.directory(recipe), expert=expert)

        return check

    def dispatch(self, check: Check) -> None:
        """Start several processes and exit as they do, if the user wants several."""
        dispatch(self.launch, self.launch_args, self.recipe, self.overrides, check)


def with_all_items(overrides: Sequence[str] | None, full: bool) -> Sequence[str] | None:
    """Add the override that `--full` stands for; it is the last, so it counts."""
    return [*(overrides or ()), "evaluate.limit=null"] if full else overrides


def run(
    recipe: RecipePath,
    run_dir: RunPath = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    full: Full = False,
    run_code: RunCode = False,
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Run all stages, from teacher to report; finished stages are skipped."""
    with one_line_errors(debug):
        changes = with_consent(with_all_items(overrides, full), run_code)
        asked = Invocation(recipe, run_dir, changes, launch, launch_args, replace)
        check = asked.check(STAGES)
        asked.dispatch(check)
        console = make_console()
        lineage, opened = _open(asked, console, check)
        # Before the first stage: a misspelt task would otherwise show after days of training.
        for stage in ("evaluate", "merge"):
            _stage_module(stage).check(lineage, opened)
        stages = [name for name in STAGES if name != "refine" or lineage.refined()]
        for number, stage in enumerate(stages, start=1):
            console.stage = f"stage {number} of {len(stages)}"
            console.line(f"{console.stage}: {stage}")
            _run_stage(stage, lineage, opened, console)
        _print_summary(opened.directory, console)


Share = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Do share I (0 to N - 1) of N, for a Slurm array.",
        show_default="all",
    ),
]

DomainShare = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Do share I (0 to N - 1) of N, for a Slurm array. A share is whole domains, so N is "
        "at most their number; each domain uses the cores of its machine.",
        show_default="all",
    ),
]


def prepare(
    recipe: RecipePath,
    run_dir: RunPath = None,
    shard: DomainShare = None,
    overrides: Overrides = None,
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Tokenise and pack the text of all domains, on CPUs alone; the other stages find it."""
    asked = Invocation(recipe, run_dir, overrides, replace=replace)
    _one_stage("prepare", asked, debug, shard=shard)


def capture(
    recipe: RecipePath,
    run_dir: RunPath = None,
    shard: Share = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Store the teacher's sparse next-token targets."""
    asked = Invocation(recipe, run_dir, overrides, launch, launch_args, replace)
    _one_stage("capture", asked, debug, shard=shard)


def align(
    recipe: RecipePath,
    run_dir: RunPath = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Teach each mixer its teacher layer's attention output (stage I)."""
    asked = Invocation(recipe, run_dir, overrides, launch, launch_args, replace)
    _one_stage("align", asked, debug)


def distill(
    recipe: RecipePath,
    run_dir: RunPath = None,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train this expert alone (or its index, from 0).",
            show_default="all, one by one",
            autocompletion=completion.experts,
        ),
    ] = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Train the experts from the aligned student (stage II)."""
    asked = Invocation(recipe, run_dir, overrides, launch, launch_args, replace)
    _one_stage("distill", asked, debug, expert=expert)


def refine(
    recipe: RecipePath,
    run_dir: RunPath = None,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Refine this expert alone (or its index among the refined ones, from 0).",
            show_default="all, one by one",
            autocompletion=completion.experts,
        ),
    ] = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Refine experts on text that they sample themselves (optional; between stages II and III)."""
    asked = Invocation(recipe, run_dir, overrides, launch, launch_args, replace)
    _one_stage("refine", asked, debug, expert=expert)


def merge(
    recipe: RecipePath,
    run_dir: RunPath = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Merge the experts into one student (stage III). Only tuned weights use several processes."""
    asked = Invocation(recipe, run_dir, overrides, launch, launch_args, replace)
    _one_stage("merge", asked, debug)


def evaluate(
    recipe: RecipePath,
    run_dir: RunPath = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Measure this model alone: teacher, merged, expert or variant (or its index).",
            show_default="all, one by one",
            autocompletion=completion.models,
        ),
    ] = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    full: Full = False,
    run_code: RunCode = False,
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Measure teacher and students on the recipe's tasks."""
    changes = with_consent(with_all_items(overrides, full), run_code)
    asked = Invocation(recipe, run_dir, changes, launch, launch_args, replace)
    _one_stage("evaluate", asked, debug, model=model)


def report(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RECIPE|RUN...|FILE.json...",
            help="A recipe (YAML); or run directories, to compare; or with --results results files "
            "of lm-eval, the teacher's first.",
            autocompletion=completion.recipe_paths,
        ),
    ] = None,
    run_dir: RunPath = None,
    results: Annotated[
        bool,
        typer.Option(
            "--results",
            help="Read results of the stock lm-eval (--output_path with --log_samples).",
        ),
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Set the paper's students beside those of runs.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to write to, of runs or with --results.",
            show_default="report",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Share of the teacher's score that may be lost, of runs or with --results.",
            show_default="the recipe's, or 0.02",
        ),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Most items on the page, with --results; 0 keeps prompts and answers out of it.",
            show_default="10000",
        ),
    ] = None,
    overrides: Overrides = None,
    full: Full = False,
    replace: Replace = False,
    debug: Debug = False,
) -> None:
    """Write the report of a run, of several, or of results of lm-eval, and show its summary."""
    with one_line_errors(debug):
        console = make_console()
        given = sources or []
        many = not results and (published or any(path.is_dir() for path in given))
        reports.check_usage(
            given,
            results,
            many,
            recipe_options=bool(run_dir or overrides or full or replace),
            page_options=out is not None or margin is not None,
            item_option=items is not None,
        )
        if results:
            reports.report_results(given, out, margin, items, console)
            return
        if many:
            quiet_libraries()
            reports.report_runs(given, published, out, margin, console)
            return
        wanted = with_all_items(overrides, full)
        asked = Invocation(given[0], run_dir, wanted, replace=replace)
        lineage, opened = _open(asked, console)
        _run_stage("report", lineage, opened, console)
        _print_summary(opened.directory, console)


def make_console() -> Console:
    """Return the console of this rank: only rank 0 prints."""
    return Console() if is_main_process() else QuietConsole()


def _one_stage(stage: str, asked: Invocation, debug: bool, **options: Any) -> None:
    """Run one stage; `options` are the arguments that it alone takes."""
    with one_line_errors(debug):
        check = asked.check((stage,), **options)
        asked.dispatch(check)
        console = make_console()
        lineage, opened = _open(asked, console, check)
        _run_stage(stage, lineage, opened, console, **options)


def _open(asked: Invocation, console: Console, check: Check | None = None) -> tuple[Lineage, Run]:
    """Load and check the recipe, then open the run directory: a bad recipe must not leave one."""
    from xlstm_distill.recipe import load_recipe

    recipe = load_recipe(asked.recipe, asked.overrides or ())
    if check is not None:
        # In every process: under torchrun and srun, `dispatch` has checked nothing.
        check(recipe, process_count())
    if recipe.student.mixer.attention is not None:
        # Stage I would find out, perhaps hours from now.
        from xlstm_distill.stages.workbench import check_kept

        check_kept(recipe)
    directory = asked.directory(recipe)
    # torch and transformers take seconds to load. Until then this line shows that something runs.
    console.line(f"{recipe.name}: run directory {directory}")

    from xlstm_distill.artifacts import Run
    from xlstm_distill.stages.lineage import Lineage

    opened = Run.open(directory, recipe, console, drop_replaced=asked.replace)
    # Before the first stage, so that `status` can compare from the beginning.
    opened.keep_recipe()
    lineage = Lineage(recipe)
    lineage.share_hashes()
    return lineage, opened


def _stage_module(stage: str) -> Any:
    # It loads transformers, so it waits until a stage is about to run.
    quiet_libraries()
    return importlib.import_module(f"xlstm_distill.stages.{stage}")


def _run_stage(stage: str, lineage: Lineage, run: Run, console: Console, **options: Any) -> None:
    """Run a stage, which is the function of that name in its module, and print how it ended."""
    started = time.monotonic()
    with in_run(run.directory):
        result = getattr(_stage_module(stage), stage)(lineage, run, console, **options)
    # None stands for a captured domain whose other shards are still to come.
    artifacts = result if isinstance(result, list) else [result]
    made = [artifact for artifact in artifacts if not getattr(artifact, "reused", False)]
    ending = f"done in {time.monotonic() - started:.1f} s"
    if not artifacts:
        ending = "nothing to do"
    elif not made:
        ending = "already done"
    elif len(made) < len(artifacts):
        ending += f" ({len(artifacts) - len(made)} of {len(artifacts)} already done)"
    console.line(f"{stage:<10}{ending}")


def _print_summary(directory: Path, console: Console) -> None:
    """Print the scores of teacher, experts and merged student, and the path of the report."""
    from xlstm_distill.cli.summary import summary_table

    if not is_main_process():
        return
    folder = directory / "report"
    scores = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    console.rich().print(summary_table(scores))
    for model in scores["models"][:1]:
        console.line(f"{model['name']}: {model['sentence']}")
    console.line(f"Report: {folder / 'report.html'}")

"""The command line: one command per stage. It parses, loads the recipe and calls the stage; nothing heavy at import."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.launch import LaunchArgs, LaunchConfig, dispatch
from xlstm_distill.cli.preflight import check_batches
from xlstm_distill.runtime.console import Console, QuietConsole
from xlstm_distill.runtime.ranks import is_main_process, process_count

if TYPE_CHECKING:
    from xlstm_distill.artifacts import Run
    from xlstm_distill.recipe import Recipe
    from xlstm_distill.stages.lineage import Lineage

STAGES = ("capture", "align", "distill", "merge", "evaluate", "report")

app = typer.Typer(
    name="xlstm-distill",
    help="Distill Transformer language models into hybrid xLSTM students, and measure what they keep of the teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe (YAML).")]
RunPath = Annotated[
    Path | None,
    typer.Option(
        "--run",
        "--run-dir",
        metavar="DIR",
        help="Run directory (torchrun needs the longer name).",
        show_default="runs/NAME of the recipe",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value, for example align.lr=0.003. May be repeated.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="xlstm-distill")


def _version(value: bool) -> None:
    if value:
        from xlstm_distill import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipePath,
    run_dir: RunPath = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    debug: Debug = False,
) -> None:
    """Go through all stages, from teacher to report; finished ones are skipped."""
    with one_line_errors(debug):
        check = _checked(STAGES, run_dir)
        dispatch(launch, launch_args, recipe, overrides, check)
        loaded, opened = _open(recipe, run_dir, overrides, check)
        console = _console()
        _check_evaluation(loaded, opened)
        for stage in STAGES:
            _run_stage(stage, loaded, opened, console)
        _print_summary(opened.directory, console)


@app.command()
def capture(
    recipe: RecipePath,
    run_dir: RunPath = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do share I (0 to N - 1) of N, for a Slurm array.",
            show_default="all",
        ),
    ] = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    debug: Debug = False,
) -> None:
    """Store the teacher's sparse next-token targets."""
    _one_stage(
        "capture", recipe, run_dir, overrides, debug, launched=(launch, launch_args), shard=shard
    )


@app.command()
def align(
    recipe: RecipePath,
    run_dir: RunPath = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    debug: Debug = False,
) -> None:
    """Teach each mixer its teacher layer's attention output (stage I)."""
    _one_stage("align", recipe, run_dir, overrides, debug, launched=(launch, launch_args))


@app.command()
def distill(
    recipe: RecipePath,
    run_dir: RunPath = None,
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Train this expert alone (or its index, from 0).",
            show_default="all, one by one",
        ),
    ] = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    debug: Debug = False,
) -> None:
    """Train the experts from the aligned student (stage II)."""
    _one_stage(
        "distill", recipe, run_dir, overrides, debug, launched=(launch, launch_args), expert=expert
    )


@app.command()
def merge(
    recipe: RecipePath, run_dir: RunPath = None, overrides: Overrides = None, debug: Debug = False
) -> None:
    """Merge the experts into one student (stage III)."""
    _one_stage("merge", recipe, run_dir, overrides, debug)


@app.command()
def evaluate(
    recipe: RecipePath,
    run_dir: RunPath = None,
    overrides: Overrides = None,
    launch: LaunchConfig = None,
    launch_args: LaunchArgs = "",
    debug: Debug = False,
) -> None:
    """Measure teacher and students on the recipe's tasks."""
    _one_stage("evaluate", recipe, run_dir, overrides, debug, launched=(launch, launch_args))


@app.command()
def report(
    recipe: RecipePath, run_dir: RunPath = None, overrides: Overrides = None, debug: Debug = False
) -> None:
    """Write the report of a run and show its summary."""
    with one_line_errors(debug):
        loaded, opened = _open(recipe, run_dir, overrides)
        console = _console()
        _run_stage("report", loaded, opened, console)
        _print_summary(opened.directory, console)


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show how far a run is, from another shell."""
    with one_line_errors(debug):
        from xlstm_distill.stages.status import read_status, status_table, to_json

        stages = read_status(run_dir)
        if as_json:
            typer.echo(to_json(stages))
        else:
            Console().rich().print(status_table(stages))


@app.command()
def score(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.json", help='Scores: {"tasks": [{"task", "teacher", ...}]}.'),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compare scores of a student with its teacher's: recovery, Win-and-Tie rates, critical tolerance."""
    with one_line_errors(debug):
        from xlstm_eval.score import score_file

        result = score_file(file)
        typer.echo(result.to_json() if as_json else result.to_text())


@app.command()
def plan(
    recipe: RecipePath,
    gpu: Annotated[
        str,
        typer.Option(help="a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-180gb or l40s-48gb."),
    ] = "h100-80gb",
    gpus: Annotated[int, typer.Option(help="GPUs, over all nodes.")] = 8,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="none, ddp, fsdp2, zero1, zero2 or zero3.", show_default="fsdp2; none on one GPU"
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Kernels: auto (what the stages take), torch or triton.")
    ] = "auto",
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Share of the GPUs' peak that is reached.", show_default="one for each stage"
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Price of a GPU for an hour, in any currency.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The teacher's config.json.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Take the size of stored targets from this run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Say what a recipe takes on given GPUs: tokens, FLOPs, memory, disk, hours, cost. Needs no network."""
    with one_line_errors(debug):
        import json

        from xlstm_distill.planning import machine as planning_machine
        from xlstm_distill.planning import plan as planning
        from xlstm_distill.planning import tables as planning_text
        from xlstm_distill.recipe import load_recipe

        loaded, rates = load_recipe(recipe, overrides or ()), {"mfu": mfu, "price": price}
        machine = planning_machine.make_machine(gpu, gpus, sharding, backend, **rates)
        made = planning.plan_recipe(
            loaded, recipe.resolve().parent, machine, config=config, run=run_dir
        )
        if as_json:
            typer.echo(json.dumps(planning_text.to_json(made), indent=2))
        else:
            planning_text.show(made, _console())


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from xlstm_distill.recipe.reference import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


def _one_stage(
    stage: str,
    recipe: Path,
    run_dir: Path | None,
    overrides: list[str] | None,
    debug: bool,
    launched: tuple[Path | None, str] = (None, ""),
    **options: Any,
) -> None:
    with one_line_errors(debug):
        check = _checked((stage,), run_dir, options.get("expert"))
        dispatch(*launched, recipe, overrides, check)
        loaded, opened = _open(recipe, run_dir, overrides, check)
        _run_stage(stage, loaded, opened, _console(), **options)


def _console() -> Console:
    """One of several processes speaks."""
    return Console() if is_main_process() else QuietConsole()


Check = Callable[["Recipe", int], None]


def _checked(stages: Sequence[str], run_dir: Path | None, expert: str | None = None) -> Check:
    """What is looked at as soon as the recipe and the number of processes are known."""

    def check(recipe: Recipe, processes: int) -> None:
        check_batches(recipe, stages, processes, _directory(run_dir, recipe), expert=expert)

    return check


def _directory(run_dir: Path | None, recipe: Recipe) -> Path:
    return run_dir or Path("runs") / recipe.name


def _open(
    recipe: Path,
    run_dir: Path | None,
    overrides: list[str] | None,
    check: Check = lambda recipe, processes: None,
) -> tuple[Lineage, Run]:
    """Load and check the recipe first: a bad one must not leave a run directory behind."""
    from xlstm_distill.artifacts import Run
    from xlstm_distill.recipe import load_recipe
    from xlstm_distill.stages.lineage import Lineage

    loaded = load_recipe(recipe, overrides or ())
    check(loaded, process_count())
    run = Run.open(_directory(run_dir, loaded), loaded)
    run.keep_recipe()
    return Lineage(loaded), run


def _check_evaluation(lineage: Lineage, run: Run) -> None:
    """Refuse at once what could not be evaluated after days of training."""
    importlib.import_module("xlstm_distill.stages.workbench").quiet_libraries()
    importlib.import_module("xlstm_distill.stages.evaluate").check(lineage, run)


def _run_stage(stage: str, lineage: Lineage, run: Run, console: Console, **options: Any) -> None:
    started = time.monotonic()
    importlib.import_module("xlstm_distill.stages.workbench").quiet_libraries()
    module = importlib.import_module(f"xlstm_distill.stages.{stage}")
    result = getattr(module, stage)(lineage, run, console, **options)
    artifacts = result if isinstance(result, list) else [result]
    made = [artifact for artifact in artifacts if not getattr(artifact, "reused", False)]
    seconds = f"done in {time.monotonic() - started:.1f} s"
    if not artifacts:
        outcome = "nothing to do"
    elif not made:
        outcome = "already done"
    elif len(made) < len(artifacts):
        outcome = f"{seconds} ({len(artifacts) - len(made)} of {len(artifacts)} already done)"
    else:
        outcome = seconds
    console.line(f"{stage:<10}{outcome}")


def _print_summary(directory: Path, console: Console) -> None:
    """Show the scores of teacher, experts and merged student, and where the report lies."""
    import json

    from xlstm_distill.cli.summary import summary_table

    if not is_main_process():
        return
    folder = directory / "report"
    console.rich().print(
        summary_table(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    )
    console.line(f"Report: {folder / 'report.html'}")

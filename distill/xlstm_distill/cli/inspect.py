"""Commands that run no stage: status, score, plan and schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xlstm_distill.cli import completion
from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.options import AsJson, Debug, Overrides, RecipePath
from xlstm_distill.cli.run import make_console
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import Console

if TYPE_CHECKING:
    from xlstm_distill.jobs.progress import TaskStatus


def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show how far a run is, from another shell, and where its Slurm jobs stand."""
    with one_line_errors(debug):
        # Inside the function, as in every command: `--help` imports this module.
        from xlstm_distill.stages.status.reading import read_status
        from xlstm_distill.stages.status.table import AGAIN, status_table, to_json
        from xlstm_distill.stages.upkeep import kept_lines, read_kept

        stages, kept = read_status(run_dir), read_kept(run_dir)
        tasks = _tasks(run_dir)
        if as_json:
            from xlstm_distill.jobs.table import tasks_json

            typer.echo(to_json(stages, kept, tasks_json(tasks)))
        else:
            console = Console()
            console.rich().print(status_table(stages))
            if any(stage.state == "outdated" for stage in stages):
                console.line(AGAIN)
            if tasks:
                from xlstm_distill.jobs.table import tasks_table

                console.line()
                console.rich().print(tasks_table(tasks))
            for line in kept_lines(kept):
                console.line(line)


def _tasks(run_dir: Path) -> list[TaskStatus]:
    """Where the run's Slurm jobs stand; none where it has none, or where they cannot be read."""
    if not (run_dir / "slurm").is_dir():
        return []
    from xlstm_distill.jobs.progress import read_jobs
    from xlstm_distill.jobs.queue import Slurm, has_slurm

    try:
        return read_jobs(run_dir, Slurm() if has_slurm() else None)
    except UserError as error:
        # The stages can be told all the same.
        for problem in error.problems:
            typer.echo(f"error: {problem}", err=True)
        return []


def score(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.json", help='Scores: {"tasks": [{"task", "teacher", ...}]}.'),
    ],
    margin: Annotated[
        float | None,
        typer.Option(
            help="Share of the teacher's score that may be lost, for the decision over all tasks.",
            show_default="0.02",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare a student's scores with its teacher's.

    Prints recovery, Win-and-Tie rates, critical tolerance and, where the file has each item's
    score (teacher_items, student_items), paired tests, 95 % intervals and one decision.
    """
    with one_line_errors(debug):
        from xlstm_eval.score import score_file

        result = score_file(file, margin=margin)
        typer.echo(result.to_json() if as_json else result.to_text())


def plan(
    recipe: RecipePath,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="rtx4090-24gb, rtx5090-32gb, l4-24gb, a10g-24gb, l40s-48gb, a100-40gb, "
            "a100-80gb, h100-80gb, h200-141gb, b200-180gb or b300.",
            show_default="h100-80gb",
            autocompletion=completion.gpus,
        ),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="Memory of any other GPU; without --gpu, no hours."),
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs, over all nodes.")] = 8,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="none, ddp, fsdp2, hsdp, zero1, zero2 or zero3.",
            show_default="fsdp2; none on one GPU",
            autocompletion=completion.shardings,
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Kernels: auto (the recipe's student.backend), torch or triton.")
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
    node: Annotated[int, typer.Option(help="GPUs of a node; hsdp shards over them.")] = 8,
    link: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S", help="What a GPU sends to its node.", show_default="the GPU's NVLink"
        ),
    ] = None,
    network: Annotated[
        float | None,
        typer.Option(
            metavar="GB/S", help="What a GPU sends to other nodes.", show_default="the GPU's share"
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The teacher's config.json.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run", metavar="DIR", help="Take the size of stored targets from this run."),
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
    debug: Debug = False,
) -> None:
    """Print what a recipe costs on given GPUs: tokens, FLOPs, memory, disk, hours, price.

    Exits with 1 where it does not fit, and prints settings that make it fit. Needs no network.
    """
    with one_line_errors(debug):
        from xlstm_distill.planning.machine import make_machine
        from xlstm_distill.planning.plan import plan_recipe
        from xlstm_distill.planning.tables import show, to_json
        from xlstm_distill.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        kernels = loaded.student.backend if backend == "auto" else backend
        machine = make_machine(
            gpu,
            gpus,
            sharding,
            kernels,
            gpu_memory=gpu_memory,
            mfu=mfu,
            price=price,
            node=node,
            link=link,
            network=network,
        )
        # The recipe's folder: sizes of known teachers may lie beside it.
        made = plan_recipe(loaded, recipe.resolve().parent, machine, config=config, run=run_dir)
        if as_json:
            typer.echo(json.dumps(to_json(made), indent=2))
        else:
            show(made, make_console())
        if made.problems:
            # A job script can ask before it queues: 1 means that it does not fit.
            raise typer.Exit(1)


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from xlstm_distill.recipe.reference import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))

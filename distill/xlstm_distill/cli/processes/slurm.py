"""`slurm`: write a run's jobs for a Slurm cluster, and submit what is missing of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xlstm_distill.cli import completion
from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.options import AsJson, Debug, Overrides, RecipePath, RunPath
from xlstm_distill.cli.processes.preflight import check_batches
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime.console import Console, QuietConsole

if TYPE_CHECKING:
    from xlstm_distill.jobs.folder import Folder
    from xlstm_distill.jobs.queue import Slurm
    from xlstm_distill.jobs.site import Site
    from xlstm_distill.jobs.submission import Plan
    from xlstm_distill.recipe import Recipe


def slurm(
    recipe: RecipePath,
    run_dir: RunPath = None,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site",
            metavar="FILE",
            help="What the cluster wants to know (slurm/site.example.yaml).",
            show_default="that of the last call",
            autocompletion=completion.recipe_paths,
        ),
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit what is missing, and not queued yet.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write all stages as Slurm jobs, and submit what is missing of them.

    Writes into DIR/slurm. Called again with --submit it submits what is missing, and nothing twice.
    """
    with one_line_errors(debug):
        from xlstm_distill.artifacts import Run
        from xlstm_distill.jobs import submission
        from xlstm_distill.jobs.folder import Folder
        from xlstm_distill.jobs.table import plan_json, plan_table
        from xlstm_distill.recipe import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        folder = Folder(run_dir or Path("runs") / loaded.name)
        chosen = _site(site, folder)
        _check_batches(loaded, chosen, folder.run)
        scheduler = _scheduler(needed=submit)
        console = QuietConsole() if as_json else Console()
        # `status` compares the run with its saved recipe from the beginning.
        Run.open(folder.run, loaded, console).keep_recipe()
        with submission.locked(folder, console.line):
            plan = submission.prepare_jobs(folder, loaded, chosen, scheduler)
            found = {"slurm": str(folder.path), "jobs": plan_json(plan)}
            if not as_json:
                console.rich().print(plan_table(plan))
            if scheduler is not None and submit:
                done = submission.submit(plan, chosen, scheduler, console.line)
                found["submitted"] = [{"job": job.job, "id": job.id} for job in done.jobs]
                found["cancelled"] = done.cancelled
        if as_json:
            typer.echo(json.dumps(found, indent=1))
        for line in _ending(plan, loaded, chosen, submitted=submit):
            console.line(line)


def _scheduler(*, needed: bool) -> Slurm | None:
    """The cluster; None where it does not answer and nothing is to be submitted.

    Raises:
        RunError: it does not answer.
    """
    from xlstm_distill.jobs.queue import Slurm, has_slurm

    found = Slurm()
    if needed:
        return found
    if not has_slurm():
        return None
    try:
        found.queue(["none"])
    except RunError:
        # Scripts can be written anywhere, also where Slurm's commands have no cluster.
        return None
    return found


def _site(given: Path | None, folder: Folder) -> Site:
    """The site file that is given, that of the last call, or an empty one."""
    from xlstm_distill.jobs.site import Site, load_site

    if given is not None:
        return load_site(given)
    return folder.saved_site() or Site()


def _check_batches(recipe: Recipe, site: Site, run: Path) -> None:
    """Refuse batches that the processes of a stage cannot share, before they have queued for days.

    Raises:
        UserError: names them.
    """
    from xlstm_distill.jobs.processes import count_text, process_count

    problems: list[str] = []
    trained = ("align", "distill") if recipe.refine is None else ("align", "distill", "refine")
    for stage in trained:
        settings = site.settings(stage)
        try:
            check_batches(recipe, (stage,), process_count(settings), run)
        except UserError as error:
            place = f" The site file's {stage} has {count_text(settings)}."
            problems += [problem + place for problem in error.problems]
    if problems:
        raise UserError(*problems)


def _ending(plan: Plan, recipe: Recipe, site: Site, *, submitted: bool) -> list[str]:
    """What to do next."""
    from xlstm_distill.jobs.processes import from_hub

    run, lines = plan.book.folder.run, []
    if not any(plan.missing.values()):
        queued = any(task.is_queued for task in plan.book.tasks())
        return [f"Nothing to submit: {'the rest is in the queue' if queued else 'all is done'}."]
    hub = from_hub(recipe)
    if hub and site.environment.get("HF_HUB_OFFLINE") != "1":
        lines.append(
            f"{', '.join(hub)}: from the hub. Compute nodes need the network for it, or a cache on "
            "a shared disk (HF_HOME and HF_HUB_OFFLINE in the site file; slurm/README.md)."
        )
    if recipe.training.checkpoint_steps is None:
        lines.append(
            "training.checkpoint_steps is null: a training that is preempted or meets its time "
            "limit begins anew; give a number."
        )
    if submitted:
        return [*lines, f"See where they stand: xlstm-distill status '{run}'"]
    return [
        *lines,
        "Nothing was submitted. Check tasks and data first (xlstm-distill validate RECIPE), then "
        "give this command again with --submit.",
    ]

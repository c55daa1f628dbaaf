"""The command line's table of contents. `--help` must answer at once: nothing heavy is imported."""

from __future__ import annotations

from typing import Annotated

import typer

from xlstm_distill.cli import inspect, patch, recipes, run, upkeep, use, validate
from xlstm_distill.cli.doctor import doctor
from xlstm_distill.cli.processes import serve, slurm
from xlstm_distill.cli.run import STAGES as STAGES
from xlstm_distill.runtime.ranks import whole_process

app = typer.Typer(
    name="xlstm-distill",
    help="Distill Transformer language models into hybrid xLSTM students, and measure what they "
    "keep of the teacher.",
    no_args_is_help=True,
    # `one_line_errors` words every error; --debug gives a plain traceback.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# In the order of --help: the whole run, its stages, the finished student, and what looks without
# changing anything.
for command in (
    run.run,
    run.prepare,
    run.capture,
    run.align,
    run.distill,
    run.refine,
    run.merge,
    run.evaluate,
    run.report,
    use.export,
    use.generate,
    use.chat,
    serve.serve,
    use.long_context,
    slurm.slurm,
    validate.validate,
    inspect.plan,
    inspect.status,
    upkeep.verify,
    upkeep.clean,
    doctor,
    inspect.score,
    inspect.schema,
):
    # Registered here and not by decorators, so that the order is this list's and not that of the
    # imports.
    app.command()(command)
app.add_typer(recipes.app, name="recipes")
app.add_typer(patch.app, name="patch")


def main() -> None:
    """Run the command line."""
    with whole_process():
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

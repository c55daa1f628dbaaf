"""`verify` and `clean`: look after the artifacts of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xlstm_distill.cli.failures import RUN_ERROR, one_line_errors
from xlstm_distill.cli.options import AsJson, Debug
from xlstm_distill.runtime.console import Console, QuietConsole, byte_size

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]


def verify(run_dir: RunArgument, as_json: AsJson = False, debug: Debug = False) -> None:
    """Read every file of a run's artifacts and compare its checksum.

    Exits with 1 where a file is missing or changed.
    """
    with one_line_errors(debug):
        # Inside the function, as in every command: `--help` imports this module.
        from xlstm_distill.stages import upkeep

        console = QuietConsole() if as_json else Console()
        results = upkeep.verify(run_dir, console)
        if as_json:
            typer.echo(upkeep.to_json(results))
        for result in results:
            state = f"{result.files} files, {byte_size(result.bytes)}"
            if result.problems:
                state = f"{len(result.problems)} wrong of {state}"
            console.line(f"{result.path}: {result.note or state}")
            for path in result.unlisted:
                console.line(f"note: {path}: the manifest does not list it; no stage reads it")
            for problem in result.problems if not as_json else ():
                typer.echo(f"error: {problem}", err=True)
        if any(result.problems for result in results):
            raise typer.Exit(RUN_ERROR)


def clean(run_dir: RunArgument, debug: Debug = False) -> None:
    """Remove artifacts that are kept from earlier settings (see `status`)."""
    with one_line_errors(debug):
        from xlstm_distill.stages import upkeep

        removed = upkeep.clean(run_dir)
        for kept in removed:
            typer.echo(f"removed {kept.path} ({byte_size(kept.bytes)})")
        typer.echo(f"{byte_size(sum(kept.bytes for kept in removed))} freed")

"""`recipes` lists the recipes that come with the package; `recipes copy` copies one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from xlstm_distill.cli import completion
from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.options import AsJson, Debug
from xlstm_distill.runtime.console import Console

app = typer.Typer(help="List the recipes that come with this package, or copy one.")


@app.callback(invoke_without_command=True)
def listing(context: typer.Context, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the recipes that come with this package, or copy one."""
    # click calls this function before a subcommand too.
    if context.invoked_subcommand is not None:
        return
    with one_line_errors(debug):
        from rich import box
        from rich.table import Table

        from xlstm_distill.recipe.shipped import shipped_recipes

        found = shipped_recipes()
        if as_json:
            rows = [
                {"name": shipped.name, "teacher": shipped.teacher, "summary": shipped.summary}
                for shipped in found
            ]
            typer.echo(json.dumps(rows, indent=2))
            return
        table = Table("name", "teacher", "what it does", box=box.SIMPLE, pad_edge=False)
        for shipped in found:
            table.add_row(shipped.name, shipped.teacher, shipped.summary)
        console = Console()
        console.rich().print(table)
        console.line("Copy one with: xlstm-distill recipes copy NAME DIR")


@app.command()
def copy(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the recipe.", autocompletion=completion.shipped_recipes
        ),
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write into; it may be new.")
    ],
    debug: Debug = False,
) -> None:
    """Write a recipe into a folder, with its teacher, tasks and all else that it needs."""
    with one_line_errors(debug):
        from xlstm_distill.recipe.shipped import copy_recipe

        recipe = copy_recipe(name, directory)
        console = Console()
        console.line(f"{recipe}: written, with the files that it needs.")
        # Quoted, so that the line can be pasted where the folder has a space.
        console.line(f"Run it with: xlstm-distill run {shlex.quote(str(recipe))}")

"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from xlstm_distill.cli import completion

RecipePath = Annotated[
    Path,
    typer.Argument(metavar="RECIPE", help="Recipe (YAML).", autocompletion=completion.recipe_paths),
]
RunPath = Annotated[
    Path | None,
    typer.Option(
        "--run",
        # torchrun has a --run-path of its own and takes --run for an abbreviation of it.
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
        autocompletion=completion.recipe_keys,
    ),
]
Replace = Annotated[
    bool,
    typer.Option(
        "--replace",
        help="Remove what a changed setting replaces; by default it is kept beside the new one.",
    ),
]
Full = Annotated[
    bool,
    typer.Option(
        "--full", help="Answer all items of each task: the same as --set evaluate.limit=null."
    ),
]
RunCode = Annotated[
    bool,
    typer.Option(
        "--run-code",
        help="Allow tasks that run code which a model wrote (in a sandbox); the same as "
        "--set evaluate.confirm_run_unsafe_code=true.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def with_consent(overrides: Sequence[str] | None, run_code: bool) -> list[str]:
    """Return the overrides, with consent to run generated code where it was given."""
    consent = ["evaluate.confirm_run_unsafe_code=true"] if run_code else []
    return [*(overrides or ()), *consent]

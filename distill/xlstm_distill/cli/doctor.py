"""`doctor`: whether the kernels are right on this machine, and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.options import AsJson, Debug
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import Console

if TYPE_CHECKING:
    from xlstm_kernels.doctor import Report

DTYPES = ("bfloat16", "float32", "float16")


def doctor(
    dims: Annotated[
        list[int] | None,
        typer.Option("--dim", help="Head dim to ask about; may be repeated.", show_default="128"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    again: Annotated[
        bool, typer.Option("--again", help="Check again what has been checked before.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check the kernels on this machine's GPUs; show versions, verdicts and what is missing.

    Exits with 1 where a kernel is wrong. The first time takes minutes, since all is compiled.
    """
    with one_line_errors(debug):
        from xlstm_kernels import verdicts
        from xlstm_kernels.dispatch import HEAD_DIMS
        from xlstm_kernels.doctor import examine

        widths = dims or [128]
        for width in widths:
            if width not in HEAD_DIMS:
                allowed = ", ".join(map(str, HEAD_DIMS))
                raise UserError(f"--dim: {width} is not allowed. Allowed: {allowed}.")
        if dtype not in DTYPES:
            raise UserError(f"--dtype: {dtype!r} is not allowed. Allowed: {', '.join(DTYPES)}.")
        if again:
            verdicts.clear()
        try:
            found = examine(widths, [dtype])
        except ValueError as error:
            raise UserError(f"{error}.") from None
        if as_json:
            typer.echo(json.dumps(asdict(found) | {"healthy": found.healthy}, indent=2))
        else:
            show(found, Console())
        if not found.healthy:
            raise typer.Exit(1)


def show(found: Report, console: Console) -> None:
    """Print a report."""
    from xlstm_kernels.verdicts import facts_in_words

    for name, version in found.versions.items():
        console.line(f"{name:24} {version}")
    for name, value in found.environment.items():
        console.line(f"{name:24} {value}")
    console.line(f"{'verdicts are kept in':24} {found.folder}")
    for device in found.devices:
        console.line()
        console.line(
            f"GPU {device.index}: {device.name}, sm_{device.capability.replace('.', '')}, "
            f"ptxas {device.ptxas}"
        )
        for words, verdict in device.verdicts.items():
            said = facts_in_words(verdict)
            console.line(f"  {'right' if verdict.right else 'WRONG':6} {words}: {said}")
    console.line()
    console.line(f"student.backend: auto means {found.auto}")
    for line in found.advice:
        console.line(f"- {line}")

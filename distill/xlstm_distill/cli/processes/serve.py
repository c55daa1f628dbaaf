"""Serve a student over the OpenAI API, by an engine that others keep."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from xlstm_distill.cli.failures import one_line_errors
from xlstm_distill.cli.options import Debug
from xlstm_distill.cli.use import Device, Dtype, ModelName, check_dtype, quiet_transformers
from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.signals import Stopped


def serve(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Run directory, or a student's own directory; also the model's name for requests.",
        ),
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")
    ] = "127.0.0.1",
    engine: Annotated[
        str | None,
        typer.Option(
            help="Engine: vllm or transformers.", show_default="vllm where it is installed"
        ),
    ] = None,
    model: ModelName = None,
    device: Device = None,
    dtype: Dtype = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTION...]", help="After --: options of 'vllm serve'.", show_default=False
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Serve a student over the OpenAI API, by vLLM or by the server of transformers."""
    with one_line_errors(debug):
        check_dtype(dtype)
        from xlstm_distill.export.source import find_student
        from xlstm_distill.serving.endpoint import LIMITS, Endpoint, check_address, choose_engine

        engine = choose_engine(engine)
        found = find_student(Path(place), model)
        endpoint = Endpoint(found, place, host, port, device, dtype)
        check_address(endpoint)
        console = Console()
        console.line(f"Engine: {engine} ({LIMITS[engine]}).")
        if engine == "vllm":
            from xlstm_distill.serving import vllm_server

            vllm_server.run(endpoint, options or [], console)
        if options:
            raise UserError(f"{options[0]}: only the engine vllm takes options of its own.")
        quiet_transformers()
        from xlstm_distill.serving import transformers_server

        # A server has no other end than a signal.
        with contextlib.suppress(Stopped, KeyboardInterrupt):
            transformers_server.run(endpoint, console)
        console.line("Stopped.")

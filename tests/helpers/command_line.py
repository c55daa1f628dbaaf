"""Run the command line in the test's own process: its imports take seconds, and happen once."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path

from typer.testing import CliRunner

from xlstm_distill.cli.app import app


def call_cli(
    *words: str | Path, cwd: Path | str = "/", typed: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `xlstm-distill WORDS` in a folder; returns what a process would leave.

    typed: standard input.

    Nothing but an exit gets out of the command line: any other exception is raised again here.
    """
    arguments = [str(word) for word in words]
    before = {number: signal.getsignal(number) for number in signal.Signals}
    try:
        with contextlib.chdir(cwd):
            result = CliRunner().invoke(app, arguments, input=typed, prog_name="xlstm-distill")
    finally:
        # The command line listens to signals. Pytest's own handlers must work afterwards.
        for number, handler in before.items():
            if signal.getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)

"""What a failure looks like to a user: one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime import signals, watch
from xlstm_distill.runtime.console import byte_size
from xlstm_distill.runtime.ranks import is_main_process

USER_ERROR, RUN_ERROR = 2, 1
FINISHED_STAGES = "finished stages are kept"
"""What is left of a run that did not end; other commands have other words."""


@contextlib.contextmanager
def one_line_errors(debug: bool, left: str = FINISHED_STAGES) -> Iterator[None]:
    """Turn an error into plain lines on stderr, one for each problem, and an exit code.

    Of several ranks the first that fails speaks, and the others end with it within seconds.
    2 means bad input, 1 a failure at run time, 130 or 75 that the run was stopped. This is the
    outermost frame, so it catches every exception: what is not bad input is a failure of the run.
    `left` says what is left where the command is interrupted or the disk is full.
    """
    # Before anything else: a scheduler may send its signal while torch is still loading.
    signals.listen()
    watch.start()
    try:
        yield
    # It is an exception too, and carries the exit code of a command that is done.
    except typer.Exit:
        raise
    except KeyboardInterrupt as interrupt:
        if is_main_process():  # a terminal interrupts all ranks
            again = f"{left.capitalize()}: run the command again to go on."
            typer.echo(f"Interrupted. {str(interrupt) or again}", err=True)
        raise typer.Exit(signals.INTERRUPTED) from None
    except signals.Stopped as stopped:
        # Ranks that stop together say so once. A rank that a signal ended alone must speak for
        # itself.
        if is_main_process() or not stopped.agreed:
            typer.echo(str(stopped), err=True)
        if not stopped.agreed:
            watch.fail(stopped.exit_code)
        raise typer.Exit(stopped.exit_code) from None
    except Exception as error:
        signals.end()
        if debug:
            traceback.print_exc()
        code, problems = _explain(error, left)
        # Before the words: the other ranks wait for this one, and must end too.
        first, code = watch.fail(code)
        # An error of rank 0 that all ranks raise is rank 0's to say (`ranks.from_rank_zero`).
        speaks = getattr(error, "speaks", None)
        if first if speaks is None else speaks:
            for problem in problems:
                typer.echo("error: " + " ".join(problem.split()), err=True)
        raise typer.Exit(code) from None
    finally:
        # Unless this rank failed: from here on the others may be gone because all is done.
        watch.stop()


@contextlib.contextmanager
def in_run(directory: Path) -> Iterator[None]:
    """Note in an error which run directory was written to: a full disk often names no file."""
    try:
        yield
    except Exception as error:
        error.run_directory = directory  # type: ignore[attr-defined]
        raise


def _explain(error: Exception, left: str) -> tuple[int, Sequence[str]]:
    """Return the exit code and the lines of an error: one for each problem."""
    if isinstance(error, UserError):
        return USER_ERROR, error.problems
    # Before RunError, which may have a full disk as its cause.
    full = _disk_full(error, left)
    if full:
        return RUN_ERROR, [full]
    if isinstance(error, RunError):
        return RUN_ERROR, [str(error)]
    # Not imported for its name alone: a module that is not loaded cannot have raised.
    evaluation = sys.modules.get("xlstm_eval.records")
    if evaluation is not None and isinstance(error, evaluation.EvalError):
        return USER_ERROR, [str(error)]
    if isinstance(error, shutil.Error) and error.args and error.args[0]:
        # Copying a folder collects what failed: source, copy and the words of the error.
        _, copy, why = error.args[0][0]
        reason = re.sub(r"^\[Errno \d+\] ", "", str(why)).partition(": ")[0]
        return RUN_ERROR, [f"{copy}: {reason}"]
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return RUN_ERROR, [where + error.strerror]
    # Libraries in Rust (safetensors) put the system's error into their own text.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return RUN_ERROR, [f"a file cannot be read or written: {os.strerror(int(found[1]))}"]
    return RUN_ERROR, [f"{type(error).__name__}: {error} (--debug shows where)"]


def _disk_full(error: BaseException, left: str) -> str | None:
    """Recognise a full disk in an error or its causes.

    torch and safetensors wrap it in types of their own, so its text is looked for too.
    """
    cause: BaseException | None = error
    while cause is not None:
        numbers = (errno.ENOSPC, errno.EDQUOT)
        full = isinstance(cause, OSError) and cause.errno in numbers
        if full or any(os.strerror(number) in str(cause) for number in numbers):
            name = getattr(cause, "filename", None)
            where = f" while writing {name}" if name else _room(error)
            return f"disk full{where}: free some space and run the command again; {left}."
        # Also the context: `raise ... from None` sets no cause and keeps the context.
        cause = cause.__cause__ or cause.__context__
    return None


def _room(error: BaseException) -> str:
    """Say where a run was writing, and how much room there is; nothing if no run was at work."""
    directory: Path | None = getattr(error, "run_directory", None)
    if directory is None:
        return ""
    try:
        free = byte_size(shutil.disk_usage(directory).free)
    except OSError:
        return f" (run directory {directory})"
    # With room left it is a quota, or another disk: that of temporary files, say.
    return f" (run directory {directory}, its file system has {free} free)"

"""Run untrusted programs in processes of their own, with limits (docs/evaluation.md)."""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from xlstm_eval.records import EvalError

GUEST = Path(__file__).with_name("guest.py")
ISOLATED = ("files", "network", "processes", "signals")
"""What a program cannot reach where the platform allows it; `guest.isolate` says which it does."""
MACHINES = ("x86_64", "aarch64")
"""Processors whose system calls `guest` knows by number, as Linux names them."""
MOST_ANSWER_BYTES = 65_536
MOST_WORKERS = 32

Status = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    ``seconds`` is processor time, which does not depend on what else the machine does;
    ``wall_seconds`` ends a program that waits. ``memory`` is its address space, ``file_bytes`` the
    size of each file that it writes.
    """

    seconds: int = 10
    wall_seconds: float = 30.0
    memory: int = 4 * 2**30
    file_bytes: int = 16 * 2**20


@dataclass(frozen=True)
class Outcome:
    """How a program ended, why, and what it was isolated from."""

    status: Status
    reason: str = ""
    isolated: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end without an exception."""
        return self.status == "passed"


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run Python text to its end, without input or output, in an empty folder that is then removed.

    Raises OSError: no process can be started.
    """
    limits, secret = limits or Limits(), secrets.token_hex(16)
    order = {
        "program": program,
        "secret": secret,
        "seconds": limits.seconds,
        "memory": limits.memory,
        "file_bytes": limits.file_bytes,
    }
    # What the program leaves may be odd: a folder without rights must not end the evaluation.
    with tempfile.TemporaryDirectory(prefix="xlstm-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(GUEST)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            # A group of its own: all of it ends together, and Ctrl-C is not for it.
            start_new_session=True,
        )
        said = _talk(process, json.dumps(order).encode(), limits.wall_seconds)
    return _outcome(said, secret, process.returncode)


def run_programs(programs: Sequence[str], limits: Limits | None = None) -> list[Outcome]:
    """Run programs side by side; equal ones run once. Returns their outcomes in order."""
    limits = limits or Limits()
    different = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(_workers(limits)) as pool:
        found = pool.map(functools.partial(run_program, limits=limits), different)
        outcomes = dict(zip(different, found, strict=True))
    return [outcomes[program] for program in programs]


def require_sandbox(machine: str | None = None) -> None:
    """Raise EvalError unless this machine is known and a harmless program passes.

    Otherwise a Python whose libraries lie in an unusual place would score 0 in all tasks.
    ``machine`` is the processor's name; None takes this machine's.
    """
    machine = machine or platform.machine()
    if sys.platform == "linux" and machine not in MACHINES:
        raise EvalError(
            f"generated code cannot run on this machine: the numbers of system calls on {machine} "
            f"are not known, so none could be forbidden (known: {', '.join(MACHINES)}). "
            "Leave its tasks out."
        )
    found = _probed()
    if not found.passed:
        raise EvalError(
            f"generated code cannot run on this machine: a program of imports alone failed "
            f"({found.reason}). Leave its tasks out, or evaluate on Linux."
        )


def not_isolated() -> tuple[str, ...]:
    """Return which of ISOLATED this platform does not keep programs from, by running one."""
    return tuple(name for name in ISOLATED if name not in _probed().isolated)


@functools.cache
def _probed() -> Outcome:
    # The tests of HumanEval+ import numpy.
    return run_program("import collections, hashlib, heapq, json, math, random, re, numpy")


def _environment(folder: str) -> Mapping[str, str]:
    """Return the program's whole environment: none of this process's variables, so no secrets."""
    return {
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        # A library that starts a thread for each core would meet the memory's limit.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _workers(limits: Limits) -> int:
    """Return how many programs run at once: one for each core, as far as the memory goes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Half of it: a model is in it too.
    fitting = memory // 2 // limits.memory
    return max(1, min(cores or 1, fitting, MOST_WORKERS))


def _talk(process: subprocess.Popen[bytes], order: bytes, seconds: float) -> bytes:
    """Send the order, read at most MOST_ANSWER_BYTES, and end the process and all it started."""
    assert process.stdin is not None
    assert process.stdout is not None
    said: list[bytes] = []
    reader = threading.Thread(target=_read, args=(process.stdout, said), daemon=True)
    reader.start()
    try:
        process.stdin.write(order)
        process.stdin.close()
        # It ends with the process, or where there is more than any answer holds.
        reader.join(seconds)
    except BrokenPipeError:
        pass
    finally:
        _end(process)
        reader.join()
        process.stdout.close()
    return b"".join(said)


def _read(stream: IO[bytes], said: list[bytes]) -> None:
    left = MOST_ANSWER_BYTES
    while left > 0 and (chunk := stream.read1(left)):  # type: ignore[attr-defined]
        said.append(chunk)
        left -= len(chunk)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        # An answer may come a moment before the process ends by itself.
        process.wait(timeout=0.1)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(said: bytes, secret: str, code: int) -> Outcome:
    """Read the guest's two lines: what is isolated, and the secret with how the program ended."""
    lines = said.split(b"\n")
    isolated = tuple(_parsed(lines[0]) or ())
    ended = _parsed(lines[1]) if len(lines) > 1 else None
    if isinstance(ended, list) and len(ended) == 3 and ended[0] == secret:
        return Outcome(ended[1], ended[2], isolated)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome("timed out", "it was ended at a limit", isolated)
    how = f"by signal {-code}" if code < 0 else f"with code {code}"
    return Outcome("failed", f"it ended {how} before its last line", isolated)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # a program may write brackets in brackets
        return None

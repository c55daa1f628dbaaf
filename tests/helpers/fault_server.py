"""Runs command lines with faults for test_faults.py, in forked processes: these import nothing.

Start it with faults.so in LD_PRELOAD. It reads one JSON object a line:

- `words`: the command line; `folder`: operations below it are counted;
- `kind`: `none`, `fail`, `full`, `kill`, `tear`, `stop` or `clock` (faults.c), `at`: the operation
  at which that happens, `error`: the errno of `fail` and `full`;
- `clock`: seconds by which the wall clock is wrong from the start; `journal`: a file for the
  operations, or null; `learn`: whether later children are to start with the modules that this
  one has loaded;
- or `go_on`: the id of a process that stopped.

It answers with `pid`, `code` (negative for a signal, null for a process that stopped), `out`,
`err` and the processor's `seconds`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# What the stages import, here once for all.
import matplotlib.figure  # noqa: F401
import torch

import xlstm_distill.stages.align
import xlstm_distill.stages.capture
import xlstm_distill.stages.distill
import xlstm_distill.stages.evaluate
import xlstm_distill.stages.merge
import xlstm_distill.stages.report
import xlstm_distill.stages.status.reading  # noqa: F401
from xlstm_distill.cli.app import main

KINDS = ("none", "fail", "full", "kill", "tear", "stop", "clock")
faults = ctypes.CDLL(os.environ["LD_PRELOAD"])


def child(request: dict[str, Any], out: int, err: int) -> None:
    """Run a command line under a fault; does not return."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.argv = ["xlstm-distill", *request["words"]]
    lines = -1
    if request.get("journal"):
        lines = os.open(request["journal"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    faults.faults_set_clock(ctypes.c_long(request.get("clock", 0)))
    faults.faults_arm(
        request["folder"].encode(),
        KINDS.index(request.get("kind", "none")),
        ctypes.c_long(request.get("at", -1)),
        request.get("error", 0),
        lines,
    )
    code = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 99
    faults.faults_disarm()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if request.get("learn"):
        Path(request["folder"] + ".modules").write_text(json.dumps(list(sys.modules)))
    os._exit(code)


def load_what_it_loaded(file: Path) -> None:
    """Load the modules that a child has loaded: the next ones need no time for that."""
    for name in json.loads(file.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    file.unlink()


class Server:
    """Forks children and waits for them; keeps what those that stopped have written."""

    def __init__(self) -> None:
        self.streams: dict[int, tuple[Any, Any]] = {}

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        if "go_on" in request:
            pid = request["go_on"]
            os.kill(pid, signal.SIGCONT)
            return self.wait(pid)
        # Closed by `wait`, perhaps at another request.
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        pid = os.fork()
        if pid == 0:
            child(request, out.fileno(), err.fileno())
        self.streams[pid] = out, err
        answer = self.wait(pid)
        if request.get("learn"):
            load_what_it_loaded(Path(request["folder"] + ".modules"))
        return answer

    def wait(self, pid: int) -> dict[str, Any]:
        _, status, used = os.wait4(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return {"pid": pid, "code": None, "out": "", "err": "", "seconds": 0.0}
        texts = []
        for stream in self.streams.pop(pid):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
            stream.close()
        return {
            "pid": pid,
            "code": os.waitstatus_to_exitcode(status),
            "out": texts[0],
            "err": texts[1],
            "seconds": used.ru_utime + used.ru_stime,
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = Server()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries speak when they are imported
    for line in sys.stdin:
        answers.write(json.dumps(server.serve(json.loads(line))) + "\n")
        answers.flush()

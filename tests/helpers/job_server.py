"""Run command lines in forks of a process that has imported everything: a start takes no seconds.

`job_server.py SOCKET` serves, until its input ends. `job_server.py SOCKET --client WORDS` runs
`xlstm-distill WORDS` there: with its own output, folder and environment, its signals are passed on,
and it ends with the command's exit code. A command whose client is killed is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback

ALSO = ("datasets", "deepspeed", "lm_eval.evaluator", "pandas", "sacrebleu", "scipy.ndimage")
"""What libraries import when they are first used: every fork would do it again."""
LARGEST = 2**20
"""Bytes of a request: words and environment."""
POLL_SECONDS = 0.05
PASSED_ON = (signal.SIGUSR1, signal.SIGTERM)


def client(path: str, words: list[str]) -> int:
    """Have the server run a command line; returns its exit code."""
    process, received = 0, []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        if process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        request = {"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [json.dumps(request).encode()], [1, 2])
        process = int(connection.recv(64))
        for number in received:
            os.kill(process, number)
        answer = connection.recv(64)
    return int(answer) if answer else 1


class Server:
    """Forks a process for every connection."""

    def __init__(self, path: str) -> None:
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.bind(path)
        self.listening.listen()
        self.jobs: dict[int, socket.socket] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listening, selectors.EVENT_READ)
        self.selector.register(sys.stdin, selectors.EVENT_READ)

    def serve(self) -> None:
        """Serve until the input ends."""
        while True:
            for key, _ in self.selector.select(POLL_SECONDS):
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is self.listening:
                    self._start()
                else:
                    self._client_died(key.data)
            self._reap()

    def _start(self) -> None:
        connection, _ = self.listening.accept()
        text, descriptors, _, _ = socket.recv_fds(connection, LARGEST, 2)
        process = os.fork()
        if process == 0:
            run_and_exit(json.loads(text), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(process).encode())
        self.jobs[process] = connection
        self.selector.register(connection, selectors.EVENT_READ, process)

    def _client_died(self, process: int) -> None:
        self.selector.unregister(self.jobs[process])
        os.kill(process, signal.SIGKILL)

    def _reap(self) -> None:
        for process, connection in list(self.jobs.items()):
            done, status = os.waitpid(process, os.WNOHANG)
            if not done:
                continue
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                connection.send(str(code if code >= 0 else 128 - code).encode())
            with contextlib.suppress(KeyError):
                self.selector.unregister(connection)
            connection.close()
            del self.jobs[process]


def run_and_exit(request: dict[str, object], descriptors: list[int]) -> None:
    """Run a command line with the client's output, folder and environment; does not return."""
    code = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(descriptors, start=1):
            os.dup2(descriptor, number)
        os.chdir(str(request["cwd"]))
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["xlstm-distill", *request["words"]]
        from xlstm_distill.cli.app import main

        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def load() -> None:
    """Import what the stages import."""
    import matplotlib.figure  # noqa: F401
    import torch

    import xlstm_distill.cli.app
    import xlstm_distill.stages.align
    import xlstm_distill.stages.capture
    import xlstm_distill.stages.distill
    import xlstm_distill.stages.evaluate
    import xlstm_distill.stages.merge
    import xlstm_distill.stages.prepare
    import xlstm_distill.stages.report  # noqa: F401

    for name in ALSO:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    torch.set_num_threads(1)


if __name__ == "__main__":
    if sys.argv[2:3] == ["--client"]:
        sys.exit(client(sys.argv[1], sys.argv[3:]))
    load()
    Server(sys.argv[1]).serve()

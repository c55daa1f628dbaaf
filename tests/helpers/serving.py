"""Start `xlstm-distill serve` for tests, and wait until it answers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import ROOT, process_environment

VLLM_PYTHON = Path(os.environ.get("VLLM_PYTHON", ROOT / ".venv/vllm/bin/python"))
"""Has vLLM in an environment of its own, because it pins a torch."""


@dataclass
class Served:
    """A server's process, its address, a client of the OpenAI API, and the model's name."""

    process: subprocess.Popen[str]
    port: int
    client: Any
    name: str

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def endless(student: Path, folder: Path) -> Path:
    """Copy a student into a folder, so that its answers have no end."""
    shutil.copytree(student, folder)
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": None}))
    return folder


@contextlib.contextmanager
def serve(python: str | Path, model: Path, *words: str, **settings: str) -> Iterator[Served]:
    """Serve a model; `words`: more of the command line, `settings`: of the environment."""
    import openai

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = model.parent / "server.log"
    with log.open("w") as problems:
        process = subprocess.Popen(
            [python, "-m", "xlstm_distill", "serve", model, "--port", str(port), *words],
            stdout=subprocess.PIPE,
            stderr=problems,
            text=True,
            env=process_environment(**settings),
            # A shell may start the tests with Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        root = f"http://127.0.0.1:{port}"
        # Without retries: a failure must show.
        client = openai.OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0, timeout=300)
        try:
            _wait(root, process, log)
            yield Served(process, port, client, str(model))
        finally:
            # In order, so that it ends the processes that it has started.
            process.terminate()
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _wait(root: str, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + 800
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{root}/health"):
            return
        time.sleep(0.3)
    raise AssertionError(f"the server did not start: {log.read_text()[-4000:]}")

"""Where a student is served, and what is checked before an engine loads it."""

from __future__ import annotations

import importlib.util
import socket
from dataclasses import dataclass

from xlstm_distill.errors import UserError
from xlstm_distill.export.source import FoundStudent

NEEDED = {"vllm": ("vllm",), "transformers": ("fastapi", "uvicorn", "openai")}
"""The packages of each engine, the preferred engine first."""
EXTRAS = {"vllm": "vllm", "transformers": "serve"}
LIMITS = {
    "vllm": "requests in one batch, prompts in chunks; one device, no prefix caching",
    "transformers": "one request at a time, others wait; stop strings stay in the answer; n, "
    "logprobs and response_format are ignored",
}


@dataclass(frozen=True)
class Endpoint:
    """A student, the name that requests call it by, and where it listens.

    device: None leaves the choice to the engine. dtype: None takes that of the files.
    """

    student: FoundStudent
    name: str
    host: str
    port: int
    device: str | None = None
    dtype: str | None = None

    @property
    def url(self) -> str:
        """Address for clients of the OpenAI API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"


def check_address(endpoint: Endpoint) -> None:
    """Refuse an address that cannot be listened on.

    Engines find out only after they have loaded the model.

    Raises:
        UserError: the host is not this machine's, or the port is taken.
    """
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--host: {endpoint.host!r} is no address: {error.strerror}.") from None
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise UserError(
                f"--port: cannot listen on {endpoint.host}:{endpoint.port}: {error.strerror}; give "
                "another port, or another --host."
            ) from None


def choose_engine(asked: str | None) -> str:
    """Return the engine that was asked for; by default vLLM where it is installed.

    Raises:
        UserError: there is no such engine, or its packages are missing.
    """
    if asked is not None and asked not in NEEDED:
        raise UserError(f"--engine: {asked!r} is not allowed; one of {', '.join(NEEDED)}.")
    engine = asked or ("transformers" if _missing("vllm") else "vllm")
    if missing := _missing(engine):
        raise UserError(
            f"serve: {', '.join(missing)} missing, which the engine {engine} needs; pip install "
            f"'xlstm-distill[{EXTRAS[engine]}]'."
        )
    return engine


def _missing(engine: str) -> list[str]:
    return [name for name in NEEDED[engine] if importlib.util.find_spec(name) is None]

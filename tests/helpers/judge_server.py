"""A judge for tests: an OpenAI-compatible server on this machine, in a thread."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, dict[str, str], str]
"""What it says; or status, headers and body."""


@contextlib.contextmanager
def judge_server(
    reply: Callable[[dict[str, Any]], Reply],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answer requests by their body; yields the endpoint, and a list of all that was asked.

    An entry is a request's body, with its path and its key.
    """
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(
                body | {"path": self.path, "authorization": self.headers.get("Authorization")}
            )
            said = reply(body)
            if isinstance(said, str):
                message = {"message": {"role": "assistant", "content": said}}
                said = (200, {}, json.dumps({"choices": [message]}))
            status, headers, text = said
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Hand a student to transformers' own server (`transformers serve`).

That server loads models by name from the hub and finds their class in transformers itself. A
student has its class here, and its name may be a run's directory. So the manager of models is
replaced, through the methods that the server's handlers call; all else is transformers'.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jinja2
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager
from transformers.cli.serving.model_manager import ModelManager

from xlstm_distill.runtime.console import Console
from xlstm_distill.serving.endpoint import Endpoint
from xlstm_distill.serving.speaker import Speaker

ENDING_SECONDS = 5
"""How long answers that are being written may go on after a signal."""
BAD_REQUESTS = (KeyError, TypeError, ValueError, jinja2.TemplateError)
"""What handlers raise where a request is malformed; the server would answer with 500."""


def run(endpoint: Endpoint, console: Console) -> None:
    """Serve a student until a signal ends the server.

    Raises:
        UserError: the student cannot be loaded.
    """
    speaker = Speaker.load(endpoint.student, endpoint.device, endpoint.dtype)

    def manager(**_: Any) -> StudentManager:
        return StudentManager(endpoint.name, speaker)

    # `Serve` makes its manager itself, and takes no other.
    with mock.patch.object(model_manager, "ModelManager", manager):
        served = _Serve(
            force_model=endpoint.name,
            continuous_batching=False,  # it needs attention with a paged cache
            host=endpoint.host,
            port=endpoint.port,
            log_level="error",
            non_blocking=True,  # calls `start_server`
        )
    console.line(f"Serving {endpoint.name} at {endpoint.url}, on {speaker.student.device}.")
    served.server.run()


class StudentManager(ModelManager):
    """Holds one loaded student, under a name that is taken as it is."""

    def __init__(self, name: str, speaker: Speaker) -> None:
        self.speaker, self.started = speaker, int(time.time())
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name: students have no revisions."""
        return model_id

    def load_model_and_processor(  # type: ignore[override]
        self,
        model_id_and_revision: str,
        progress_callback: Callable[[dict[str, Any]], None] | None = None,
        **_: Any,
    ) -> tuple[Any, Any]:
        """Return the student and its tokenizer.

        Raises:
            ValueError: another model was asked for.
        """
        name = model_id_and_revision
        if name != self.force_model:
            raise ValueError(f"model: {name!r} is not served here; it is {self.force_model!r}.")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": name, "cached": True})
        return self.speaker.student, self.speaker.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """List the student alone, not the models of the hub's cache."""
        found = {"id": self.force_model, "object": "model", "created": self.started}
        return [found | {"owned_by": "xlstm-distill"}]


class _Serve(Serve):
    """Makes the server, and leaves it to others to run it."""

    def start_server(self) -> None:
        """Have malformed requests answered with 400, and answers cut when the server ends."""
        config = self.server.config
        config.timeout_graceful_shutdown = ENDING_SECONDS
        app: Any = config.app
        for kind in BAD_REQUESTS:
            app.add_exception_handler(kind, _refuse)


async def _refuse(_: Any, error: Exception) -> Any:
    """Answer as the OpenAI API does."""
    from fastapi.responses import JSONResponse

    missing = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
    found = {"message": missing, "type": "invalid_request_error", "code": 400}
    return JSONResponse({"error": found}, status_code=400)

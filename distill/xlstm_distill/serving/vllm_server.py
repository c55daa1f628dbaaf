"""Hand a student to vLLM's server: this process becomes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from xlstm_distill.errors import UserError
from xlstm_distill.runtime.console import Console
from xlstm_distill.serving.endpoint import Endpoint

# Not the command `vllm`: it asks for its version under a name that builds for CPUs do not have.
MODULE = "vllm.entrypoints.openai.api_server"


def run(endpoint: Endpoint, options: Sequence[str], console: Console) -> NoReturn:
    """Serve a student until a signal ends vLLM.

    options: of `vllm serve`, as a user writes them.

    Raises:
        UserError: a device was named.
    """
    if endpoint.device is not None:
        raise UserError(
            f"--device: vLLM takes no {endpoint.device!r}; choose GPUs with CUDA_VISIBLE_DEVICES, "
            "or use --engine transformers."
        )
    console.line(f"Serving {endpoint.name} at {endpoint.url}.")
    sys.stdout.flush()
    # vLLM would report each start to its authors.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.execv(sys.executable, [sys.executable, "-m", MODULE, *arguments(endpoint), *options])


def arguments(endpoint: Endpoint) -> list[str]:
    """Return the arguments of vLLM's command line."""
    config = endpoint.student.config
    # By itself vLLM serves float32 weights in bfloat16.
    dtype = endpoint.dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    return [
        "--model",
        str(endpoint.student.directory),
        "--served-model-name",
        endpoint.name,
        "--host",
        endpoint.host,
        "--port",
        str(endpoint.port),
        "--dtype",
        str(dtype),
    ]

"""Let FSDP2 and DeepSpeed shard over CPU processes (gloo); accelerate allows accelerators only.

Python imports a module of this name by itself if its folder is on the path. It acts only in the
processes of a launcher. The package does not contain it.
"""

from __future__ import annotations

import os
import sys


def _is_available() -> bool:
    """Claim an accelerator, except to the compiler, which would ask it for its stream."""
    return not sys._getframe(1).f_globals.get("__name__", "").startswith("torch._dynamo")


def _shard_on_cpu() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # accelerate shards only where it finds an accelerator and a backend for several of them.
    torch.accelerator.is_available = _is_available
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        # A C++ extension, which would be compiled first. DeepSpeed works over gloo without it.
        deepspeed.comm.torch.build_shm_op = lambda: None


if "RANK" in os.environ and {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ):
    _shard_on_cpu()

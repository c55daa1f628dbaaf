"""Lets FSDP2 and DeepSpeed shard over CPU processes (gloo), which accelerate does for accelerators only.

Python imports this module by itself where this folder is on its path; it acts in the processes of a launcher only.
Test code: nothing of it is in the package.
"""

from __future__ import annotations

import os


def _shard_on_cpu() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    torch.accelerator.is_available = lambda: True
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.comm.torch

        deepspeed.comm.torch.build_shm_op = lambda: (
            None
        )  # a C++ extension that would be compiled first


if "RANK" in os.environ and {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & set(os.environ):
    _shard_on_cpu()

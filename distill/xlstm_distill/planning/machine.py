"""What a run can be planned for: GPUs, how they share the student, and what share of their peak is assumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from xlstm_distill.errors import UserError
from xlstm_distill.planning.activations import Backend
from xlstm_distill.planning.memory import SHARDINGS, Sharding
from xlstm_distill.recipe.problems import did_you_mean
from xlstm_kernels import dispatch


@dataclass(frozen=True)
class Gpu:
    """Memory (bytes) and dense peak rates (operations per second), from the vendor's data sheet."""

    name: str
    memory: float
    bf16: float
    fp32: float


def _gpu(name: str, gigabytes: float, bf16_tflops: float, fp32_tflops: float) -> Gpu:
    return Gpu(name, gigabytes * 1e9, bf16_tflops * 1e12, fp32_tflops * 1e12)


# NVIDIA's data sheets; bf16 without sparsity (half of the figure with it). SXM modules where there are several.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 40, 312, 19.5),
        _gpu("a100-80gb", 80, 312, 19.5),
        _gpu("h100-80gb", 80, 989.5, 67),
        _gpu("h200-141gb", 141, 989.5, 67),
        _gpu("b200-180gb", 180, 2250, 75),
        _gpu("l40s-48gb", 48, 362, 91.6),
    )
}


@dataclass(frozen=True)
class Utilisation:
    """Share of a GPU's peak that a stage is assumed to reach, and why."""

    share: float
    reason: str


# Published: Llama 3.1 8B under FSDP on 8 H100, bf16, PyTorch without and with compilation: 33 % and 39 % (torchtitan,
# December 2024). The rest is chosen: no GPU has run these stages yet.
_TRITON: Mapping[str, Utilisation] = {
    "capture": Utilisation(0.40, "a forward pass alone; chosen, above distill's"),
    "align": Utilisation(
        0.25, "a teacher's pass beside mixers bound by memory; chosen, below distill's"
    ),
    "distill": Utilisation(
        0.33, "published for an 8B Llama under FSDP on 8 H100 without compilation"
    ),
}
_TORCH: Mapping[str, Utilisation] = {
    "capture": _TRITON["capture"],
    "align": Utilisation(0.10, "mLSTM and window in plain torch, bound by memory; chosen"),
    "distill": Utilisation(0.20, "mLSTM and window in plain torch, bound by memory; chosen"),
}


@dataclass(frozen=True)
class Machine:
    """What a recipe is planned for. `mfu` and `price` (per GPU and hour) are None where they are not given."""

    gpu: Gpu
    gpus: int
    sharding: Sharding
    backend: Backend
    mfu: float | None = None
    price: float | None = None


def find_gpu(name: str) -> Gpu:
    """Look up a GPU.

    Raises:
        UserError: it is not in the table.
    """
    if name not in GPUS:
        raise UserError(f"--gpu: {name!r} is not in the table. {did_you_mean(name, sorted(GPUS))}")
    return GPUS[name]


def utilisation(stage: str, backend: Backend, given: float | None) -> Utilisation:
    """Return the share of the peak assumed for a stage; `given` overrides it."""
    if given is not None:
        return Utilisation(given, "given by --mfu")
    return (_TRITON if backend == "triton" else _TORCH)[stage]


def make_machine(
    gpu: str,
    gpus: int,
    sharding: str | None,
    backend: str,
    *,
    mfu: float | None = None,
    price: float | None = None,
) -> Machine:
    """Check the command line's options; `sharding` None means FSDP2, or nothing on one GPU.

    Raises:
        UserError: one of them is not allowed.
    """
    if gpus < 1:
        raise UserError(f"--gpus: {gpus} must be at least 1.")
    sharding = sharding or ("fsdp2" if gpus > 1 else "none")
    if sharding not in SHARDINGS:
        raise UserError(
            f"--sharding: {sharding!r} is not allowed. Allowed: {', '.join(SHARDINGS)}."
        )
    if sharding == "none" and gpus > 1:
        raise UserError(
            f"--sharding: 'none' is for one GPU, --gpus is {gpus}; take ddp, fsdp2 or zero1 to zero3."
        )
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu: {mfu:g} must be above 0 and at most 1, for example 0.35.")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price: {price:g} must be a number of at least 0.")
    return Machine(find_gpu(gpu), gpus, sharding, _backend(backend), mfu, price)


def _backend(name: str) -> Backend:
    chosen = dispatch.AUTO if name == "auto" else name
    if chosen == "torch":
        return "torch"
    if chosen == "triton":
        return "triton"
    raise UserError(f"--backend: {name!r} is not allowed. Allowed: auto, torch, triton.")

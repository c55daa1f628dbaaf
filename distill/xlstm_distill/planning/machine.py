"""Describe what a run is planned for: GPUs, how they share the student, and the assumed MFU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from xlstm_distill.errors import UserError
from xlstm_distill.planning.activations.passes import Backend
from xlstm_distill.planning.communication import Links
from xlstm_distill.planning.inputs import SHARDINGS, Sharding
from xlstm_distill.recipe.problems import did_you_mean

DEFAULT_GPU = "h100-80gb"


@dataclass(frozen=True)
class Gpu:
    """Memory (bytes), dense peak rates (operations per second), links; None where not known."""

    name: str
    memory: float
    bf16: float | None = None
    fp32: float | None = None
    links: Links | None = None
    bandwidth: float | None = None
    """Bytes a second of its memory."""


REACHED = 0.8
"""Share of a link's bandwidth that collectives reach. Chosen; NCCL's own tests reach about that."""


def _gpu(
    name: str,
    gigabytes: float,
    bf16_tflops: float,
    fp32_tflops: float,
    within: float,
    network: float,
    bandwidth: float,
) -> Gpu:
    """Make a GPU; links and memory bandwidth in GB/s, links in one direction."""
    links = Links(REACHED * within * 1e9, REACHED * network * 1e9)
    rates = bf16_tflops * 1e12, fp32_tflops * 1e12
    return Gpu(name, gigabytes * 1e9, *rates, links, bandwidth * 1e9)


# NVIDIA's data sheets and architecture white papers. bf16 is without sparsity (half of the figure
# with it) and accumulates in fp32, which GeForce cards do at half the rate of fp16 accumulation.
# fp32 is outside of the tensor cores. SXM modules where there are several. Links: NVLink, or PCIe
# where there is none, one direction; and the network of NVIDIA's own systems (DGX: 200, 400 or 800
# Gbit/s for each GPU). For GPUs without NVLink, 100 Gbit/s for a node of 8 is chosen.
GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx4090-24gb", 24, 165.2, 82.6, 32, 1.56, 1008),
        _gpu("rtx5090-32gb", 32, 209.5, 104.8, 64, 1.56, 1792),
        _gpu("l4-24gb", 24, 121, 30.3, 32, 1.56, 300),
        _gpu("a10g-24gb", 24, 70, 35, 32, 1.56, 600),
        _gpu("l40s-48gb", 48, 362, 91.6, 32, 1.56, 864),
        _gpu("a100-40gb", 40, 312, 19.5, 300, 25, 1555),
        _gpu("a100-80gb", 80, 312, 19.5, 300, 25, 2039),
        _gpu("h100-80gb", 80, 989.5, 67, 450, 50, 3350),
        _gpu("h200-141gb", 141, 989.5, 67, 450, 50, 4800),
        _gpu("b200-180gb", 180, 2250, 75, 900, 50, 8000),
        # Data sheets give 270 to 288 GB, depending on the system: the plan takes the least.
        _gpu("b300", 270, 2250, 75, 900, 100, 8000),
    )
}


@dataclass(frozen=True)
class Utilisation:
    """Share of a GPU's peak that a stage is assumed to reach, and why."""

    share: float
    reason: str


# Published: Llama 3.1 8B under FSDP on 8 H100, bf16, PyTorch without and with compilation: 33 % and
# 39 % (torchtitan, December 2024). The rest is chosen: no GPU has run these stages yet.
_TRITON: Mapping[str, Utilisation] = {
    "capture": Utilisation(0.40, "a forward pass alone; chosen, above distill's"),
    "align": Utilisation(
        0.25, "a teacher's pass beside mixers bound by memory; chosen, below distill's"
    ),
    "distill": Utilisation(
        0.33, "published for an 8B Llama under FSDP on 8 H100 without compilation"
    ),
}
SAMPLING = 0.5
"""Share of a GPU's memory bandwidth that decoding reaches. Chosen: no GPU has run it yet."""
_TORCH: Mapping[str, Utilisation] = {
    "capture": _TRITON["capture"],
    "align": Utilisation(0.10, "mLSTM and window in plain torch, bound by memory; chosen"),
    "distill": Utilisation(0.20, "mLSTM and window in plain torch, bound by memory; chosen"),
}


@dataclass(frozen=True)
class Machine:
    """What a recipe is planned for; `mfu` and `price` (per GPU and hour) are None if not given."""

    gpu: Gpu
    gpus: int
    sharding: Sharding
    backend: Backend
    mfu: float | None = None
    price: float | None = None
    node: int = 8
    """GPUs of a node."""


def find_gpu(name: str | None, memory: float | None = None) -> Gpu:
    """Look up a GPU; `memory` (GB) replaces the table's, and is enough for a GPU with no `name`.

    Raises:
        UserError: the name is not in the table, or the memory is no size.
    """
    if memory is not None and not 0 < memory < math.inf:
        raise UserError(f"--gpu-memory: {memory:g} must be a number of GB above 0, for example 24.")
    if name is None and memory is not None:
        return Gpu(f"GPU of {memory:g} GB", memory * 1e9)
    name = name or DEFAULT_GPU
    if name not in GPUS:
        known = did_you_mean(name, sorted(GPUS))
        raise UserError(
            f"--gpu: {name!r} is not in the table. {known} "
            "For any other GPU give its memory: --gpu-memory GB."
        )
    return GPUS[name] if memory is None else replace(GPUS[name], memory=memory * 1e9)


def utilisation(stage: str, backend: Backend, given: float | None) -> Utilisation:
    """Return the share of the peak assumed for a stage; `given` overrides it."""
    # A refinement trains as stage II does; its sampling is timed by itself.
    # So does one of learned merge weights.
    stage = "distill" if stage in ("refine", "merge", "variant") else stage
    if given is not None:
        return Utilisation(given, "given by --mfu")
    return (_TRITON if backend == "triton" else _TORCH)[stage]


def make_machine(
    gpu: str | None = None,
    gpus: int = 8,
    sharding: str | None = None,
    backend: str = "auto",
    *,
    gpu_memory: float | None = None,
    mfu: float | None = None,
    price: float | None = None,
    node: int = 8,
    link: float | None = None,
    network: float | None = None,
) -> Machine:
    """Check the command line's options; `sharding` None means FSDP2, or nothing on one GPU.

    `link` and `network` (GB/s) replace the GPU's: to the others of its node, and to other nodes.

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
            f"--sharding: 'none' is for one GPU, --gpus is {gpus}; "
            "take ddp, fsdp2, hsdp or zero1 to zero3."
        )
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu: {mfu:g} must be above 0 and at most 1, for example 0.35.")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price: {price:g} must be a number of at least 0.")
    if node < 1:
        raise UserError(f"--node: {node} must be at least 1.")
    if sharding == "hsdp" and (gpus % node or gpus <= node or node < 2):
        raise UserError(
            f"--sharding: 'hsdp' needs several whole nodes, and {gpus} GPUs are not several nodes "
            f"of {node}; take fsdp2, or change --gpus or --node."
        )
    for option, value in (("--link", link), ("--network", network)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{option}: {value:g} must be a number of GB/s above 0.")
    found = with_links(find_gpu(gpu, gpu_memory), link, network)
    return Machine(found, gpus, sharding, _backend(backend), mfu, price, node)


def with_links(gpu: Gpu, link: float | None, network: float | None) -> Gpu:
    """Replace a GPU's links by what was given (GB/s); a GPU that has none needs `link`."""
    known = gpu.links
    within = link * 1e9 if link is not None else known.within if known else None
    if within is None:
        return gpu
    between = network * 1e9 if network is not None else known.between if known else within
    return replace(gpu, links=Links(within, between))


def _backend(name: str) -> Backend:
    if name == "torch":
        return "torch"
    # What is planned runs on GPUs, where `auto` is Triton, as long as its kernels are right there.
    if name in ("triton", "auto"):
        return "triton"
    raise UserError(f"--backend: {name!r} is not allowed. Allowed: auto, torch, triton.")

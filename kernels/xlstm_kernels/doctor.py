"""What this machine has for the kernels: versions, devices, verdicts, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from xlstm_kernels import dispatch, toolchain, verdicts
from xlstm_kernels.verdicts import Listener, Question, Runner, Verdict

# Packages by what they are for; only the first is needed for the kernels.
PACKAGES = {
    "triton": "the kernels for GPUs",
    "transformers": "the models",
    "accelerate": "training",
    "deepspeed": "training under ZeRO",
    "mlstm_kernels": "a comparison in the benchmark",
    "flash-linear-attention": "a comparison in the benchmark",
}
VARIABLES = (
    dispatch.BACKEND_VARIABLE,
    verdicts.FOLDER_VARIABLE,
    "XLSTM_KERNELS_KEEP_STATES",
    "XLSTM_KERNELS_SUPER_CHUNKS",
    "TRITON_PTXAS_PATH",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
)
# What the families have beside scores: nothing, Gemma 2's bound, gpt-oss's logits.
SOFTMAXES = ((), ("softcap",), ("sink_logits",))


@dataclass(frozen=True)
class Device:
    """A CUDA device and its verdicts, by question."""

    index: int
    name: str
    capability: str
    ptxas: str
    faults: list[str]
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Report:
    """What the doctor found. advice: what to do, in order of weight; empty if all is well."""

    versions: dict[str, str]
    environment: dict[str, str]
    folder: str
    devices: list[Device]
    auto: str
    advice: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether every kernel that was asked about is right."""
        return all(v.right for device in self.devices for v in device.verdicts.values())


def examine(
    dims: Sequence[int],
    dtypes: Iterable[str],
    runner: Runner = verdicts.in_a_child,
    listener: Listener | None = None,
) -> Report:
    """Look at this machine; asks about every operator on every device, at these head dims.

    listener: hears each verdict as it comes.
    """
    asked = [each for dim in dims for dtype in dtypes for each in questions(dim, dtype)]
    count = torch.cuda.device_count() if toolchain.triton_version() else 0
    devices = [_device(index, asked, runner, listener) for index in range(count)]
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    versions |= {"cuda": str(torch.version.cuda or "none")}
    versions |= {name: _version(name) for name in PACKAGES}
    environment = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return Report(
        versions, environment, str(verdicts.folder()), devices,
        auto=_auto(devices), advice=list(dict.fromkeys(_advice(devices))),
    )  # fmt: skip


def questions(dim: int, dtype: str) -> list[Question]:
    """List the questions of mixers whose heads have one width.

    They have as many features (`softmax`) or twice as many (`hedgehog`), and one of `SOFTMAXES`.
    """
    at, attention = getattr(torch, dtype), {"D": dim}
    softmaxes = [dispatch.variant("sliding_window_attention", extras) for extras in SOFTMAXES]
    found = [verdicts.question(operator, at, attention) for operator in softmaxes]
    for features in (dim, 2 * dim):
        if features in dispatch.HEAD_DIMS:
            memory = {"Dk": features, "Dv": dim}
            found += [verdicts.question(name, at, memory) for name in ("mlstm", "mlstm_step")]
            steps = [dispatch.variant("hybrid_step", extras) for extras in SOFTMAXES]
            found += [verdicts.question(operator, at, memory | attention) for operator in steps]
    return found


def _device(
    index: int, asked: Sequence[Question], runner: Runner, listener: Listener | None
) -> Device:
    facts = verdicts.machine(index)
    answers = verdicts.ask(asked, index, runner, listener)
    found = {each.words(): verdict for each, verdict in zip(asked, answers, strict=True)}
    capability = int(facts["capability"].replace(".", ""))
    faults = toolchain.known_faults(capability, facts["triton"], facts["ptxas"])
    return Device(index, facts["device"], facts["capability"], facts["ptxas"], faults, found)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed ({PACKAGES[package]})"


def _auto(devices: Sequence[Device]) -> str:
    """Say what "auto" runs here."""
    forced = dispatch.forced_backend()
    if forced is not None:
        return f"{forced}, because {dispatch.BACKEND_VARIABLE} says so"
    if not devices:
        missing = toolchain.triton_fault() if torch.cuda.is_available() else None
        return f"torch: {missing or 'there is no CUDA device'}"
    wrong = [words for device in devices for words, v in device.verdicts.items() if not v.right]
    return f"triton, but torch for: {'; '.join(dict.fromkeys(wrong))}" if wrong else "triton"


def _advice(devices: Sequence[Device]) -> Iterable[str]:
    if torch.cuda.is_available() and (missing := toolchain.triton_fault()):
        yield f"{missing}; install triton (3.6 to 3.9), without it everything runs on torch"
    for device in devices:
        wrong = any(not verdict.right for verdict in device.verdicts.values())
        # A warning where all is right would only worry: the check has run these very kernels.
        faults = device.faults if wrong else []
        yield from faults
        if any("TRITON_PTXAS_PATH" in fault for fault in faults):
            better = toolchain.sounder_assembler()
            if better is not None:
                yield f"this machine has ptxas {better.version}: TRITON_PTXAS_PATH={better.path}"
        if wrong and not faults:
            yield "report the figures above, with the versions; torch runs until they are right"

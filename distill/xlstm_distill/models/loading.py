"""Load a saved student tensor by tensor: no process ever holds all of its weights on the host.

Where FSDP2 shards, a rank reads its slice of each tensor and nothing else. For a student of 8B
parameters in fp32 over 8 ranks of a node that is 4 GB a rank, and not 8 x 32 GB of host memory. To
read on one rank and broadcast would move as many bytes over the network as the file has, and hold
each tensor whole on every rank; here the ranks of a node share the file in the page cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from xlstm_distill.errors import RunError
from xlstm_distill.models.families import CausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BASE = ".base_layer."
"""What an adapter (LoRA) puts into the name of the weight that it adapts."""


def empty_student(directory: Path, dtype: torch.dtype) -> CausalLM:
    """Make a saved student without its weights: its parameters are on the meta device.

    Buffers that no file holds are computed, others are read. `load_shards` reads the weights.

    Raises:
        RunError: the model has a buffer that cannot be computed here.
    """
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        student: CausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # RoPE's frequencies are in no file: a module of its own on the CPU computes them.
    rotary = student.model.rotary_emb
    student.model.rotary_emb = type(rotary)(config=config)
    files, saved = WeightFiles(directory), student.state_dict().keys()
    for path, module in student.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            full = f"{path}.{name}"
            if buffer.is_meta and full in saved and full in files:
                # Constants of Apertus's activation.
                setattr(module, name, files[full].clone().to(buffer.dtype))
            elif buffer.is_meta:
                # A family may have others (Gemma's embedding scale), which it computes by itself.
                module.register_buffer(
                    name, torch.full_like(buffer, torch.nan, device="cpu"), False
                )
                student._init_weights(module)
    for name, buffer in student.named_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise RunError(f"{directory}: buffer {name} is in no file and cannot be computed.")
    if (directory / "generation_config.json").exists():
        student.generation_config = GenerationConfig.from_pretrained(directory)
    return student.eval()


def load_shards(student: CausalLM, directory: Path, device: torch.device) -> None:
    """Read what is still on the meta device: of sharded parameters this rank's shard alone.

    Values are converted to each parameter's dtype on `device`, slice by slice.

    Raises:
        RunError: a file holds no such tensor, or one of another shape.
    """
    files = WeightFiles(directory)
    read: dict[str, Tensor] = {}
    # Tied weights come once, under their first name.
    for name, parameter in student.named_parameters():
        if parameter.is_meta:
            read[name] = files.read(name.replace(BASE, "."), parameter, device)
    fill(student, read, directory)


def allocate(student: CausalLM, device: torch.device, directory: Path) -> None:
    """Give what is still on the meta device memory without values; the caller writes all of them.

    `directory` is where the student was described.
    """
    made = {
        name: torch.empty_like(parameter, device=device)
        for name, parameter in student.named_parameters()
        if parameter.is_meta
    }
    fill(student, made, directory)


def fill(student: CausalLM, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Give a student on the meta device these tensors as its weights; `directory` held them.

    Raises:
        RunError: one is missing, or the student has no such weight.
    """
    unexpected = student.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    if unexpected:
        raise RunError(f"{directory}: {unexpected[0]} is no weight of this model.")
    student.tie_weights()
    left = [name for name, parameter in student.named_parameters() if parameter.is_meta]
    if left:
        raise RunError(f"{directory}: {left[0]} got no weights; the model's files are not whole.")


class WeightFiles(Mapping[str, Tensor]):
    """The weights of a saved model by name, from mapped files: only what is read is loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.open: dict[str, Any] = {}
        index = directory / INDEX
        if index.exists():
            self.place: dict[str, str] = json.loads(index.read_text())["weight_map"]
        else:
            self.place = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor whose memory is the mapped file."""
        tensor: Tensor = self._file(self.place[name]).get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    def _file(self, name: str) -> Any:
        if name not in self.open:
            self.open[name] = safe_open(self.directory / name, "pt")
        return self.open[name]

    def count_numbers(self) -> int:
        """Count the numbers of all tensors, from the files' headers."""
        shapes = (self._file(file).get_slice(name).get_shape() for name, file in self.place.items())
        return sum(map(math.prod, shapes))

    def read(self, name: str, like: nn.Parameter, device: torch.device) -> Tensor:
        """Read a tensor in the form of a parameter on the meta device."""
        if name not in self.place:
            raise RunError(f"{self.directory}: holds no {name}; train the stage before it again.")
        stored = self._file(self.place[name]).get_slice(name)
        if tuple(stored.get_shape()) != tuple(like.shape):
            raise RunError(
                f"{self.directory}: {name} has shape {tuple(stored.get_shape())}, the model needs "
                f"{tuple(like.shape)}."
            )
        if not isinstance(like, DTensor):
            # In two steps: one would convert on the host, into a copy of twice the size.
            return stored[:].to(device).to(like.dtype)
        dim, start, length = _span(like)
        shape = list(like.to_local().shape)
        if length:
            local = stored[(slice(None),) * dim + (slice(start, start + length),)]
        else:
            local = torch.empty(shape)  # fewer rows than ranks
        return DTensor.from_local(
            local.to(device).to(like.dtype),
            like.device_mesh,
            like.placements,
            shape=like.shape,
            stride=like.stride(),
        )


def _span(like: Any) -> tuple[int, int, int]:
    """Return the dimension in which a parameter is cut, where this rank's shard starts, its size.

    FSDP2 cuts as `torch.chunk` does: all shards but the last ones are of the same size. With HSDP
    the other mesh dimension holds copies.
    """
    mesh_dim = next(n for n, place in enumerate(like.placements) if isinstance(place, Shard))
    dim = like.placements[mesh_dim].dim
    ranks = like.device_mesh.size(mesh_dim)
    most = -(-like.shape[dim] // ranks)
    start = min(most * like.device_mesh.get_local_rank(mesh_dim), like.shape[dim])
    return dim, start, min(most, like.shape[dim] - start)

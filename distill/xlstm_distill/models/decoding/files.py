"""A cache as a file: what a prompt has left behind, to go on from without reading it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from xlstm_distill.artifacts.files import written_whole
from xlstm_distill.errors import UserError
from xlstm_distill.models.cache import AllKeys, MixerCacheLayer, StudentCache
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.segments import RowEnds
from xlstm_kernels import MLSTMState

FORMAT = "xlstm-distill cache 1"
# They say where a model came from and how it is used, not what it computes.
IMMATERIAL = ("_name_or_path", "architectures", "auto_map", "transformers_version", "use_cache")
SAMPLED = 64
"""Numbers of each parameter that the hash of a model reads."""


def save_cache(student: CausalLM, cache: StudentCache, path: Path | str) -> None:
    """Write a student's cache to a safetensors file, whole or not at all.

    Raises:
        ValueError: the cache is empty.
    """
    if cache.lengths is None or cache.ends is None:
        raise ValueError("cache: it holds nothing; have the student read a prompt first.")
    tensors = {"lengths": cache.lengths}
    ends = zip(RowEnds._fields, cache.ends, strict=True)
    tensors |= {f"ends.{name}": x for name, x in ends if x is not None}
    for n, layer in enumerate(cache.mixer_layers()):
        found = {"keys": layer.keys, "values": layer.values}
        if layer.full is not None:
            found |= {f"full_{name}": x for name, x in layer.all_keys()._asdict().items()}
        if layer.state is not None:
            found |= layer.state._asdict()
        tensors |= {f"layers.{n}.{name}": x for name, x in found.items() if x is not None}
    metadata = {
        "format": FORMAT,
        "model": model_hash(student),
        "seen": str(cache.get_seq_length()),
    }
    held = {name: x.contiguous().cpu() for name, x in tensors.items()}
    with written_whole(Path(path)) as file:
        file.write(save(held, metadata))


def load_cache(student: CausalLM, path: Path | str) -> StudentCache:
    """Read the cache that `save_cache` wrote of this student, onto the devices of its layers.

    Raises:
        UserError: the file is no cache, or one of another model.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no cache can be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: its format is {metadata.get('format')!r}, not {FORMAT!r}; give a file that "
            "save_cache wrote."
        )
    if metadata["model"] != model_hash(student):
        raise UserError(
            f"{path}: it is another model's cache (other settings, weights or number format); read "
            "the prompt with this one."
        )
    cache: StudentCache = student.new_cache()
    first = next(student.parameters()).device
    cache.lengths = tensors["lengths"].to(first)
    ends: dict[str, Any] = dict.fromkeys(RowEnds._fields)
    for name in ends:
        if f"ends.{name}" in tensors:
            ends[name] = tensors[f"ends.{name}"].to(first)
    cache.ends = RowEnds(**ends)
    for n, (layer, mixer) in enumerate(zip(cache.mixer_layers(), student.mixers(), strict=True)):
        _fill(layer, tensors, f"layers.{n}.", next(mixer.parameters()).device)
        layer.seen = int(metadata["seen"])
    return cache


def _fill(
    layer: MixerCacheLayer, tensors: dict[str, Tensor], prefix: str, device: torch.device
) -> None:
    """Put a layer's tensors in place."""
    found = {
        name.removeprefix(prefix): x.to(device)
        for name, x in tensors.items()
        if name.startswith(prefix)
    }
    if "keys" in found:
        layer.keys, layer.values = found["keys"], found["values"]
    if "C" in found:
        layer.state = MLSTMState(found["C"], found["n"], found["m"])
    if "full_keys" in found:
        layer.full = AllKeys(found["full_keys"], found["full_values"])
    layer.is_initialized = True


def model_hash(model: CausalLM) -> str:
    """Hash what a model computes: its settings, and numbers from all over its parameters.

    A sample tells models apart, because training and merging change all weights.
    """
    settings: dict[str, Any] = model.config.to_dict()
    for name in IMMATERIAL:
        settings.pop(name, None)
    total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        total.update(sample.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()

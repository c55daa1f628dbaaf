"""Experts and a seed student as files, in one file or in several."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xlstm_distill.merging.streaming import BLOCK

EXPERTS = ("a", "b", "c")


def save_weights(tensors: Mapping[str, Tensor], folder: Path, files: int) -> Path:
    """Save tensors as a model does, dealt out to so many files."""
    folder.mkdir(parents=True)
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    place = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::files]}
        save_file(part, folder / name, {"format": "pt"})
        place |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    return folder


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder with the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def students() -> dict[str, dict[str, Tensor]]:
    """A seed student and three experts: several blocks, three formats, a frozen tensor."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    frozen = torch.cat([draw(11), torch.tensor([-0.0])])
    base = {
        "layer.big": draw(BLOCK + 37),
        "layer.bf16": draw(5, 7).bfloat16(),
        "layer.f16": draw(3).half(),
        "norm.frozen": frozen,
        "steps": torch.tensor([3, 5]),
    }
    found = {"base": base}
    for name in EXPERTS:
        moved = {}
        for key, tensor in base.items():
            same = key in ("norm.frozen", "steps")
            step = 0.1 * draw(*tensor.shape)
            moved[key] = tensor.clone() if same else (tensor.float() + step).to(tensor.dtype)
        found[name] = moved
    return found


@pytest.fixture(scope="module")
def places(students, tmp_path_factory) -> Callable[[int], dict[str, Path]]:
    """Folders of the students by name, in so many files."""
    root = tmp_path_factory.mktemp("students")

    def make(files: int) -> dict[str, Path]:
        found = {}
        for name, tensors in students.items():
            folder = root / str(files) / name
            found[name] = folder if folder.exists() else save_weights(tensors, folder, files)
        return found

    return make

"""Reading and writing saved weights in place: the library's bytes, and damage by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from xlstm_distill.errors import RunError
from xlstm_distill.merging.files import NewWeights, SavedWeights


@pytest.mark.parametrize("files", [1, 2])
def test_what_is_written_is_what_was_read_byte_for_byte(files, places, tmp_path):
    source = SavedWeights(places(files)["a"])
    target = NewWeights(source, tmp_path)
    for name, entry in source.entries.items():
        middle = entry.count // 2
        target.write(name, middle, source.read(name, middle))
        target.write(name, 0, source.read(name, 0, middle))
    target.finish()
    for path in source.directory.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_parts_are_the_librarys_tensors(places):
    folder = places(1)["b"]
    weights, expected = SavedWeights(folder), load_file(folder / "model.safetensors")
    for name, tensor in expected.items():
        flat = tensor.flatten()
        assert torch.equal(weights.read(name), flat)
        assert torch.equal(weights.read(name, 1, 2), flat[1:2])
        assert weights.entries[name].shape == tuple(tensor.shape)


def test_what_was_not_written_is_said(places, tmp_path):
    source = SavedWeights(places(1)["a"])
    target = NewWeights(source, tmp_path)
    for name in source.entries:
        if name != "layer.f16":
            target.write(name, 0, source.read(name))
    with pytest.raises(RunError, match=r"3 numbers of layer\.f16 were not written"):
        target.finish()


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_that_is_cut_short_names_itself(size, places, tmp_path):
    whole = (places(1)["a"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    with pytest.raises(RunError, match=r"model\.safetensors: the file is cut short"):
        SavedWeights(tmp_path)


def test_damaged_headers_and_missing_files_are_said(places, tmp_path):
    with pytest.raises(RunError, match=r"model\.safetensors: no such file"):
        SavedWeights(tmp_path)
    whole = bytearray((places(1)["a"] / "model.safetensors").read_bytes())
    whole[8] = ord("x")
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(RunError, match="its header cannot be read"):
        SavedWeights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(RunError, match=r"index\.json: cannot be read"):
        SavedWeights(tmp_path)


def test_an_index_and_files_that_do_not_fit_are_said(places, tmp_path):
    """The library refuses such files; a merge that read them would write the like."""
    folder = shutil.copytree(places(2)["a"], tmp_path / "a")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(good.values()))
    for change, message in (
        ({"ghost": first}, rf"index\.json: names ghost in {first}, which does not hold it"),
        ({key: second for key, file in good.items() if file == first}, "which does not hold it"),
        ({"steps": f"../b/{first}"}, r"index\.json: cannot be read"),
        ({"steps": 1}, r"index\.json: cannot be read"),
    ):
        index.write_text(json.dumps({"weight_map": {**good, **change}}))
        with pytest.raises(RunError, match=message):
            SavedWeights(folder)
    index.write_text(json.dumps({"weight_map": good}))
    whole = (folder / first).read_bytes()
    (folder / first).write_bytes(whole + b"more")
    with pytest.raises(RunError, match=rf"{first}: 4 bytes follow the last tensor"):
        SavedWeights(folder)
    (folder / first).unlink()
    (folder / first).mkdir()
    with pytest.raises(RunError, match=rf"{first}: is no file"):
        SavedWeights(folder)

"""A teacher's hash covers what it is made of and nothing else; pickles are refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.models import teacher as teachers
from xlstm_distill.models.teacher import teacher_hash
from xlstm_distill.models.teacher_files import model_files, weight_files
from xlstm_distill.recipe import Teacher


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A teacher of two shards, with all that may lie beside them."""
    place = tmp_path / "teacher"
    (place / "original").mkdir(parents=True)
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "chat_template.jinja", "modeling.py"),
        *("model-1-of-2.safetensors", "model-2-of-2.safetensors"),
        *("README.md", ".gitattributes", "consolidated.safetensors", "original/consolidated.pth"),
    ):
        (place / name).write_text("{}")
    return place


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
        *("tokenizer_config.json", "chat_template.jinja", "model-2-of-2.safetensors"),
    ],
)
def test_what_it_is_made_of_counts(folder, name):
    before = teacher_hash(Teacher(path=str(folder)))
    (folder / name).write_text('{"changed": 1}')
    assert teacher_hash(Teacher(path=str(folder))) != before


def test_nothing_else_counts(folder, tmp_path):
    before = teacher_hash(Teacher(path=str(folder)))
    for name in ("README.md", ".gitattributes", "consolidated.safetensors", "modeling.py"):
        (folder / name).write_text("changed")
    (folder / "original" / "consolidated.pth").unlink()
    (folder / "NOTICE").write_text("new")
    assert teacher_hash(Teacher(path=str(folder))) == before
    moved = folder.rename(tmp_path / "moved")
    assert teacher_hash(Teacher(path=str(moved))) == before


def test_its_code_counts_where_it_runs(folder):
    assert folder / "modeling.py" in model_files(folder, code=True)
    assert folder / "modeling.py" not in model_files(folder)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "pytorch_model-1-of-2.bin"])
def test_a_pickled_teacher_is_refused_in_one_line(tmp_path, pickle):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / pickle).write_bytes(b"")
    with pytest.raises(UserError, match=rf"pickle \({pickle}\).*safetensors.*save_pretrained"):
        weight_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # then nobody reads the pickle
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_hub_teacher_is_downloaded_once_a_machine(tmp_path, monkeypatch):
    """Two machines of two ranks; a stub stands for the hub."""
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    fetched, loaded, rank = [], [], 0

    def snapshot_download(path, *, revision, allow_patterns):
        assert (path, revision) == ("owner/name", "main")
        fetched.append((rank, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(teachers, "from_rank_zero", lambda make: make() if rank == 0 else None)
    monkeypatch.setattr(teachers, "gathered", lambda mine: [mine])
    monkeypatch.setattr(teachers, "_DOWNLOADED", set())
    monkeypatch.setenv("WORLD_SIZE", "4")
    auto = SimpleNamespace(from_pretrained=lambda path, **o: loaded.append(o["local_files_only"]))
    config = Teacher(path="owner/name")
    for rank in range(4):
        teachers._DOWNLOADED.clear()
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        teachers._load(auto, config, "a model")
        teachers.download_teacher(config)
        teachers._load(auto, config, "a model")
    assert loaded == [False, True] * 4
    assert [by for by, _ in fetched] == [0, 0, 2, 2]
    settings, weights = (patterns for _, patterns in fetched[:2])
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(settings)
    assert weights == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]

    def refuse(*_, **__):
        raise OSError("no such repository\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    rank = 2
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"'owner/name' cannot be downloaded: no such repository$"):
        teachers.download_teacher(config)
    teachers.download_teacher(Teacher(path=str(tmp_path)))  # a folder: nothing to download


def test_an_adapter_a_missing_shard_and_no_weights_are_refused(folder, tmp_path):
    (folder / "model-2-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2-of-2\.safetensors is missing, and model\.saf"):
        weight_files(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="'weight_map'"):
        weight_files(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter"):
        weight_files(folder)
    with pytest.raises(UserError, match="holds no weights"):
        weight_files(tmp_path)

"""Merging saved experts: the bytes of a merge in memory; experts of another seed are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from xlstm_distill import MixerConfig, convert
from xlstm_distill.artifacts import Artifact
from xlstm_distill.errors import RunError
from xlstm_distill.merging.merge import MergePlan
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import workbench
from xlstm_distill.stages.weights.writing import check_seed_student, write_merged

# Binary fractions: with others, ties are common, and whether a CPU fuses product and sum decides.
PLAN = MergePlan("linear", {"a": 0.25, "b": 0.75})


@pytest.fixture
def experts(tiny_teacher, tmp_path, monkeypatch):
    """Two experts with tied embeddings and frozen norms, in one file or in several."""
    student = convert(tiny_teacher(tie_word_embeddings=True), MixerConfig(window=8, sinks=2))

    def make(shard_size):
        monkeypatch.setattr(workbench, "SHARD_SIZE", shard_size)
        for seed, name in enumerate(PLAN.weights):
            torch.manual_seed(seed)
            with torch.no_grad():
                for key, parameter in student.named_parameters():
                    if "norm" not in key:
                        parameter.normal_()
            save(student, tmp_path / shard_size / name)
        return {name: tmp_path / shard_size / name for name in PLAN.weights}

    return make


def save(student, place):
    workbench.save_model(student, SimpleNamespace(save_pretrained=lambda folder: None), place)


def files(place):
    return {file.name: file.read_bytes() for file in place.iterdir()}


def test_it_writes_the_bytes_that_transformers_would(experts, tmp_path):
    places = experts("4GB")
    a, b = (AutoModelForCausalLM.from_pretrained(place) for place in places.values())
    theirs = dict(b.named_parameters())
    with torch.no_grad():
        for name, parameter in a.named_parameters():
            total = 0.25 * parameter.double() + 0.75 * theirs[name].double()
            parameter.copy_(total)
    save(a, tmp_path / "expected")
    write_merged(PLAN, places, None, tmp_path / "merged", "merge", QuietConsole())
    assert files(tmp_path / "merged") == files(tmp_path / "expected")
    # In several files: the same tensors, and a model that loads.
    places = experts("50KB")
    write_merged(PLAN, places, None, tmp_path / "several", "merge", QuietConsole())
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    found = {}
    for path in (tmp_path / "several").glob("*.safetensors"):
        found |= load_file(path)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    assert torch.equal(loaded.lm_head.weight, a.lm_head.weight)


def test_an_expert_of_another_seed_student_is_named(tmp_path):
    base = Artifact(tmp_path / "align", {"identity": "one"})
    good = Artifact(tmp_path / "a", {"inputs": {"align": "one"}})
    other = Artifact(tmp_path / "b", {"inputs": {"align": "two"}})
    check_seed_student(base, {"a": good})
    with pytest.raises(RunError, match="expert 'b' was trained from another seed student"):
        check_seed_student(base, {"a": good, "b": other})

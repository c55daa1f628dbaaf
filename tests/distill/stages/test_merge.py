"""Merging saved experts: the bytes of a merge in memory, from mapped files, on all cores."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import RunError
from xlstm_distill.merging import linear
from xlstm_distill.stages import merge, workbench
from xlstm_distill.stages.merge import merged_student

WEIGHTS = {"a": 0.3, "b": 0.7}


@pytest.fixture
def places(tiny_teacher, tmp_path, monkeypatch):
    """Two experts in several files each, and one frozen tensor."""
    monkeypatch.setattr(workbench, "SHARD_SIZE", "50KB")
    student = convert(tiny_teacher(tie_word_embeddings=True), MixerConfig(window=8, sinks=2))
    for seed, name in enumerate(WEIGHTS):
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, parameter in student.named_parameters():
                if "norm" not in key:
                    parameter.normal_()
        save(student, tmp_path / name)
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 1
    return {name: tmp_path / name for name in WEIGHTS}


def save(student, place):
    workbench.save_model(student, SimpleNamespace(save_pretrained=lambda folder: None), place)


def files(place):
    return {file.name: file.read_bytes() for file in place.iterdir()}


def test_it_writes_the_bytes_of_a_merge_in_memory(places, tmp_path, monkeypatch):
    # What the stage did before it read mapped files.
    students = {n: AutoModelForCausalLM.from_pretrained(p) for n, p in places.items()}
    states = {name: student.state_dict() for name, student in students.items()}
    whole = students["a"]
    # In one file: how tensors are dealt out to several depends on how a model was loaded.
    monkeypatch.setattr(workbench, "SHARD_SIZE", "4GB")
    whole.load_state_dict(linear.merge_state_dicts(states, WEIGHTS))
    save(whole, tmp_path / "expected")
    expected = files(tmp_path / "expected")
    assert "model.safetensors" in expected
    monkeypatch.setattr(merge.os, "sched_getaffinity", lambda _: range(3), raising=False)
    threads, real = [], linear.merge_linear
    monkeypatch.setattr(
        linear, "merge_linear", lambda *a: threads.append(torch.get_num_threads()) or real(*a)
    )
    before = torch.get_num_threads()
    save(merged_student(places, WEIGHTS), tmp_path / "merged")
    assert set(threads) == {3}
    assert torch.get_num_threads() == before
    assert files(tmp_path / "merged") == expected


def test_the_number_of_threads_changes_no_bit():
    # More than torch's grain, and cut within a vector.
    a, b = torch.randn(2, 300_007, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = torch.get_num_threads()
    try:
        sums = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(linear.merge_linear([a, b], [0.3, 0.7]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(sums[0], other) for other in sums[1:])


def test_a_tensor_that_the_student_does_not_have_is_refused(places, monkeypatch):
    tensors = {"model.more.weight": torch.ones(1)}
    monkeypatch.setattr(merge, "merge_state_dicts", lambda *_: tensors)
    with pytest.raises(RunError, match=r"model\.more\.weight is no weight of this model"):
        merged_student(places, WEIGHTS)
    tensors.clear()
    with pytest.raises(RunError, match="got no weights"):
        merged_student(places, WEIGHTS)

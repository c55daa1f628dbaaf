"""A saved student without its weights, and the weights read afterwards, are the saved student."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import RunError
from xlstm_distill.models.loading import empty_student, load_shards
from xlstm_distill.models.lora import add_lora

CPU = torch.device("cpu")


@pytest.fixture
def saved(tiny_teacher, tmp_path):
    """Save a student in bf16, in files of a few tensors each; the head is tied if asked for."""

    def save(family="llama", shard_size="50KB", **config):
        student = convert(tiny_teacher(family, **config), MixerConfig(window=8, sinks=2))
        student.bfloat16().save_pretrained(tmp_path, max_shard_size=shard_size)
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", True), ("qwen2", False), ("olmo3", False), ("apertus", False), ("mixtral", False)],
)
def test_reading_later_gives_the_same_student(family, tied, saved):
    folder = saved(family, tie_word_embeddings=tied)
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = torch.get_rng_state()
    student = empty_student(folder, torch.float32)
    assert all(p.is_meta for p in student.parameters())
    load_shards(student, folder, CPU)
    assert torch.equal(torch.get_rng_state(), before)  # adapters are drawn next
    assert student.config.to_dict() == whole.config.to_dict()
    assert student.generation_config.to_dict() == whole.generation_config.to_dict()
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    state = whole.state_dict()
    assert student.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    # RoPE's frequencies are in no file.
    buffers = dict(whole.named_buffers())
    assert buffers
    assert all(torch.equal(value, buffers[name]) for name, value in student.named_buffers())
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        assert torch.equal(student(ids).logits, whole(ids).logits)


def test_adapters_are_drawn_before_the_weights_are_read(saved):
    pytest.importorskip("peft")
    folder = saved()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = empty_student(folder, torch.float32)
    for model in (whole, student):
        torch.manual_seed(0)
        add_lora(model, 4, 8)
    assert any("lora_A" in n and not p.is_meta for n, p in student.named_parameters())
    load_shards(student, folder, CPU)
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trained


def test_a_file_without_a_tensor_or_of_another_shape_is_refused(saved):
    folder = saved(shard_size="5GB")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"holds no model\.norm\.weight"):
        load_shards(empty_student(folder, torch.float32), folder, CPU)
    save_file(tensors | {"model.norm.weight": norm[:-1]}, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"model\.norm\.weight has shape \(63,\), the model needs"):
        load_shards(empty_student(folder, torch.float32), folder, CPU)

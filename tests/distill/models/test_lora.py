"""Adapters: the student starts unchanged, they alone train, and merging keeps outputs and names."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.lora import add_lora, merge_lora, merged_state
from xlstm_kernels.testing import error_ratio

pytest.importorskip("peft")

FAMILIES = ("llama", "qwen3", "olmo3")
RANK, ALPHA = 4, 8


@pytest.fixture
def student(tiny_teacher):
    """Make a student, and move its adapters off zero if it is to have some."""

    def make(family: str = "llama", adapted: bool = True):
        torch.manual_seed(0)
        made = convert(tiny_teacher(family), MixerConfig(window=8, sinks=2))
        if adapted:
            add_lora(made, RANK, ALPHA)
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
        return made

    return make


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def test_a_student_with_new_adapters_computes_what_it_did(student, ids):
    plain = student(adapted=False)
    before = plain(ids).logits
    add_lora(plain, RANK, ALPHA)
    assert torch.equal(plain(ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_new_parameters_alone_train(family, student):
    adapted = student(family)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    new = {name for name, _ in adapted.new_parameters()}
    adapters = {name for name in trained if "lora_" in name}
    assert trained == new | adapters
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(adapters) == 2 * 2 * len(projections)  # A and B, in two layers
    assert all(any(f"{name}.lora_" in adapter for name in projections) for adapter in adapters)


def test_routers_and_routed_experts_get_no_adapters(student):
    adapted = student("qwen2_moe")
    mlp = adapted.model.layers[0].mlp
    assert not any(p.requires_grad for part in (mlp.experts, mlp.gate) for p in part.parameters())
    trained = {n for n, p in mlp.named_parameters() if p.requires_grad}
    shared = [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    names = {f"{n}.lora_{m}.default.weight" for n in [*shared, "shared_expert_gate"] for m in "AB"}
    assert trained == names


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_moe"])
def test_merging_keeps_outputs_class_and_names(family, student, ids):
    plain, adapted = student(family, adapted=False), student(family)
    before = adapted(ids).logits.detach()
    assert error_ratio(plain(ids).logits.detach(), before.double()) > 1e-2
    by_state = merged_state(adapted.state_dict(), RANK, ALPHA)
    merge_lora(adapted)
    assert type(adapted) is type(plain)
    assert adapted.state_dict().keys() == plain.state_dict().keys() == by_state.keys()
    assert error_ratio(adapted(ids).logits.detach(), before.double()) < 1e-5
    plain.load_state_dict(by_state)
    assert error_ratio(plain(ids).logits.detach(), before.double()) < 1e-5
    assert all(parameter.requires_grad for parameter in adapted.parameters())


def test_a_merged_student_is_a_hugging_face_directory(student, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    adapted = student()
    before = adapted(ids).logits.detach()
    adapted.save_pretrained(tmp_path, state_dict=merged_state(adapted.state_dict(), RANK, ALPHA))
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert error_ratio(loaded(ids).logits.detach(), before.double()) < 1e-5

"""Weights by groups of layers, in files and in a loaded model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.merging.files import NewWeights, SavedWeights
from xlstm_distill.merging.groups import GroupedWeights, check_groups, count_layers, group_of
from xlstm_distill.merging.merge import LoadedWeights, Sources, merge_files, plan_for


class Model(nn.Module):
    """Four layers, tied embeddings."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.norm = nn.LayerNorm(3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


@pytest.fixture
def experts(tmp_path):
    """Two saved experts, as transformers saves them: a tied weight is in the file once."""
    for seed, name in enumerate("ab"):
        weights = {k: v.clone() for k, v in Model(seed).state_dict().items() if "lm_head" not in k}
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    return {name: SavedWeights(tmp_path / name) for name in "ab"}


SETS = ({"a": 1.0, "b": 0.0}, {"a": 0.25, "b": 0.75})


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}])
def test_an_end_of_the_arc_is_one_expert(weights, experts, tmp_path):
    plan = plan_for(GroupedWeights((weights,), 4), "slerp")
    merge_files(plan, Sources(experts), NewWeights(experts["a"], tmp_path / "out"))
    alone = "a" if weights["a"] else "b"
    kept = (tmp_path / alone / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept


def test_each_group_has_weights_of_its_own(experts, tmp_path):
    layers = count_layers(experts["a"].entries)
    assert layers == 4
    plan = plan_for(GroupedWeights(SETS, layers), "linear")
    merge_files(plan, Sources(experts), NewWeights(experts["a"], tmp_path / "out"))
    found = load_file(tmp_path / "out" / "model.safetensors")
    a, b = Model(0).state_dict(), Model(1).state_dict()
    for name, tensor in found.items():
        first = "embed" in name or "layers.0" in name or "layers.1" in name
        expected = a[name] if first else 0.25 * a[name].double() + 0.75 * b[name].double()
        assert torch.equal(tensor, expected.float()), name
    # The same numbers in a loaded model, whose head is tied, and in its format.
    model = Model(2).bfloat16()
    merge_files(plan, Sources(experts), LoadedWeights(model))
    for name, tensor in found.items():
        assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name
    assert torch.equal(model.lm_head.weight, model.embed_tokens.weight)


def test_experts_without_weight_in_any_group_are_left_out(experts):
    sets = ({"a": 0.0, "b": 1.0},) * 2
    assert list(plan_for(GroupedWeights(sets, 4), "linear").weights) == ["b"]
    wrong = GroupedWeights(({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.6}), 4)
    with pytest.raises(UserError, match=r"sum to 1\.1"):
        plan_for(wrong, "linear")


def test_a_weight_that_no_expert_has_is_named(experts):
    model = Model(2)
    model.extra = nn.Parameter(torch.zeros(2))
    plan = plan_for(GroupedWeights(SETS, 4), "linear")
    with pytest.raises(RunError, match="extra is in no expert"):
        merge_files(plan, Sources(experts), LoadedWeights(model))


def test_what_lies_outside_the_layers_goes_with_its_neighbours():
    names = [
        "model.embed_tokens.weight",
        "model.layers.5.mlp.weight",
        "model.layers.6.a",
        "lm_head.weight",
    ]
    assert [group_of(name, 3, 9) for name in names] == [0, 1, 2, 2]
    # One set of weights, as the recipe gives them: all tensors, however many layers there are.
    assert {group_of(name, 1, 1) for name in names} == {0}
    with pytest.raises(UserError, match=r"merge\.layer_groups: 10, and the student has 9 layers"):
        check_groups(10, 9, "merge")

"""Steps of few operators, caches as files, and branches of a prompt."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from xlstm_distill import MixerConfig, convert, load_cache, save_cache
from xlstm_distill.errors import UserError
from xlstm_distill.models.decoding.arrival import Arrival
from xlstm_distill.models.decoding.step import (
    fold_gates,
    gates_of_prompt,
    rotate_prompt,
    turns_halves,
)
from xlstm_distill.models.families import FAMILIES
from xlstm_distill.models.gates import GateMeter
from xlstm_kernels import MLSTMState
from xlstm_kernels.testing import error_ratio

PROMPT = torch.arange(3, 25).view(2, 11)
TOKEN = PROMPT[:, :1]


@pytest.fixture(scope="module")
def student(make_teacher):
    def make(family="llama", **settings):
        found = convert(make_teacher(family, **settings), MixerConfig(window=4, sinks=2)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in found.named_parameters():
                if name.endswith("bias") or "self_attn" in name:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.2)
        return found

    return make


@torch.no_grad()
def prefilled(model):
    cache = model.new_cache()
    model(PROMPT, past_key_values=cache)
    return cache


# Plain projections, biases, one fused projection, a norm of each head.
@pytest.mark.parametrize(
    ("family", "folds"), [("llama", True), ("qwen2", True), ("phi3", True), ("qwen3", False)]
)
@torch.no_grad()
def test_folded_gates_are_those_of_the_modules(family, folds, student):
    mixer = student(family).mixers()[0]
    x = torch.randn(2, 1, mixer.input_gate.in_features, generator=torch.Generator().manual_seed(1))
    folded = fold_gates(mixer)
    assert folded.output == folds
    i, f, *o = (
        nn.functional.linear(x, folded.weight, folded.bias).view(2, -1, mixer.heads).unbind(1)
    )
    assert error_ratio(i, mixer.input_gate(x)[:, 0].double()) < 1e-6
    assert error_ratio(f, mixer.forget_gate(x)[:, 0].double()) < 1e-6
    if folds:
        gate = mixer.output_gate(*mixer.project(x))[:, :, 0, 0]
        assert gate.std() > 0.01
        assert error_ratio(o[0].sigmoid(), gate.double()) < 1e-6


# The norm of each head (Qwen3) keeps the output gate apart.
@pytest.mark.parametrize(("family", "folds"), [("llama", True), ("qwen3", False)])
@torch.no_grad()
def test_gates_of_a_prompt_come_from_one_product(family, folds, student):
    model = student(family)
    mixer, layer = model.mixers()[0], model.new_cache().mixer_layers()[0]
    width = mixer.input_gate.in_features
    x = torch.randn(2, width, width, generator=torch.Generator().manual_seed(2))
    # Folding reads all weights of the mixer, which few tokens do not pay for.
    assert gates_of_prompt(mixer, layer, x[:, : width // 2 - 1], torch.float32) is None
    assert layer.folded is None
    i, f, gate = gates_of_prompt(mixer, layer, x, torch.float32)
    for found, expected in zip((i, f), mixer.scalar_gates(x), strict=True):
        assert error_ratio(found, expected.double()) < 1e-6
    if folds:
        assert error_ratio(gate, mixer.output_gate(*mixer.project(x)).double()) < 1e-6
    else:
        assert gate is None
    # Once folded, short prompts use it; who listens to the output gate hears it.
    handle = mixer.output_gate.register_forward_hook(lambda *_: None)
    i, f, gate = gates_of_prompt(mixer, layer, x[:, :3], torch.float32)
    assert error_ratio(i, mixer.scalar_gates(x[:, :3])[0].double()) < 1e-6
    assert gate is None
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_a_prompt_long_enough_to_fold_equals_a_call_without_a_cache(family, student):
    model = student(family)
    prompt = torch.arange(3, 83).view(2, 40)
    cache = model.new_cache()
    found = model(prompt, past_key_values=cache).logits
    assert all(layer.folded is not None for layer in cache.mixer_layers())
    expected = model(prompt, use_cache=False).logits
    assert error_ratio(found, expected.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_is_rotated_to_the_same_bits(dtype):
    rotary = FAMILIES["llama"].apply_rotary
    draw = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, h, 9, 16, generator=draw).to(dtype) for h in (4, 2))
    angles = tuple(torch.randn(1, 9, 16, generator=draw).to(dtype) for _ in range(2))
    arrival = Arrival(9, 0, torch.zeros(2, dtype=torch.int64), None)
    found = rotate_prompt(q, k, angles, arrival)
    assert all(map(torch.equal, found, rotary(q, k, *angles)))


@torch.no_grad()
def test_gates_that_are_no_plain_layers_are_not_folded(student):
    mixer = student().mixers()[0]
    mixer.v_proj = nn.Sequential(mixer.v_proj)  # as adapters wrap it
    assert not fold_gates(mixer).output
    mixer.forget_gate.register_forward_hook(lambda *_: None)
    assert fold_gates(mixer) is None


@torch.no_grad()
def test_a_meter_hears_decoded_tokens(student):
    model = student()
    cache = prefilled(model)
    model(TOKEN, past_key_values=cache)  # folds
    with GateMeter(model) as meter:
        meter.expect(torch.ones(2, 1, dtype=torch.bool))
        model(TOKEN, past_key_values=cache)
    assert len(meter.means()) == len(model.mixers())


@torch.no_grad()
def test_weights_that_change_change_the_next_caches_steps(student):
    model = student()
    before = model(TOKEN, past_key_values=prefilled(model)).logits
    for mixer in model.mixers():
        mixer.q_proj.weight.data.mul_(1.5)  # counted nowhere
    row = torch.cat([PROMPT, TOKEN], dim=1)
    now = model(TOKEN, past_key_values=prefilled(model)).logits[:, 0]
    assert error_ratio(now, model(row, use_cache=False).logits[:, -1].double()) < 3e-6
    assert not torch.allclose(now, before[:, 0], atol=1e-3)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_whose_positions_turn_halves(family):
    # gpt-oss has the angles of half a head.
    others = family in ("cohere2", "glm4", "gpt_oss")
    assert turns_halves(FAMILIES[family].apply_rotary, 16) == (not others)


@torch.no_grad()
def test_bf16_steps_mix_as_sequences_do(student):
    """Both branches are rounded before they are mixed."""
    model = student().bfloat16()
    row = torch.cat([PROMPT, TOKEN], dim=1)
    whole = model(row, use_cache=False).logits[:, -1]
    step = model(TOKEN, past_key_values=prefilled(model)).logits[:, 0]
    exact = copy.deepcopy(model).float()(row, use_cache=False).logits[:, -1].double()
    assert error_ratio(step, exact) < 1.5 * error_ratio(whole, exact)


@torch.no_grad()
def test_rows_of_a_pool_decode_as_a_cache_of_their_own_and_where_they_lie(student):
    """As a server of many requests decodes: the first row begins a document."""
    model, pools = student(), []
    alone, pooled = prefilled(model), prefilled(model)
    rows, begins = torch.tensor([3, 1]), torch.tensor([[1], [0]])
    for layer in pooled.layers:
        held = []
        for x in layer.tensors():
            pool = torch.randn(5, *x.shape[1:])
            pool[rows] = x
            held.append(pool)
        layer.keys, layer.values = held[:2]
        layer.state, layer.rows = MLSTMState(*held[2:]), rows
        pools.append([(pool, pool.clone()) for pool in held])
    for cache in (alone, pooled):
        cache.arrival = Arrival(1, 11, cache.lengths.clone(), begins)
        for mixer, layer in zip(model.mixers(), cache.layers, strict=True):
            layer.restart_state(cache.arrival.begins)
            layer.mixed = mixer.mix(
                torch.ones(2, 1, 64), (torch.ones(1, 1, 16), torch.zeros(1, 1, 16)), cache
            )
    for mine, theirs, held in zip(pooled.layers, alone.layers, pools, strict=True):
        assert torch.equal(mine.mixed, theirs.mixed)
        for (pool, before), x in zip(held, theirs.tensors(), strict=True):
            assert torch.equal(pool[rows], x)
            assert not torch.equal(pool[rows], before[rows])
            assert torch.equal(pool[[0, 2, 4]], before[[0, 2, 4]])


@torch.no_grad()
def test_a_prompts_state_goes_through_a_file_and_branches(student, tmp_path):
    model = student()
    cache = prefilled(model)
    model(TOKEN, past_key_values=cache)
    save_cache(model, cache, tmp_path / "prompt.safetensors")
    expected = model(TOKEN + 1, past_key_values=cache.copy()).logits
    # The copy went on by itself.
    assert torch.equal(model(TOKEN + 1, past_key_values=cache.copy()).logits, expected)
    loaded = load_cache(model, tmp_path / "prompt.safetensors")
    assert loaded.get_seq_length() == cache.get_seq_length() == 12
    assert torch.equal(model(TOKEN + 1, past_key_values=loaded).logits, expected)


@torch.no_grad()
def test_files_of_other_models_are_refused(student, tmp_path):
    model, path = student(), tmp_path / "prompt.safetensors"
    with pytest.raises(ValueError, match="cache: it holds nothing"):
        save_cache(model, model.new_cache(), path)
    save_cache(model, prefilled(model), path)
    model.mixers()[0].q_proj.weight.mul_(1.01)
    for other in (model, student("qwen2"), student().bfloat16()):
        with pytest.raises(UserError, match="it is another model's cache"):
            load_cache(other, path)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(UserError, match="no cache can be read"):
        load_cache(model, tmp_path / "text")


def test_hooks_may_change_what_a_steps_output_projection_reads(student):
    model, row = student(), PROMPT
    expected = model(row, use_cache=False).logits

    def ablate(_, given):
        given[0][..., :8] = 0

    for mixer in model.mixers():
        mixer.o_proj.register_forward_pre_hook(ablate)
    with torch.no_grad():
        whole = model(row, use_cache=False).logits
        cache = model(row[:, :-1], use_cache=True).past_key_values
        last = model(row[:, -1:], past_key_values=cache).logits
    assert error_ratio(whole, expected.double()) > 1e-2
    assert error_ratio(last, whole[:, -1:].double()) < 3e-6


def test_a_cache_begun_in_inference_mode_goes_on_without(student):
    model, row = student(), PROMPT
    with torch.no_grad():
        whole = model(row, use_cache=False).logits
    with torch.inference_mode():
        cache = model.new_cache()
        model(row[:, :1], past_key_values=cache)
        model(row[:, 1:4], past_key_values=cache)
    rest = []
    with torch.no_grad():
        for t in range(4, row.shape[1]):
            rest.append(model(row[:, t : t + 1], past_key_values=cache).logits)
    assert error_ratio(torch.cat(rest, dim=1), whole[:, 4:].double()) < 3e-6

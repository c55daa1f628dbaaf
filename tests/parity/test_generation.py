"""The cases of transformers' generation tests, under their names: its package leaves them out.

Left padding, chunked prefill, beams and what is refused: `test_decoding.py`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import set_seed

from xlstm_distill import MixerConfig, convert

NEW = {"max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def student(request, make_teacher):
    student = convert(make_teacher(request.param), MixerConfig(window=6, sinks=2)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in student.new_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return student


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def test_greedy_generate_dict_outputs_use_cache(student, ids):
    asked = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "do_sample": False,
        **NEW,
    }
    cached, plain = student.generate(ids, **asked), student.generate(ids, use_cache=False, **asked)
    assert torch.equal(cached.sequences, plain.sequences)
    for name in ("scores", "logits"):
        for mine, theirs in zip(cached[name], plain[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    layers = len(student.mixers()) + 1
    assert [len(step) for step in cached.hidden_states] == [layers] * 8
    last = [step[-1][:, -1] for step in cached.hidden_states]
    for mine, theirs in zip(last, plain.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs[-1][:, -1], rtol=1e-4, atol=1e-4)
    assert cached.past_key_values.get_seq_length() == 11 + 7  # the last token is not read


@pytest.mark.parametrize(
    "asked",
    [{"num_return_sequences": 3}, {"num_beams": 3}, {"top_k": 5, "temperature": 0.7}],
    ids=["sample_generate", "beam_sample_generate", "sample_with_warpers"],
)
def test_sample_generate(asked, student, ids):
    found = []
    for use_cache in (True, False):
        set_seed(0)
        found.append(student.generate(ids, do_sample=True, use_cache=use_cache, **asked, **NEW))
    assert torch.equal(*found)
    assert len(found[0]) == 2 * asked.get("num_return_sequences", 1)


def test_generate_without_input_ids(student):
    row = student.generate(do_sample=False, **NEW)
    assert torch.equal(row, student.generate(torch.tensor([[1]]), do_sample=False, **NEW))


def test_generate_from_inputs_embeds(student, ids):
    from_ids = student.generate(ids, do_sample=False, **NEW)
    embeds = student.get_input_embeddings()(ids)
    assert torch.equal(
        student.generate(inputs_embeds=embeds, do_sample=False, **NEW), from_ids[:, 11:]
    )
    both = student.generate(ids, inputs_embeds=embeds, do_sample=False, **NEW)
    assert torch.equal(both, from_ids)


def test_generate_continue_from_past_key_values(student, ids):
    whole = student.generate(ids, do_sample=False, **NEW)
    asked = {"do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    first = student.generate(ids, max_new_tokens=3, **asked)
    again = student.generate(
        first.sequences,
        past_key_values=first.past_key_values,
        attention_mask=torch.ones_like(first.sequences),
        max_new_tokens=5,
        **asked,
    )
    assert torch.equal(again.sequences, whole)
    # New words of a user between two answers.
    words = torch.full((2, 4), 7)
    row = torch.cat([again.sequences, words], dim=1)
    # Without a mask, `generate` takes a padding token that was generated for padding.
    asked |= {"attention_mask": torch.ones_like(row), "max_new_tokens": 5}
    cached = student.generate(row, past_key_values=again.past_key_values, **asked).sequences
    assert torch.equal(cached, student.generate(row, **asked).sequences)


def test_generate_methods_with_logits_to_keep(student, ids):
    with torch.no_grad():
        whole, last = student(ids).logits, student(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-5, atol=1e-5)


def test_past_key_values_format(student, ids):
    with torch.no_grad():
        cache = student(ids, use_cache=True).past_key_values
    config = student.config
    for layer in cache.layers:
        assert layer.keys.shape == (2, config.num_key_value_heads, 8, config.head_dim)
        assert layer.state.C.shape == (2, config.num_attention_heads, 16, 16)


def test_generation_stops_at_each_rows_own_end(student, ids):
    free = student.generate(ids, do_sample=False, **NEW)
    stop = free[0, 13].item()
    asked = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": stop, "pad_token_id": 0}
    rows = student.generate(ids, **asked)
    for row, expected in zip(rows, free, strict=True):
        new = expected[11:].tolist()
        length = 11 + (new.index(stop) + 1 if stop in new else 8)
        assert torch.equal(row[:length], expected[:length])
        assert (row[length:] == 0).all()

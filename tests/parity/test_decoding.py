"""Decoding with the cache equals the forward pass without it, and its memory does not grow."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.families import FAMILIES
from xlstm_kernels.testing import error_ratio

ALL = sorted(FAMILIES)


@pytest.fixture
def student(tiny_teacher):
    def make(family="llama", window=8, sinks=2, **mixer):
        student = convert(tiny_teacher(family), MixerConfig(window=window, sinks=sinks, **mixer))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, p in student.new_parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        return student.eval()

    return make


def ids(batch=2, tokens=40, seed=1):
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run_in_parts(model, row, parts, **kwargs):
    cache, out, seen = model.new_cache(), [], 0
    for n in parts:
        given = {k: v[:, seen : seen + n] for k, v in kwargs.items()}
        out.append(model(row[:, seen : seen + n], past_key_values=cache, use_cache=True, **given).logits)
        seen += n
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("parts", [[1] * 40, [40], [3, 1, 1, 20, 1, 14], [12, 1, 1, 13, 13]], ids=str)
def test_any_split_equals_one_pass(family, parts, student):
    model, row = student(family), ids()
    with torch.no_grad():
        whole = model(row, use_cache=False).logits
    assert error_ratio(run_in_parts(model, row, parts), whole.double()) < 3e-6


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 4), (8, 0), (3, 9), (64, 4)])
@pytest.mark.parametrize("branches", [("mlstm", "window"), ("window",), ("mlstm",)], ids="+".join)
def test_windows_and_sinks_of_all_sizes(window, sinks, branches, student):
    model, row = student(window=window, sinks=sinks, branches=branches), ids()
    with torch.no_grad():
        whole = model(row, use_cache=False).logits
    assert error_ratio(run_in_parts(model, row, [5, 1, 1, 1, 9, 1, 22]), whole.double()) < 3e-6


def test_documents_that_change_inside_a_cached_chunk(student):
    model, row = student(), ids(1)
    lengths = [4, 19, 17]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        whole = model(row, position_ids=positions, use_cache=False).logits
    parts = run_in_parts(model, row, [10, 20, 1, 1, 8], position_ids=positions)
    assert error_ratio(parts, whole.double()) < 3e-6


@pytest.mark.parametrize("family", ALL)
def test_greedy_generation_equals_uncached_forward(family, student):
    model, prompt = student(family), ids(2, 11)
    generated = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    row = prompt
    with torch.no_grad():
        for _ in range(24):
            row = torch.cat([row, model(row, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, row)


def test_left_padding_changes_nothing(student):
    model = student()
    prompts = [ids(1, n, seed=n)[0] for n in (3, 14, 9)]
    width = 14
    batch = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    together = model.generate(batch, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert torch.equal(row[width:], alone[0, len(prompt) :])


def test_beam_search_and_sampling_with_repeats_run_on_the_cache(student):
    model, prompt = student(), ids(2, 11)
    cached = model.generate(prompt, max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=None)
    plain = model.generate(prompt, max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, plain)


def test_cache_memory_is_constant(student):
    model = student()
    sizes = set()
    cache = model.new_cache()
    with torch.no_grad():
        for n in (11, 1, 1, 200, 1, 64):
            model(ids(2, n), past_key_values=cache, use_cache=True)
            sizes.add(cache.nbytes())
    assert len(sizes) == 1
    assert cache.get_seq_length() == 278


def test_a_foreign_cache_and_right_padding_are_refused(student):
    from transformers import DynamicCache

    model = student()
    with pytest.raises(ValueError, match="past_key_values: DynamicCache cannot hold"):
        model(ids(), past_key_values=DynamicCache())
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, -3:] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="padding on the right"):
        model(ids(), attention_mask=mask, use_cache=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids(), max_new_tokens=2, cache_implementation="static")

"""Decoding with the cache equals the forward pass without it, and its memory does not grow."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.decoding import prefill
from xlstm_distill.models.families import FAMILIES
from xlstm_kernels.testing import error_ratio

# One family of each kind; the others, which differ in a fact of the table, are slow tests.
QUICK = ("llama", "qwen2", "qwen3", "olmo2", "olmo3", "cohere2", "phi3", "gemma2", "gemma3_text")
QUICK += ("qwen2_moe", "gpt_oss")
ALL = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in sorted(FAMILIES)]


@pytest.fixture
def student(tiny_teacher):
    def make(family="llama", window=8, sinks=2, layers=2, **mixer):
        config = MixerConfig(window=window, sinks=sinks, **mixer)
        student = convert(tiny_teacher(family, num_hidden_layers=layers), config)
        # New gates are constant and new maps the identity: random ones leave no part idle.
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
    """Return the logits of a row that comes in parts of these lengths, with one cache."""
    cache, logits, seen = model.new_cache(), [], 0
    for tokens in parts:
        part = slice(seen, seen + tokens)
        given = {name: value[:, part] for name, value in kwargs.items()}
        out = model(row[:, part], past_key_values=cache, use_cache=True, **given)
        logits.append(out.logits)
        seen += tokens
    return torch.cat(logits, dim=1)


def left_padded(prompts):
    """Pad prompts on the left to the longest: ids and attention mask (B, T)."""
    width = max(len(prompt) for prompt in prompts)
    pad = torch.nn.functional.pad
    batch = [pad(prompt, (width - len(prompt), 0)) for prompt in prompts]
    mask = [pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts]
    return torch.stack(batch), torch.stack(mask)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    "parts", [[1] * 40, [40], [3, 1, 1, 20, 1, 14], [12, 1, 1, 13, 13]], ids=str
)
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


PACKED = [[1, 3, 2, 5], [4, 1, 6], [11]]  # lengths of the documents of three rows


def packed():
    """Make three packed rows of 11 tokens, and the arguments that tell their documents apart."""
    segments, positions = [], []
    for lengths in PACKED:
        numbers = 3 * torch.arange(len(lengths))  # ids need not be consecutive
        segments.append(torch.repeat_interleave(numbers, torch.tensor(lengths)))
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
    return ids(3, 11), {
        "segment_ids": {"segment_ids": torch.stack(segments)},
        "position_ids": {"position_ids": torch.stack(positions)},
    }


def splits(tokens):
    """Cut a row in two and in three parts everywhere, and into a prompt and single tokens."""
    yield [1] * tokens
    for first in range(1, tokens):
        yield [first, tokens - first]
        yield [first] + [1] * (tokens - first)
        for second in range(first + 1, tokens):
            yield [first, second - first, tokens - second]


@pytest.mark.parametrize("said", ["segment_ids", "position_ids"])
@pytest.mark.parametrize("branches", [("mlstm", "window"), ("window",), ("mlstm",)], ids="+".join)
def test_every_split_of_packed_rows_equals_one_pass(said, branches, student):
    # One layer: where documents begin is the same in all.
    model, (rows, ways) = student(window=3, sinks=1, layers=1, branches=branches), packed()
    with torch.no_grad():
        whole = model(rows, use_cache=False, **ways[said]).logits.double()
    for parts in splits(11):
        assert error_ratio(run_in_parts(model, rows, parts, **ways[said]), whole) < 3e-6, parts


@pytest.mark.parametrize("said", ["segment_ids", "position_ids"])
@pytest.mark.parametrize("family", ALL)
def test_tokens_after_a_packed_prefill_continue_the_last_document(family, said, student):
    model, (rows, ways) = student(family), packed()
    documents = [n[-1] for n in PACKED]
    cache = model.new_cache()
    with torch.no_grad():
        model(rows[:, :9], past_key_values=cache, **{k: v[:, :9] for k, v in ways[said].items()})
        told_nothing = torch.cat(
            [model(rows[:, t : t + 1], past_key_values=cache).logits for t in (9, 10)], dim=1
        )
        for row, length, logits in zip(rows, documents, told_nothing, strict=True):
            alone = model(row[None, 11 - length :], use_cache=False).logits[0, -2:]
            assert error_ratio(logits, alone.double()) < 3e-6


@pytest.mark.parametrize("chunk", [1, 3, 5, 14, None])
def test_left_padded_rows_equal_rows_alone_without_positions_and_in_chunks(chunk, student):
    model = student()
    prompts = [ids(1, n, seed=n)[0] for n in (3, 14, 9)]
    batch, mask = left_padded(prompts)
    with torch.no_grad():
        if chunk is None:
            together = model(batch, attention_mask=mask, use_cache=False).logits
        else:
            parts = [min(chunk, 14 - n) for n in range(0, 14, chunk)]
            together = run_in_parts(model, batch, parts, attention_mask=mask)
        for prompt, row in zip(prompts, together, strict=True):
            alone = model(prompt[None], use_cache=False).logits[0]
            assert error_ratio(row[-len(prompt) :], alone.double()) < 3e-6


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
    batch, mask = left_padded(prompts)
    width = batch.shape[1]
    together = model.generate(
        batch, attention_mask=mask, max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert torch.equal(row[width:], alone[0, len(prompt) :])
    for size in (1, 5, 7):  # the first chunk of a row may be all padding
        chunked = model.generate(
            batch,
            attention_mask=mask,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            prefill_chunk_size=size,
        )
        assert torch.equal(chunked, together)


def test_rows_that_move_in_the_cache_take_along_how_they_end(student):
    model, (rows, ways) = student(), packed()
    cache = model.new_cache()
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        model(rows, past_key_values=cache, **ways["segment_ids"])
        plain = model(rows[:, :1], past_key_values=copy.deepcopy(cache)).logits
        cache.reorder_cache(order)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 3, 5]))
        moved = model(rows[order, :1], past_key_values=cache).logits
    assert error_ratio(moved, plain[order].double()) < 1e-6


def test_beam_search_and_sampling_with_repeats_run_on_the_cache(student):
    model, prompt = student(), ids(2, 11)
    cached = model.generate(
        prompt, max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=None
    )
    plain = model.generate(
        prompt, max_new_tokens=12, num_beams=3, do_sample=False, eos_token_id=None, use_cache=False
    )
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
    cache = model.new_cache()
    with torch.no_grad(), pytest.raises(ValueError, match="padding on the right"):
        model(ids(), past_key_values=cache)
        model(ids(), past_key_values=cache, attention_mask=mask)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids(), max_new_tokens=2, cache_implementation="static")


def test_right_padding_needs_no_word_about_the_cache(student):
    model, rows, mask = student(), ids(), torch.ones(2, 40, dtype=torch.long)
    mask[0, 29:] = 0
    with torch.no_grad():
        padded = model(rows, attention_mask=mask)
        alone = model(rows[:1, :29]).logits
        assert padded.past_key_values is None
        assert model(rows, attention_mask=torch.ones_like(mask)).past_key_values is not None
    assert error_ratio(padded.logits[:1, :29], alone.double()) < 3e-6


def test_padding_inside_a_row_is_refused(student):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 8:11] = 0
    for use_cache in (True, False):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="attention_mask: a row has padding between its tokens"),
        ):
            student()(ids(), attention_mask=mask, use_cache=use_cache)


def test_decoding_that_takes_tokens_back_is_refused_in_one_line(student):
    model, row = student(), ids(1, 9)
    for asked in ({"assistant_model": student("qwen2")}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(
            ValueError, match="assisted generation is not supported with stateful models"
        ):
            model.generate(row, max_new_tokens=3, **asked)
    cache = model.new_cache()
    with torch.no_grad():
        model(row, past_key_values=cache)
    with pytest.raises(ValueError, match="crop: 2 tokens cannot be taken back"):
        cache.crop(2)


def test_a_cache_can_be_reset_before_and_after_use(student):
    model, row, cache = student(), ids(), student().new_cache()
    cache.reset()
    with torch.no_grad():
        first = model(row, past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(row, past_key_values=cache).logits, first)


def test_tensors_that_the_caller_changes_in_place_leave_the_cache_as_it_is(student):
    """Decoding loops keep one tensor of positions and add to it."""
    model, row, cache = student(), ids(), student().new_cache()
    with torch.no_grad():
        whole = model(row, use_cache=False).logits
        position, mask = torch.arange(30).repeat(2, 1), torch.ones(2, 40, dtype=torch.long)
        model(
            row[:, :30], position_ids=position, attention_mask=mask[:, :30], past_key_values=cache
        )
        position, held = position[:, -1:], [t.data_ptr() for t in cache.ends[:2]]
        for t in range(30, 40):
            step = model(
                row[:, t : t + 1],
                position_ids=position.add_(1),
                attention_mask=mask[:, : t + 1],
                past_key_values=cache,
            )
            assert error_ratio(step.logits[:, 0], whole[:, t].double()) < 3e-6
    assert [t.data_ptr() for t in cache.ends[:2]] == held


def test_other_rows_than_the_caches_are_refused(student):
    model, cache = student(), student().new_cache()
    with torch.no_grad():
        model(ids(1), past_key_values=cache)
        for tokens in (1, 5):
            with pytest.raises(ValueError, match="input_ids: 2 rows, but the cache holds 1"):
                model(ids(2, tokens), past_key_values=cache)


def test_double_precision_decodes(student):
    model, row = student().double(), ids()
    with torch.no_grad():
        whole = model(row, use_cache=False).logits
    # measured 2e-8: gates and rotary positions are fp32 all the same
    assert error_ratio(run_in_parts(model, row, [7, 1, 1, 20, 11]), whole) < 1e-7
    assert model.generate(row, max_new_tokens=3, eos_token_id=None).shape == (2, 43)


@pytest.mark.parametrize("branches", [("mlstm", "window"), ("window",), ("mlstm",)], ids="+".join)
def test_a_cache_works_where_gradients_are_recorded_and_is_constant(branches, student):
    model, row = student(branches=branches), ids()
    with torch.no_grad():
        whole = model(row, use_cache=False).logits
    first = model(row[:, :20], use_cache=True)
    cache = first.past_key_values
    logits = [first.logits]
    for part in (slice(20, 21), slice(21, 40)):
        logits.append(model(row[:, part], past_key_values=cache).logits)
    assert error_ratio(torch.cat(logits, dim=1).detach(), whole.double()) < 3e-6
    assert not any(t.requires_grad for layer in cache.layers for t in layer.tensors())
    # Of a chunk's own tokens the gradients are those of a pass without a cache.
    model.zero_grad()
    model(row[:, :20], use_cache=False).logits.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    first.logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


def test_the_gradient_of_a_single_token_after_a_cache_is_that_of_a_chunk(student):
    model, row = student().double(), ids(1, 9)

    def gradient(split):
        model.zero_grad()
        with torch.no_grad():
            cache = model(row[:, :split], use_cache=True).past_key_values
        logits = model(row[:, split:], past_key_values=cache).logits[:, -1]
        logits.sum().backward()
        return {
            n: p.grad for n, p in model.named_parameters() if n.endswith("self_attn.o_proj.weight")
        }

    alone, chunk = gradient(8), gradient(7)
    last = f"model.layers.{len(model.model.layers) - 1}.self_attn.o_proj.weight"
    # In the last layer, the output projection's gradient comes from the last token alone.
    assert error_ratio(alone[last], chunk[last]) < 1e-6


def test_training_mode_has_no_cache_and_says_so(student):
    model = student().train()
    with pytest.warns(UserWarning, match="use_cache: a student in training mode makes no cache"):
        assert model(ids(), use_cache=True).past_key_values is None
    assert model(ids()).past_key_values is None  # nobody asked
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
    for tokens in (1, 5):
        with pytest.raises(ValueError, match="past_key_values: a student's cache holds constants"):
            model(ids(2, tokens), past_key_values=cache)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("branches", ["mlstm,window", "window", "mlstm"])
def test_decoding_with_the_triton_kernels_equals_one_pass(branches):
    script = Path(__file__).parents[1] / "helpers/decode_with_triton.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, script, branches], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3e-6


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("said", ["nothing", "segment_ids", "position_ids", "attention_mask"])
def test_long_prompts_are_read_in_chunks(said, keep, student):
    model, tokens = student(), 23
    segments = torch.tensor([[0] * 14 + [1] * 9, [0] * 23])
    padding = torch.ones(2, tokens, dtype=torch.long)
    padding[1, :9] = 0
    positions = torch.cat([torch.arange(14), torch.arange(9)]).expand(2, -1)
    ways = {"segment_ids": segments, "position_ids": positions, "attention_mask": padding}
    given = {said: ways[said]} if said in ways else {}
    rows, lengths = ids(2, tokens), []
    model.model.register_forward_pre_hook(
        lambda _, a, kw: lengths.append(kw["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        whole = model(rows, use_cache=False, logits_to_keep=keep, **given).logits
        model.prefill_chunk = 5
        del lengths[:]
        out = model(rows, use_cache=True, logits_to_keep=keep, **given)
    assert lengths == [5, 5, 5, 5, 3]
    assert out.logits.shape == whole.shape
    assert error_ratio(out.logits, whole.double()) < 3e-6
    assert out.past_key_values.get_seq_length() == tokens


@pytest.mark.parametrize("branches", [("mlstm", "window"), ("window",), ("mlstm",)], ids="+".join)
@torch.no_grad()
def test_prompts_of_many_rows_are_read_a_few_at_a_time(branches, student, monkeypatch):
    model = student(window=24, branches=branches)  # some rows are shorter than the window
    lengths = [150, 149, 140, 131, *range(130, 90, -4), 20, 9, 2, 1]
    texts = ids(batch=len(lengths), tokens=150)
    rows, mask = left_padded([row[:length] for row, length in zip(texts, lengths, strict=True)])
    shapes, read = [], prefill._read
    monkeypatch.setattr(
        prefill,
        "_read",
        lambda m, k, *rest: shapes.append(k["input_ids"].shape) or read(m, k, *rest),
    )
    for given in ({}, {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}):
        cache, logits = model.new_cache(), []
        next_tokens, seen = rows, mask
        for step in range(3):
            kwargs = given if step == 0 else {}
            out = model(
                next_tokens, attention_mask=seen, past_key_values=cache, logits_to_keep=1, **kwargs
            )
            logits.append(out.logits)
            next_tokens = texts[:, step : step + 1]
            seen = torch.nn.functional.pad(seen, (0, 1), value=1)
        assert cache.get_seq_length() == 152
        for row, length in enumerate(lengths):
            whole = torch.cat([texts[row, :length], texts[row, :2]])[None]
            alone = model(whole, use_cache=False).logits[:, -3:].double()
            assert error_ratio(torch.cat([x[row : row + 1] for x in logits], 1), alone) < 3e-6
    # Sixteen rows whole, the others without what is padding in all of them.
    assert shapes[:2] == [(16, 150), (2, 2)]


@torch.no_grad()
def test_rows_read_apart_may_go_on_outside_inference_mode_and_lie_in_memory_once(student):
    model, rows, mask = student(), ids(33, 150), torch.ones(33, 150, dtype=torch.long)
    given, parts, caches = {"attention_mask": mask, "logits_to_keep": 1}, [], []
    wanted = model(rows, **given).past_key_values
    new_cache = model.new_cache
    model.new_cache = lambda: parts.append(new_cache()) or parts[-1]
    with torch.inference_mode():
        caches.append(model(rows, past_key_values=new_cache(), **given).past_key_values)
    model.new_cache = new_cache
    assert len(parts) == 3
    assert all(part.nbytes() == 8 * len(part.lengths) for part in parts)
    for tokens in (1, 3):
        found = model(rows[:, :tokens], past_key_values=caches[0]).logits
        exact = model(rows[:, :tokens], past_key_values=wanted).logits
        assert error_ratio(found, exact.double()) < 1e-6


@torch.no_grad()
def test_who_listens_to_a_body_hears_all_rows(student):
    model, rows, heard = student(), ids(33, 150), []
    given = {"attention_mask": torch.ones_like(rows), "logits_to_keep": 1}
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: heard.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    model(rows, **given)
    assert {shape[0] for shape in heard} == {33}
    hook.remove()
    model(rows, output_hidden_states=True, **given)  # leaves hooks of transformers behind
    assert not prefill._is_watched(model)


@pytest.mark.parametrize("last", [148, 149])
@torch.no_grad()
def test_a_prompt_that_is_refused_leaves_the_cache_as_it_was(last, student):
    model, rows, cache = student(), ids(33, 150), student().new_cache()
    mask = torch.ones_like(rows)
    mask[20, last] = 0
    for asked in ({"attention_mask": mask}, {"segment_ids": torch.zeros(33, 151)}):
        with pytest.raises(ValueError, match=next(iter(asked))):
            model(rows, past_key_values=cache, logits_to_keep=1, **asked)
        assert cache.get_seq_length() == 0
        assert cache.lengths is None


def long_prompt(model, rows, chunk=None):
    """Read a prompt for its last logits; return them, the cache, and what the last MLP read."""
    read, last = [], model.model.layers[-1].mlp
    # For all modules: a hook of the layer's own would make it compute everything.
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: read.append(given[0].shape[1]) if module is last else None
    )
    model.prefill_chunk = chunk
    try:
        with torch.no_grad():
            out = model(rows, use_cache=True, logits_to_keep=1)
    finally:
        handle.remove()
    return out.logits, out.past_key_values, read


@pytest.mark.parametrize("family", ALL)
def test_the_last_layer_computes_only_what_is_wanted(family, student):
    model, rows = student(family), ids()
    with torch.no_grad():
        whole = model(rows, use_cache=False).logits
        expected = model(rows, use_cache=True).past_key_values  # all logits, in one piece
    # 40 tokens of 2 rows are enough for 2 layers to read the last token alone.
    for chunk, lengths in ((None, [1]), (16, [1])):
        logits, cache, read = long_prompt(model, rows, chunk)
        assert read == lengths
        assert error_ratio(logits, whole[:, -1:].double()) < 3e-6
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            for x, y in zip(layer.tensors(), other.tensors(), strict=True):
                assert error_ratio(x, y.double()) < 3e-6


@pytest.mark.parametrize("branches", [("window",), ("mlstm",)], ids="+".join)
def test_a_last_layer_of_one_branch_takes_a_prompt_in(branches, student):
    model, rows = student(branches=branches), ids()
    with torch.no_grad():
        whole = model(rows, use_cache=False).logits
    logits, _, read = long_prompt(model, rows, 16)
    assert read == [1]
    assert error_ratio(logits, whole[:, -1:].double()) < 3e-6


def test_who_listens_to_the_last_layer_hears_all_tokens(student):
    model, heard = student(), []
    output_gate = model.mixers()[-1].output_gate
    output_gate.register_forward_hook(lambda _, __, gate: heard.append(gate.shape[2]))
    _, _, read = long_prompt(model, ids(), 16)
    assert read == heard == [16, 16, 8]
    # A prompt of few tokens is read in one piece: a call of its own would cost more.
    assert long_prompt(student(), ids(1, 30))[2] == [30]


@pytest.mark.parametrize("part", ["norm", "layers.0"])
def test_who_listens_elsewhere_hears_the_prompt_in_one_piece(part, student):
    model, heard = student(), []
    listened = model.model.get_submodule(part)
    listened.register_forward_hook(lambda _, __, out: heard.append(out.shape[1]))
    long_prompt(model, ids())
    assert heard == [40]


def test_router_logits_are_those_of_all_tokens(student):
    rows, wanted = ids(), {"output_router_logits": True}
    with torch.no_grad():
        whole = student("qwen3_moe")(rows, use_cache=False, **wanted)
        # Another model: the first question leaves hooks in its own.
        found = student("qwen3_moe")(rows, logits_to_keep=1, **wanted)
    for x, y in zip(found.router_logits, whole.router_logits, strict=True):
        assert error_ratio(x, y.double()) < 3e-6


def test_a_model_that_checkpoints_activations_reads_a_prompt_in_one_piece(student):
    model, rows = student(), ids()
    with torch.no_grad():
        whole = model(rows, use_cache=False).logits
    model.gradient_checkpointing_enable()
    model.train()
    logits, _, _ = long_prompt(model, rows)
    assert error_ratio(logits, whole[:, -1:].double()) < 3e-6

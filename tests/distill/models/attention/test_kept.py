"""Kept attention: layers and heads of a student that attend as the teacher's do."""

from __future__ import annotations

import copy

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.errors import UserError
from xlstm_distill.models.attention import full
from xlstm_distill.models.attention.full import full_attention
from xlstm_distill.models.attention.heads import joined, take
from xlstm_distill.models.attention.layout import LayerHeads
from xlstm_distill.models.decoding.files import load_cache, save_cache
from xlstm_kernels.testing import error_ratio

SMALL = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 3}
KEPT = {
    "layers": {"layers": [1]},
    "last layer": {"every": 3},
    "heads": {"heads": {0: [1, 2], 2: [0, 4, 5]}},  # 2 and 4, and 3 and 2 of each group are left
    "groups": {"layers": [1], "heads": {0: [0, 1, 2, 3]}},
}


def ids(batch: int = 2, tokens: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def student(make_teacher):
    def make(kept="heads", family="llama", window=6, **mixer):
        config = MixerConfig(window=window, sinks=2, attention=KEPT[kept], **mixer)
        found = convert(make_teacher(family, **SMALL), config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, p in found.new_parameters():
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        return found.eval()

    return make


@torch.no_grad()
def in_parts(model, row, parts, **kwargs):
    """Return the logits of a row that comes in parts of these lengths, and the cache."""
    cache, logits, seen = model.new_cache(), [], 0
    for tokens in parts:
        given = {name: value[:, seen : seen + tokens] for name, value in kwargs.items()}
        part = row[:, seen : seen + tokens]
        logits.append(model(part, past_key_values=cache, **given).logits)
        seen += tokens
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "phi3"])
def test_a_student_that_keeps_all_layers_is_its_teacher(family, make_teacher):
    teacher = make_teacher(family, **SMALL, sliding_window=None)
    kept = convert(teacher, MixerConfig(window=4, attention={"layers": [0, 1, 2]}))
    assert not any(kept.new_parameters())
    with torch.no_grad():
        expected = teacher(ids()).logits
        assert torch.equal(kept(ids(), use_cache=False).logits, expected)
        parts, _ = in_parts(kept, ids(), [11, 1, 1, 27])
    assert error_ratio(parts, expected.double()) < 2e-6


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_kept_layers_and_heads_of_teachers_with_a_softmax_of_their_own(family, make_teacher):
    full = ["full_attention"] * 3
    own = {"layer_types": full, "attn_logit_softcapping": 1.0}
    teacher = make_teacher(family, **SMALL, **own)
    kept = convert(teacher, MixerConfig(window=4, attention={"layers": [0, 1, 2]}))
    # Heads that are not kept have a window over everything.
    mixer = MixerConfig(window=48, sinks=0, branches=("window",), attention=KEPT["heads"])
    both = convert(teacher, mixer)
    with torch.no_grad():
        expected = teacher(ids()).logits.double()
        for student in (kept, both):
            assert error_ratio(student(ids(), use_cache=False).logits, expected) < 1e-6
            parts, _ = in_parts(student, ids(), [11, 1, 1, 27])
            assert error_ratio(parts, expected) < 2e-6
    lengths = torch.tensor([1, 17, 9, 13])
    segments = torch.repeat_interleave(torch.arange(4), lengths)[None]
    with torch.no_grad():
        packed = kept(ids(1), segment_ids=segments).logits[0]
        alone = [teacher(part[None]).logits[0] for part in ids(1)[0].split(lengths.tolist())]
    assert error_ratio(packed, torch.cat(alone).double()) < 2e-6


def test_kept_heads_are_the_teachers_beside_what_the_mixer_makes_of_the_others(make_teacher):
    teacher = make_teacher(**SMALL)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    rope = teacher.model.rotary_emb(x, torch.arange(40)[None])
    kept = (0, 4, 5)
    torch.manual_seed(0)
    plain = convert(teacher, MixerConfig(window=6, sinks=2)).mixers()[0]
    part = convert(teacher, MixerConfig(window=6, sinks=2, attention={"heads": {0: kept}}))
    mixer = part.mixers()[0]
    others = [head for head in range(8) if head not in kept]
    seen = []
    hook = teacher.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        for p in plain.feature_map_q, plain.feature_map_k, plain.output_gate:
            p.weight.normal_(std=0.3)
        for gate in (plain.input_gate, plain.forget_gate):
            gate.weight.normal_(std=0.3)
        for name in ("feature_map_q", "feature_map_k", "input_gate", "forget_gate", "output_gate"):
            for source, target in zip(
                getattr(plain, name).parameters(), getattr(mixer, name).parameters(), strict=True
            ):
                target.copy_(source[others])
        teacher.model.layers[0].self_attn(x, position_embeddings=rope, attention_mask=None)
        hook.remove()
        all_mixed = plain.mix(x, rope).unflatten(-1, (8, -1))
        found = mixer.mix(x, rope).unflatten(-1, (8, -1))
    full_heads = seen[0].unflatten(-1, (8, -1))
    assert error_ratio(found[:, :, list(kept)], full_heads[:, :, list(kept)].double()) < 1e-6
    assert error_ratio(found[:, :, others], all_mixed[:, :, others].double()) < 1e-6


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("branches", [("mlstm", "window"), ("window",)], ids="+".join)
def test_any_split_equals_one_pass(kept, branches, student):
    model, row = student(kept, branches=branches), ids()
    with torch.no_grad():
        whole = model(row, use_cache=False).logits.double()
    for parts in ([1] * 40, [40], [3, 1, 1, 20, 1, 14]):
        found, cache = in_parts(model, row, parts)
        assert error_ratio(found, whole) < 3e-6, parts
        assert cache.bytes_per_token() * 40 * 2 == sum(
            x.numel() * 4 for layer in cache.mixer_layers() if layer.full for x in layer.all_keys()
        )


@pytest.mark.parametrize("kept", ["layers", "heads"])
def test_documents_are_kept_apart_also_across_chunks(kept, student):
    model, lengths, row = student(kept), [1, 17, 9, 13], ids(1)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        separate = torch.cat([model(d[None]).logits[0] for d in row[0].split(lengths)]).double()
        packed = model(row, segment_ids=segments, use_cache=False).logits[0]
    assert error_ratio(packed, separate) < 2e-6
    for parts in ([10, 20, 1, 1, 8], [18, 1, 1, 20], [1] * 40):
        found, _ = in_parts(model, row, parts, position_ids=positions)
        assert error_ratio(found[0], separate) < 3e-6, parts


@pytest.mark.parametrize("kept", ["layers", "heads"])
def test_packed_gradients_equal_those_in_float64_also_where_layers_are_computed_again(
    kept, student, monkeypatch
):
    monkeypatch.setattr(full, "QUERIES", 16)  # several blocks, which are computed again
    model = student(kept).train()
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 22, 13]))[None]
    weight = torch.randn(40, 97, generator=torch.Generator().manual_seed(0))

    def gradients(of, rows, **kwargs):
        of.zero_grad()
        logits = torch.cat([of(row, **given).logits[0] for row, given in rows])
        (logits * weight.to(logits.dtype)).sum().backward()
        return {n: p.grad.clone() for n, p in of.named_parameters()}

    whole = [(ids(1), {"segment_ids": segments})]
    alone = [(part, {}) for part in ids(1).split([5, 22, 13], dim=1)]
    expected = gradients(copy.deepcopy(model).double(), alone)
    found = gradients(model, whole)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, whole)
    for name, grad in expected.items():
        if name.endswith("input_gate.bias"):  # cancels: its true gradient is zero
            continue
        assert error_ratio(found[name], grad) < 1e-5, name
        assert torch.equal(again[name], found[name]), name


def test_gradients_of_a_call_with_a_cache_in_eval_mode(student):
    model = student("heads")
    cache = model.new_cache()
    model(ids(1, 9), past_key_values=cache)
    logits = model(ids(1, 5, seed=4), past_key_values=cache).logits
    model(ids(1, 1), past_key_values=cache)  # writes behind what the backward pass reads
    logits.square().mean().backward()
    assert torch.isfinite(model.model.layers[0].self_attn.k_proj.weight.grad).all()


def test_left_padding_beams_and_moving_rows(student):
    model = student("groups")
    prompts = [ids(1, n, seed=n)[0] for n in (3, 14, 9)]
    pad = torch.nn.functional.pad
    batch = torch.stack([pad(p, (14 - len(p), 0)) for p in prompts])
    mask = torch.stack([pad(torch.ones_like(p), (14 - len(p), 0)) for p in prompts])
    greedy = {"do_sample": False, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, max_new_tokens=8, **greedy)
    for prompt, row in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=8, **greedy)
        assert torch.equal(row[14:], alone[0, len(prompt) :])
    beams = [
        model.generate(ids(2, 11), max_new_tokens=8, num_beams=3, use_cache=cached, **greedy)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_prompt_whose_end_is_read_apart_where_the_last_layer_keeps_all(student):
    """The last layer takes in all but the end of a long prompt, and computes nothing of it."""
    model = student("last layer")
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    cached, whole = (model.generate(ids(1, 120), use_cache=use, **greedy) for use in (True, False))
    assert torch.equal(cached, whole)


def test_a_cache_grows_by_the_kept_keys_and_can_be_copied_saved_and_cut_by_rows(
    student, tmp_path, monkeypatch
):
    model = student("heads")
    # Layer 0 keeps heads of the first group alone, layer 2 of both; D is 16, keys and values fp32.
    assert model.new_cache().bytes_per_token() == 0  # nothing is known of its dtype
    _, cache = in_parts(model, ids(), [30])
    assert cache.bytes_per_token() == 3 * 2 * 16 * 4
    held = cache.nbytes()
    _, longer = in_parts(model, ids(), [30, 1, 9])
    assert longer.nbytes() - held == 10 * 2 * cache.bytes_per_token()
    save_cache(model, cache, tmp_path / "cache")
    others = [cache.copy(), load_cache(model, tmp_path / "cache")]
    tokens = ids(2, 300, seed=5)  # more than there is room for
    with torch.no_grad():
        expected = model(tokens, past_key_values=cache).logits
        for other in others:
            assert torch.equal(model(tokens, past_key_values=other).logits, expected)
        order = torch.tensor([1, 0])
        plain = model(tokens[:, :1], past_key_values=cache.copy()).logits
        cache.reorder_cache(order)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 3]))
        moved = model(tokens[order, :1], past_key_values=cache).logits
    assert error_ratio(moved, plain[order].double()) < 1e-6
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop(3)


def test_blocks_of_queries_equal_one_mask(monkeypatch):
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 50, 16, generator=make) for h in (8, 2, 2))
    segments = torch.randint(0, 2, (2, 50), generator=make).cumsum(1)
    expected = full_attention(q.double(), k.double(), v.double(), 0.3, (segments, segments))
    monkeypatch.setattr(full, "QUERIES", 7)
    found = full_attention(q, k, v, 0.3, (segments, segments))
    assert error_ratio(found, expected) < 1e-6
    scores = torch.einsum("bgrtd,bgsd->bgrts", q.double().view(2, 2, 4, 50, 16), k.double()) * 0.3
    place = torch.arange(50)
    seen = (place <= place[:, None]) & (segments[:, :, None] == segments[:, None])
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    plain = torch.einsum("bgrts,bgsd->bgrtd", weights, v.double()).reshape(2, 8, 50, 16)
    assert error_ratio(found, plain) < 1e-6
    # The last 20 tokens alone, as in a cache.
    part = full_attention(q[:, :, 30:], k, v, 0.3, (segments[:, 30:], segments))
    assert error_ratio(part, plain[:, :, 30:]) < 1e-6


def test_gradients_of_many_blocks_in_bf16_are_as_exact_as_those_of_one(monkeypatch):
    make = torch.Generator().manual_seed(0)
    given = [torch.randn(1, h, 256, 16, generator=make).bfloat16() for h in (2, 1, 1)]
    direction = 1 + torch.randn(1, 2, 256, 16, generator=make)
    segments = torch.zeros(1, 256, dtype=torch.long)

    def gradients(dtype, queries):
        monkeypatch.setattr(full, "QUERIES", queries)
        q, k, v = (x.to(dtype).requires_grad_() for x in given)
        out = full_attention(q, k, v, 0.25, (segments, segments))
        return torch.autograd.grad(out, (q, k, v), direction.to(dtype))

    expected = gradients(torch.float64, 512)
    one, many = gradients(torch.bfloat16, 512), gradients(torch.bfloat16, 4)
    for name, few, some, exact in zip("qkv", one, many, expected, strict=True):
        # Rounded after each of 64 blocks, those of keys and values would be off by 1.7 times.
        assert error_ratio(some, exact) < 1.2 * error_ratio(few, exact), name


@pytest.mark.parametrize(
    ("kept", "shared"),
    [((), 2), ((0, 1, 2, 3), 1), ((1, 5), 2), ((0,), 7), ((0, 1), 3), (tuple(range(8)), 0)],
)
def test_heads_of_groups_that_keep_different_numbers(kept, shared):
    heads = LayerHeads(kept, 8, 2)
    names = torch.arange(8)[None, :, None]
    groups = torch.arange(2)[None, :, None]
    assert heads.mixed_keys == shared
    if heads.mixed:
        queries, keys = take(names, heads.queries), take(groups, heads.keys)
        per_key = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        assert torch.equal(queries // 4, per_key)
    if heads.kept:
        queries, keys = take(names, heads.full_queries), take(groups, heads.full_keys)
        per_key = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        assert torch.equal(queries // 4, per_key)
        kept_names = take(queries, heads.full_outputs)
        assert kept_names.flatten().tolist() == list(kept)
    parts = [names[:, list(part)] if part else None for part in (kept, heads.mixed)]
    assert torch.equal(joined(heads, *parts), names)


@pytest.mark.parametrize(
    ("family", "attention", "line"),
    [
        ("llama", {"layers": [3]}, "layers: 3 is no layer of the teacher, which has 3: 0 to 2"),
        ("llama", {"heads": {1: [8]}}, "heads.1: 8 is no query head of the teacher, which has 8"),
        ("llama", {"heads": {7: [1]}}, "heads: 7 is no layer"),
        ("llama", {"every": 9}, "every: 9 keeps none of the teacher's 3 layers"),
        ("llama", {"heads": {1: list(range(8))}}, "heads.1: names all heads"),
        ("mistral", {"layers": [1]}, "layers: layer 1 of the teacher sees no more than 16 tokens"),
    ],
)
def test_what_the_teacher_has_not_is_refused(family, attention, line, make_teacher):
    teacher = make_teacher(family, **SMALL, sliding_window=16)
    with pytest.raises(UserError, match=rf"student\.mixer\.attention\.{line}"):
        convert(teacher, MixerConfig(attention=attention))

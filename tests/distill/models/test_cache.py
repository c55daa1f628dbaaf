"""The decoding cache: what it holds, and which operator decodes from it."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.cache import StudentCache
from xlstm_kernels import MLSTMState, Ring, window_step
from xlstm_kernels.state import held_positions

BRANCHES = {"both": ("mlstm", "window"), "mlstm": ("mlstm",), "window": ("window",)}
PROMPT = torch.arange(3, 25).view(2, 11)
TOKEN = PROMPT[:, :1]


@pytest.fixture
def student(tiny_teacher):
    def make(branches):
        return convert(tiny_teacher(), MixerConfig(window=4, sinks=2, branches=BRANCHES[branches]))

    return make


@torch.no_grad()
def prefilled(model):
    cache = model.new_cache()
    model(PROMPT, past_key_values=cache)
    return cache


@pytest.mark.parametrize("branches", BRANCHES)
def test_a_layer_holds_what_its_branches_need(branches, student):
    for layer in prefilled(student(branches)).layers:
        assert (layer.keys is not None) == ("window" in BRANCHES[branches])
        assert isinstance(layer.state, MLSTMState) == ("mlstm" in BRANCHES[branches])


@pytest.mark.parametrize(
    ("branches", "operator"),
    [("both", "hybrid_step"), ("window", "hybrid_step"), ("mlstm", "mlstm_step")],
)
def test_one_operator_decodes_a_token_on_the_mixers_backend(branches, operator, student):
    model = student(branches)
    cache = prefilled(model)
    for mixer in model.mixers():
        mixer.backend = "mlstm_kernels"  # a backend of `mlstm` alone: a step refuses it by name
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{operator}: backend='mlstm_kernels'"):
        model(TOKEN, past_key_values=cache)


@pytest.mark.parametrize("branches", BRANCHES)
def test_decoding_updates_in_place(branches, student):
    model = student(branches)
    cache = prefilled(model)
    held = [cache.lengths, *(tensor for layer in cache.layers for tensor in layer.tensors())]
    addresses = [tensor.data_ptr() for tensor in held]
    with torch.no_grad():
        for positions in ([[11], [11]], [[12], [0]]):  # the second row begins a document
            model(TOKEN, position_ids=torch.tensor(positions), past_key_values=cache)
    held = [cache.lengths, *(tensor for layer in cache.layers for tensor in layer.tensors())]
    assert [tensor.data_ptr() for tensor in held] == addresses
    assert cache.lengths.tolist() == [13, 1]


SEGMENTS = torch.tensor([[0] * 9, [0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2, 3, 3]])


def numbered(first, tokens):
    """Keys and values (B, G, T, 1) that say which token of the row they are of."""
    numbers = torch.arange(first, first + tokens, dtype=torch.float32)
    keys = numbers[None, None, :, None].expand(3, 2, -1, -1)
    return keys, 100 + keys


def ids_after(segments, first, tokens):
    """Segment ids of a chunk as the student gives them: 0 continues the document that is held."""
    before = segments[:, max(first - 1, 0)]
    return segments[:, first : first + tokens] - before[:, None]


def filled(window, sinks, parts):
    """A cache of one layer that has taken in all tokens, in chunks."""
    cache, first = StudentCache([window], sinks), 0
    for tokens in parts:
        cache.receive((3, tokens), ids_after(SEGMENTS, first, tokens), torch.device("cpu"))
        cache.layers[0].update(*numbered(first, tokens), cache.arrival)
        first += tokens
    return cache


def stepped(window, sinks):
    """The same ring, filled by the operator that decodes."""
    ring = Ring.empty(3, 2, 1, 1, window=window, sinks=sinks)
    for t in range(SEGMENTS.shape[1]):
        ring.lengths.masked_fill_(ids_after(SEGMENTS, t, 1)[:, 0] != 0, 0)
        key, value = (x[:, :, 0] for x in numbered(t, 1))
        window_step(key, key, value, ring, sinks=sinks)
    return ring


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 1), (4, 6), (20, 2)])
def test_chunks_fill_the_ring_as_decoded_tokens_do(window, sinks):
    expected = stepped(window, sinks)
    for parts in ([9], [1] * 9, [4, 5], [2, 1, 6], [8, 1]):
        cache = filled(window, sinks, parts)
        layer = cache.layers[0]
        assert torch.equal(cache.lengths, expected.lengths), parts
        holds_a_token = (held_positions(cache.lengths, window, sinks) >= 0)[:, None, :, None]
        for mine, theirs in ((layer.keys, expected.keys), (layer.values, expected.values)):
            assert torch.equal(mine * holds_a_token, theirs * holds_a_token), parts


def test_the_prefix_holds_each_visible_token_once_in_order():
    cache = filled(4, 3, [9])
    keys, values, valid = cache.layers[0].prefix(cache.lengths)
    held = [keys[row, 0, valid[row], 0].tolist() for row in range(3)]
    # Row 0: three sinks and the last four; row 1: its document began at token 3; row 2: at 7.
    assert held == [[0, 1, 2, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8], [7, 8]]
    assert torch.equal((values - keys)[0, 0, valid[0]], torch.full((7, 1), 100.0))


def test_rows_can_be_selected_and_repeated():
    cache = filled(4, 1, [9])
    layer = cache.layers[0]
    before = [cache.lengths, layer.keys, layer.values]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 0, 2]))
    cache.batch_select_indices(torch.tensor([1, 2, 0]))
    for mine, theirs in zip([cache.lengths, layer.keys, layer.values], before, strict=True):
        assert torch.equal(mine, theirs)
    cache.reset()
    assert (layer.tensors(), cache.nbytes(), cache.get_seq_length()) == ([], 0, 0)

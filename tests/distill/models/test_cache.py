"""The decoding cache: what it holds, and which operator decodes from it."""

from __future__ import annotations

import pytest
import torch

from xlstm_distill import MixerConfig, convert
from xlstm_distill.models.cache import MixerCacheLayer
from xlstm_kernels import MLSTMState, Ring, hybrid_step

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
        assert isinstance(layer.ring, Ring) == ("window" in BRANCHES[branches])
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
    held = [tensor for layer in cache.layers for tensor in layer.tensors()]
    addresses = [tensor.data_ptr() for tensor in held]
    with torch.no_grad():
        for positions in ([[11], [11]], [[12], [0]]):  # the second row begins a document
            model(TOKEN, position_ids=torch.tensor(positions), past_key_values=cache)
    now = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors()]
    assert now == addresses


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
    layer, first = MixerCacheLayer(window, sinks), 0
    for tokens in parts:
        layer.update(*numbered(first, tokens), ids_after(SEGMENTS, first, tokens))
        first += tokens
    return layer.ring


def stepped(window, sinks):
    """The same ring, filled by the operator that decodes."""
    layer = MixerCacheLayer(window, sinks)
    layer.ring_for(*numbered(0, 1))
    state = MLSTMState.zeros(3, 2, 1, 1)
    for t in range(SEGMENTS.shape[1]):
        layer.restart_ring(ids_after(SEGMENTS, t, 1))
        key, value = (x[:, :, 0] for x in numbered(t, 1))
        phi, gate = torch.zeros(3, 2, 1), torch.zeros(3, 2)
        hybrid_step(key, key, value, phi, phi, gate, gate, gate, state, layer.ring, sinks=sinks)
    return layer.ring


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 1), (4, 6), (20, 2)])
def test_chunks_fill_the_ring_as_decoded_tokens_do(window, sinks):
    expected = stepped(window, sinks)
    for parts in ([9], [1] * 9, [4, 5], [2, 1, 6], [8, 1]):
        ring = filled(window, sinks, parts)
        assert torch.equal(ring.lengths, expected.lengths), parts
        assert torch.equal(ring.positions, expected.positions), parts
        holds_a_token = (ring.positions >= 0)[:, None, :, None]
        for mine, theirs in ((ring.keys, expected.keys), (ring.values, expected.values)):
            assert torch.equal(mine * holds_a_token, theirs * holds_a_token), parts


def test_the_prefix_holds_each_visible_token_once_in_order():
    layer = MixerCacheLayer(window=4, sinks=3)
    layer.update(*numbered(0, 9), SEGMENTS)
    keys, values, valid = layer.prefix()
    held = [keys[row, 0, valid[row], 0].tolist() for row in range(3)]
    # Row 0: three sinks and the last four; row 1: its document began at token 3; row 2: at 7.
    assert held == [[0, 1, 2, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8], [7, 8]]
    assert torch.equal((values - keys)[0, 0, valid[0]], torch.full((7, 1), 100.0))


def test_rows_can_be_selected_and_repeated():
    layer = MixerCacheLayer(window=4, sinks=1)
    layer.update(*numbered(0, 9), SEGMENTS)
    before = layer.ring
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([5, 0, 2]))
    layer.batch_select_indices(torch.tensor([1, 2, 0]))
    for mine, theirs in zip(layer.ring, before, strict=True):
        assert torch.equal(mine, theirs)
    layer.reset()
    assert (layer.tensors(), layer.nbytes(), layer.get_seq_length()) == ([], 0, 0)

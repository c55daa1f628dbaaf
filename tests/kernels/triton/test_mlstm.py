"""The Triton mLSTM against the recurrent float64 reference.

The shapes are the smallest that take every branch of the kernels: the interpreter is slow.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, mlstm
from xlstm_kernels.reference import mlstm_reference
from xlstm_kernels.testing import (
    error_ratio,
    outputs_and_grads,
    random_inputs,
    random_segments,
    random_state,
    to_float64,
)
from xlstm_kernels.triton.configs import Launch, MLSTMConfig, TokenLaunch

pytest.importorskip("triton")
from xlstm_kernels.triton.mlstm import mlstm_triton

pytestmark = pytest.mark.usefixtures("poisoned")
BOUND = 1e-5
TILE = 16  # tokens; two make a chunk
SMALL = MLSTMConfig(2 * TILE, TILE, *[Launch(16, 16, 4, 1)] * 3, TokenLaunch(16, 16, 4, 1))
# As many super-chunks of a row as it has chunks of this size.
SHORT = SMALL._replace(chunk=TILE)
Tensors = dict[str, Tensor]


def on(device: str, inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Copy inputs to a device as leaves; the gates and the state stay float32."""
    wide = ("i", "f", "C", "n", "m")
    return {
        name: x.detach()
        .to(device, x.dtype if dtype is None or name in wide else dtype)
        .requires_grad_(x.requires_grad)
        for name, x in inputs.items()
    }


def run(
    inputs: Tensors, segment_ids: Tensor | None, config: MLSTMConfig = SMALL, cut: int = 1
) -> Tensors:
    """Return h, the final C and n, and all gradients, through both states if there is one."""

    def operator(**x: Tensor) -> tuple[Tensor, ...]:
        state = MLSTMState(*(x.pop(name) for name in MLSTMState._fields)) if "C" in x else None
        row = {"segment_ids": segment_ids, "state": state}
        h, final = mlstm_triton(**x, **row, config=config, cut=cut)
        return h, final.C, final.n

    return outputs_and_grads(operator, inputs)


def truth(inputs: Tensors, segment_ids: Tensor | None) -> Tensors:
    """As `run`, by the reference in float64."""

    def operator(**x: Tensor) -> tuple[Tensor, ...]:
        state = MLSTMState(*(x.pop(name) for name in MLSTMState._fields)) if "C" in x else None
        h, final = mlstm_reference(**x, segment_ids=segment_ids, state=state)
        return h, final.C, final.n

    return outputs_and_grads(operator, to_float64(inputs))


def ratios(actual: Tensors, expected: Tensors) -> dict[str, float]:
    return {name: error_ratio(actual[name], expected[name]) for name in expected}


def assert_matches(
    inputs: Tensors,
    segment_ids: Tensor | None = None,
    config: MLSTMConfig = SMALL,
    bound: float = BOUND,
    cut: int = 1,
) -> None:
    found = ratios(run(inputs, segment_ids, config, cut), truth(inputs, segment_ids))
    assert all(ratio < bound for ratio in found.values()), found  # a NaN fails too


# Both sides of the border of a chunk, and three chunks; two tiles of keys and two heads.
@pytest.mark.parametrize("tokens", [2, 15, 16, 17, 37])
def test_outputs_states_and_all_gradients_match_reference(device: str, tokens: int) -> None:
    heads = 2 if tokens == 37 else 1
    state = random_state(1, heads, 32, 16, seed=3)
    assert_matches(on(device, random_inputs(1, heads, tokens, 32, 16, seed=tokens) | state))


# Five chunks: two super-chunks, the last of which is shorter; three; as many as there are chunks.
@pytest.mark.parametrize("cut", [2, 3, 99])
def test_rows_in_super_chunks_match_reference(device: str, cut: int) -> None:
    drawn = random_inputs(1, 2, 70, 32, 16, G=1, seed=cut) | random_state(1, 2, 32, 16, seed=3)
    assert_matches(on(device, drawn), config=SHORT, cut=cut)


def test_a_row_of_one_chunk_is_not_cut(device: str) -> None:
    inputs = on(device, random_inputs(1, 1, TILE - 1, 16, seed=2))
    cut, whole = run(inputs, None, SHORT, cut=4), run(inputs, None, SHORT)
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_one_token_returns_its_value(device: str) -> None:
    inputs = on(device, random_inputs(1, 1, 1, 16, seed=1))
    actual = run(inputs, None)
    assert error_ratio(actual["h0"], inputs["v"]) < 1e-6
    assert all(torch.isfinite(x).all() for x in actual.values())


# One row each: documents that end at the borders of chunks, next to them, and inside; a chunk of
# three documents; documents of one token; one document, whose gradient reaches the initial state.
DOCUMENTS = [[16, 32, 5], [15, 1, 17, 20], [3, 6, 44], [1, 1, 51], [53]]


@pytest.mark.parametrize(("config", "cut"), [(SMALL, 1), (SHORT, 2), (SHORT, 4)])
def test_documents_match_reference(device: str, config: MLSTMConfig, cut: int) -> None:
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in DOCUMENTS]
    ids, batch = torch.stack(rows).to(device), len(rows)
    state = random_state(batch, 1, 16, 16, seed=5)
    inputs = on(device, random_inputs(batch, 1, 53, 16, seed=4) | state)
    actual, expected = run(inputs, ids, config, cut), truth(inputs, ids)
    for row, lengths in enumerate(DOCUMENTS):  # each row has a ratio of its own
        found = {name: error_ratio(actual[name][row], x[row]) for name, x in expected.items()}
        assert all(ratio < BOUND for ratio in found.values()), (lengths, found)


def test_a_document_of_large_gates_does_not_scale_the_next_one(device: str) -> None:
    # Were the stabiliser to cross the boundary, every weight of the second document would be
    # exp(-120), which is 0.
    inputs = random_inputs(1, 1, 30, 16, seed=19)
    i = inputs["i"].detach() + torch.where(torch.arange(30) < 11, 60.0, -60.0)
    ids = (torch.arange(30) >= 11).long()[None].to(device)
    assert_matches(on(device, inputs | {"i": i.requires_grad_()}), ids)


def test_a_returning_id_starts_a_new_document(device: str) -> None:
    inputs = on(device, random_inputs(1, 1, 20, 16, seed=10))
    assert_matches(inputs, torch.tensor([[0] * 10 + [1] * 3 + [0] * 7], device=device))


def test_grouped_values_match_reference(device: str) -> None:
    # Two groups of two heads, two tiles of values; two rows of different documents.
    inputs = on(device, random_inputs(2, 4, 20, 16, 32, 2, seed=4))
    assert_matches(inputs, random_segments(2, 20, mean_length=8, seed=1).to(device))


GATES = {"input": ("i",), "forget": ("f",), "both": ("i", "f")}


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("names", GATES.values(), ids=GATES.keys())
def test_gates_at_60_match_reference(device: str, names: tuple[str, ...], cut: int) -> None:
    inputs = random_inputs(1, 1, 40, 16, seed=6)
    draw = torch.Generator().manual_seed(7)
    for name in names:
        inputs[name] = (
            120.0 * torch.randint(0, 2, inputs[name].shape, generator=draw) - 60.0
        ).requires_grad_()
    assert_matches(on(device, inputs), config=SMALL if cut == 1 else SHORT, cut=cut)


@pytest.mark.parametrize("cut", [1, 2])
def test_one_closed_gate_costs_no_later_pair_its_accuracy(device: str, cut: int) -> None:
    # With float32 cumulative sums, log f = -1e6 at one token leaves no digit in the differences
    # after it.
    inputs = random_inputs(1, 1, 2 * TILE, 16, seed=9)
    f = inputs["f"].detach().clone()
    f[:, :, 3] = -1e6
    config = SMALL if cut == 1 else SHORT
    assert_matches(on(device, inputs | {"f": f.requires_grad_()}), config=config, cut=cut)


# The stabiliser is then a large number, which fades a little in each chunk. Roundings of it that do
# not agree where two super-chunks meet are errors of 1e-3.
@pytest.mark.parametrize("cut", [1, 4])
def test_large_input_gates_cost_no_digits(device: str, cut: int) -> None:
    inputs = random_inputs(1, 1, 8 * TILE, 16, seed=8, forget_bias=6.0)
    i = inputs["i"].detach() + 3e4
    i[:, :, 0] += 9.0
    inputs = on(device, inputs | {"i": i.requires_grad_()})
    row = {"segment_ids": None, "state": None}
    actual = outputs_and_grads(
        lambda **x: mlstm_triton(**x, **row, config=SHORT, cut=cut)[0], inputs
    )
    expected = outputs_and_grads(lambda **x: mlstm_reference(**x)[0], to_float64(inputs))
    found = ratios(actual, expected)
    assert all(ratio < BOUND for ratio in found.values()), found


def test_zero_keys_give_zero_and_zero_gradients(device: str) -> None:
    inputs = random_inputs(1, 1, 20, 16, seed=17)
    inputs["k"] = torch.zeros_like(inputs["k"]).requires_grad_()
    actual = run(on(device, inputs), None)
    assert all(torch.count_nonzero(actual[name]) == 0 for name in ("h0", "dq", "df"))
    assert all(torch.isfinite(x).all() for x in actual.values())


def test_the_ratio_has_no_floor(device: str) -> None:
    inputs = random_inputs(1, 1, 20, 16, seed=18)
    small = {
        name: (x.detach() * 1e-12 if name in "qk" else x.detach()).requires_grad_()
        for name, x in inputs.items()
    }
    expected = outputs_and_grads(lambda **x: mlstm_reference(**x)[0], to_float64(small))
    actual = outputs_and_grads(
        lambda **x: mlstm_triton(**x, segment_ids=None, state=None, config=SMALL)[0],
        on(device, small),
    )
    found = ratios(actual, expected)
    assert all(ratio < BOUND for ratio in found.values()), found


# Measured in the interpreter: at most 3.8e-4, the rounding of h, dh and the gradients to float16
# (2^-12 at most).
def test_float16_loses_only_its_rounding(device: str) -> None:
    inputs = on(device, random_inputs(1, 2, 20, 32, G=1, seed=0), torch.float16)
    actual = run(inputs, None)
    assert actual["h0"].dtype == actual["dv"].dtype == torch.float16
    assert actual["h1"].dtype == torch.float32
    found = ratios(actual, truth(inputs, None))
    assert all(ratio < 5e-4 for ratio in found.values()), found


def test_passes_with_carried_state_equal_one_pass(device: str) -> None:
    # Passes of one chunk, of one token, and of more than a chunk that ends inside the next one.
    lengths = [16, 1, 20]
    inputs = on(device, random_inputs(1, 1, sum(lengths), 16, seed=12))

    def in_passes(**x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, outputs = None, []
        for part in zip(*(t.split(lengths, dim=2) for t in x.values()), strict=True):
            h, state = mlstm_triton(*part, segment_ids=None, state=state, config=SMALL)
            outputs.append(h)
        return torch.cat(outputs, dim=2), state.C, state.n

    found = ratios(outputs_and_grads(in_passes, inputs), run(inputs, None))
    assert all(ratio < 2e-6 for ratio in found.values()), found


def test_tiles_and_chunks_of_any_size_agree(device: str) -> None:
    inputs = on(device, random_inputs(1, 1, 70, 64, 32, seed=13))
    for config in (
        MLSTMConfig(32, 32, *[Launch(32, 16, 4, 1)] * 3, TokenLaunch(32, 16, 4, 1)),
        MLSTMConfig(64, 16, *[Launch(64, 32, 4, 1)] * 3, TokenLaunch(64, 32, 4, 1)),
    ):
        assert_matches(inputs, random_segments(1, 70, mean_length=25, seed=2).to(device), config)


def test_public_operator_runs_the_kernels_of_the_table(device: str) -> None:
    inputs = on(device, random_inputs(1, 2, 70, 32, G=1, seed=14))
    strided = {
        n: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for n, x in inputs.items()
    }
    found = ratios(
        outputs_and_grads(lambda **x: mlstm(**x, backend="triton"), strided),
        outputs_and_grads(lambda **x: mlstm(**x, backend="torch"), inputs),
    )
    assert all(ratio < BOUND for ratio in found.values()), found
    _, final = mlstm(**inputs, return_state=True, backend="triton")
    _, expected = mlstm(**inputs, return_state=True, backend="torch")
    assert error_ratio(final.m, expected.m) < BOUND
    assert final.C.requires_grad
    assert not final.m.requires_grad

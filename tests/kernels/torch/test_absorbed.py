"""The mLSTM's state without outputs, against the recurrent float64 reference."""

from __future__ import annotations

import pytest
import torch

from xlstm_kernels import MLSTMState, mlstm_state
from xlstm_kernels.reference import mlstm_reference
from xlstm_kernels.testing import (
    error_ratio,
    random_inputs,
    random_segments,
    random_state,
    to_float64,
)

BOUND = 1e-5  # RMS ratio, float32 against float64


def held(seed: int = 3) -> dict[str, torch.Tensor]:
    return {name: x.detach() for name, x in random_state(2, 4, 24, 10, seed=seed).items()}


def given(tokens: int) -> dict[str, torch.Tensor]:
    found = random_inputs(B=2, H=4, T=tokens, Dk=24, Dv=10, G=2, seed=tokens)
    return {name: x.detach() for name, x in found.items()}


def assert_matches_reference(inputs, state, segment_ids=None, bound: float = BOUND) -> None:
    exact = {name: x.double() for name, x in inputs.items()}
    before = MLSTMState(**to_float64(state))
    _, expected = mlstm_reference(**exact, segment_ids=segment_ids, state=before)
    inputs = {name: x for name, x in inputs.items() if name != "q"}
    found = mlstm_state(**inputs, segment_ids=segment_ids, state=MLSTMState(**state))
    # Stabilisers are exponents, and may be 0 or the log-weight of nothing.
    torch.testing.assert_close(found.m.double(), expected.m, rtol=1e-6, atol=1e-5)
    for name in "Cn":
        assert error_ratio(getattr(found, name), getattr(expected, name)) < bound, name


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens", [1, 31, 65, 1000])
def test_state_matches_reference(tokens: int, documents: bool) -> None:
    ids = random_segments(2, tokens, mean_length=12, seed=tokens) if documents else None
    if documents:
        ids[1] = 0  # the initial state reaches the end of this row
    assert_matches_reference(given(tokens), held(), ids)
    empty = MLSTMState.zeros(2, 4, 24, 10)._asdict()
    assert_matches_reference(given(tokens), empty, ids)


@pytest.mark.parametrize("stabiliser", [-80.0, 0.0, 80.0, 3e4])
@pytest.mark.parametrize("gates", [("mixed", "mixed"), (60.0, 60.0), (-60.0, 60.0), (0.0, -60.0)])
def test_extreme_gates_match_reference(gates: tuple, stabiliser: float) -> None:
    inputs, draw = given(130), torch.Generator().manual_seed(7)
    for name, gate in zip("if", gates, strict=True):
        drawn = 120.0 * torch.randint(0, 2, inputs[name].shape, generator=draw) - 60.0
        inputs[name] = drawn if gate == "mixed" else torch.full_like(drawn, gate)
    state = held()
    assert_matches_reference(inputs, state | {"m": state["m"] + stabiliser})


# Large exponents, of which the weights are small differences: input gates, and a last token whose
# forget gate is closed and which writes less than it lets through.
@pytest.mark.parametrize("last", [None, (-1e4, -6e4)])
def test_large_exponents_cost_no_digits(last: tuple[float, float] | None) -> None:
    inputs, state = given(130), held()
    inputs["f"] += 4.0
    if last is None:
        inputs["i"] += 3e4
        state["m"] += 3e4
    else:
        inputs["f"][..., -1], inputs["i"][..., -1] = last
    exact, before = to_float64(inputs), MLSTMState(**to_float64(state))
    _, expected = mlstm_reference(**exact, state=before)
    del inputs["q"]
    found = mlstm_state(**inputs, state=MLSTMState(**state))
    # float32 holds m to 1e-3 only; C and n are in units of its exponential.
    unit = (found.m.double() - expected.m).exp()
    assert error_ratio(found.C * unit[..., None, None], expected.C) < BOUND
    assert error_ratio(found.n * unit[..., None], expected.n) < BOUND


def test_autocast_and_compilers_change_nothing() -> None:
    inputs, state = given(40), MLSTMState(**held())
    del inputs["q"]
    plain = mlstm_state(**inputs, state=state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mlstm_state(**inputs, state=state)
    compiled = torch.compile(mlstm_state, backend="eager", fullgraph=True)
    for other in (found, compiled(**inputs, state=state)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_the_state_that_is_given_stays_as_it_is_and_low_precision_is_widened() -> None:
    inputs, state = given(40), held()
    kept = {name: x.clone() for name, x in state.items()}
    rounded = {name: x.bfloat16() for name, x in inputs.items()}
    assert_matches_reference(rounded, state)
    assert all(torch.equal(kept[name], x) for name, x in state.items())


def test_hidden_tokens_have_exactly_no_influence() -> None:
    inputs, state = given(50), MLSTMState(**held())
    ids = (torch.arange(50) >= 30).long().expand(2, -1)
    del inputs["q"]
    changed = {name: x.clone() for name, x in inputs.items()}
    for x in changed.values():
        x[:, :, :30] = 5
    found = [
        mlstm_state(**x, state=s, segment_ids=ids)
        for x, s in ((inputs, state), (changed, MLSTMState(*(y + 1 for y in state))))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

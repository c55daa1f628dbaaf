"""The chunkwise mLSTM against the recurrent float64 reference.

Outputs, gradients, states and documents.
"""

from __future__ import annotations

from collections.abc import Callable

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
from xlstm_kernels.torch import chunkwise as torch_chunkwise

BOUND = 1e-5  # RMS ratio, float32 against float64
Outputs = dict[str, Tensor]


def with_states(
    operator: Callable[..., tuple[Tensor, MLSTMState]], segment_ids: Tensor | None
) -> Callable[..., tuple]:
    """Wrap an operator so that C and n of both states take part in the gradients."""

    def run(C: Tensor, n: Tensor, m: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, final = operator(**inputs, segment_ids=segment_ids, state=MLSTMState(C, n, m))
        return h, final.C, final.n

    return run


def chunkwise(**arguments) -> tuple[Tensor, MLSTMState]:
    return mlstm(**arguments, return_state=True)


def assert_close(actual: Outputs, expected: Outputs, bound: float = BOUND) -> None:
    ratios = {name: error_ratio(actual[name], expected[name]) for name in expected}
    assert all(ratio < bound for ratio in ratios.values()), ratios  # a NaN fails too


def assert_matches_reference(inputs: dict[str, Tensor], segment_ids: Tensor | None = None) -> None:
    actual = outputs_and_grads(lambda **x: mlstm(**x, segment_ids=segment_ids), inputs)
    expected = outputs_and_grads(
        lambda **x: mlstm_reference(**x, segment_ids=segment_ids)[0], to_float64(inputs)
    )
    assert_close(actual, expected)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_outputs_and_all_gradients_match_reference(tokens: int, documents: bool) -> None:
    inputs = random_inputs(B=2 if tokens < 1000 else 1, H=2, T=tokens, Dk=16, G=1, seed=tokens)
    segment_ids = (
        random_segments(inputs["q"].shape[0], tokens, mean_length=20, seed=tokens)
        if documents
        else None
    )
    # One token makes h = v exactly, and every gradient but dv exactly 0: only a longer row has
    # ratios of its own.
    if tokens == 1:
        actual = outputs_and_grads(lambda **x: mlstm(**x, segment_ids=segment_ids), inputs)
        expected = outputs_and_grads(lambda **x: mlstm_reference(**x)[0], to_float64(inputs))
        assert_close({n: actual[n] for n in ("h", "dv")}, {n: expected[n] for n in ("h", "dv")})
        assert all(actual[n].abs().max() < BOUND for n in ("di", "df"))
    else:
        assert_matches_reference(inputs, segment_ids)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokens", [1, 31, 65, 200])
def test_gradients_flow_through_initial_and_final_state(tokens: int, documents: bool) -> None:
    inputs = random_inputs(B=2, H=4, T=tokens, Dk=8, Dv=6, G=2, seed=tokens) | random_state(
        2, 4, 8, 6, seed=3
    )
    segment_ids = random_segments(2, tokens, mean_length=12, seed=tokens) if documents else None
    if documents and tokens > 32:
        segment_ids[1] = 0  # else no gradient reaches the initial state from the final one
    actual = outputs_and_grads(with_states(chunkwise, segment_ids), inputs)
    expected = outputs_and_grads(with_states(mlstm_reference, segment_ids), to_float64(inputs))
    assert_close(actual, expected)


def test_final_stabiliser_matches_reference_and_carries_no_gradient() -> None:
    inputs = random_inputs(B=2, H=2, T=77, Dk=8, seed=4)
    _, final = mlstm(**inputs, return_state=True)
    _, expected = mlstm_reference(**to_float64(inputs))
    assert error_ratio(final.m, expected.m) < BOUND
    assert final.C.requires_grad
    assert final.n.requires_grad
    assert not final.m.requires_grad


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (4, 4), (6, 3)])
def test_grouped_values_and_unequal_dims_match_reference(heads: int, groups: int) -> None:
    assert_matches_reference(random_inputs(B=2, H=heads, T=70, Dk=24, Dv=10, G=groups, seed=heads))


def test_signed_queries_and_keys_match_reference() -> None:
    # Of one sign would be a feature map; of both, but with a denominator away from 0, the ratio is
    # as well defined.
    inputs = random_inputs(B=2, H=2, T=90, Dk=16, seed=5)
    shift = torch.zeros(16)
    shift[0] = 2.0
    signed = {
        n: (x.detach() - 0.03 + shift if n in "qk" else x.detach()).requires_grad_()
        for n, x in inputs.items()
    }
    assert signed["k"].min() < 0
    assert_matches_reference(signed)


GATES = {
    "input gates at ±60": ("mixed", "plain"),
    "forget gates at ±60": ("plain", "mixed"),
    "both at ±60": ("mixed", "mixed"),
    "all at +60": (60.0, 60.0),
    "written never, kept always": (-60.0, 60.0),
}


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES.keys())
def test_extreme_gates_match_reference(gates: tuple[str | float, str | float]) -> None:
    inputs = random_inputs(B=2, H=2, T=130, Dk=16, seed=6)
    draw = torch.Generator().manual_seed(7)
    for name, gate in zip(("i", "f"), gates, strict=True):
        if gate == "mixed":
            inputs[name] = 120.0 * torch.randint(0, 2, inputs[name].shape, generator=draw) - 60.0
        elif gate != "plain":
            inputs[name] = torch.full_like(inputs[name], float(gate))
        inputs[name] = inputs[name].detach().requires_grad_()
    assert_matches_reference(inputs)


@pytest.mark.parametrize(("size", "bound"), [(1e3, 1e-5), (1e6, 1e-2), (-1e29, 1e-5)])
def test_large_input_gates_cost_digits(size: float, bound: float) -> None:
    # float32 holds 1e3 + log f in steps of 6e-5, and 1e6 + log f in steps of 6e-2.
    inputs = {name: x.detach() for name, x in random_inputs(1, 2, 70, 8, 8, 2, seed=1).items()}
    inputs["i"][:, :, ::7] = size
    exact, _ = mlstm_reference(**{name: x.double() for name, x in inputs.items()})
    assert error_ratio(mlstm(**inputs), exact) < bound


@pytest.mark.parametrize("input_gate", [-60.0, 60.0])
def test_closed_forget_gates_return_the_value(input_gate: float) -> None:
    # Nothing survives a step: h = v, and the true gradients of q, k, i, f are below 1e-24,
    # differences of equal terms. No ratio can be asked of them; their error is measured against the
    # gradients at ordinary gates.
    inputs = random_inputs(B=2, H=2, T=130, Dk=16, seed=8)
    ordinary = outputs_and_grads(mlstm, inputs)
    for name, gate in (("i", input_gate), ("f", -60.0)):
        inputs[name] = torch.full_like(inputs[name], gate).requires_grad_()
    actual = outputs_and_grads(mlstm, inputs)
    assert error_ratio(actual["h"], inputs["v"]) < 1e-6
    for name in ("dq", "dk", "di", "df"):
        assert error_ratio(ordinary[name] + actual[name], ordinary[name]) < BOUND, name


def test_one_closed_gate_costs_no_later_pair_its_accuracy() -> None:
    # With cumulative sums over the chunk, log f = -1e6 at one token leaves no digit in the
    # differences after it.
    inputs = random_inputs(B=1, H=2, T=64, Dk=16, seed=9)
    f = inputs["f"].detach().clone()
    f[:, :, 3] = -1e6
    inputs["f"] = f.requires_grad_()
    assert_matches_reference(inputs)


@pytest.mark.parametrize("lengths", [[64, 64], [1, 1, 62, 3], [31, 33, 32, 40], [100, 1, 99]])
def test_packed_documents_equal_separate_ones(lengths: list[int]) -> None:
    tokens = sum(lengths)
    inputs = random_inputs(B=2, H=4, T=tokens, Dk=16, G=2, seed=tokens)
    segment_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)

    def separately(**x: Tensor) -> Tensor:
        parts = zip(*(t.split(lengths, dim=2) for t in x.values()), strict=True)
        return torch.cat([mlstm(*part) for part in parts], dim=2)

    packed = outputs_and_grads(lambda **x: mlstm(**x, segment_ids=segment_ids), inputs)
    assert_close(packed, outputs_and_grads(separately, inputs), bound=2e-6)


def test_a_returning_id_starts_a_new_document() -> None:
    inputs = random_inputs(B=1, H=2, T=50, Dk=8, seed=10)
    alternating = torch.tensor([[0] * 20 + [1] * 5 + [0] * 25])
    distinct = torch.tensor([[7] * 20 + [3] * 5 + [9] * 25])
    assert torch.equal(
        mlstm(**inputs, segment_ids=alternating), mlstm(**inputs, segment_ids=distinct)
    )


# Measured: 7e-6 and 1.1e-5. With a stabiliser that is added to before it is taken off, 5e-4.
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_long_memory_does_not_drift(offset: float) -> None:
    """A constant in the input gate cancels, however many chunks the state goes through."""
    inputs = random_inputs(1, 1, 32768, 8, seed=1)
    inputs = {name: x.detach() for name, x in inputs.items()}
    inputs |= {"f": torch.full_like(inputs["f"], 12.0), "i": inputs["i"] + offset}
    end = slice(-4096, None)
    expected = mlstm(**{name: x.double() for name, x in inputs.items()})[:, :, end]
    assert error_ratio(mlstm(**inputs)[:, :, end], expected) < 3e-5


@pytest.mark.parametrize("documents", [False, True])
def test_invisible_tokens_have_exactly_no_influence(documents: bool) -> None:
    inputs = random_inputs(B=1, H=2, T=40, Dk=8, seed=22)
    segment_ids = (torch.arange(40) >= 20).long()[None] if documents else None
    h = mlstm(**inputs, segment_ids=segment_ids)
    read, hidden = (slice(20, 40), slice(0, 20)) if documents else (slice(0, 20), slice(20, 40))
    grads = torch.autograd.grad(h[:, :, read].sum(), list(inputs.values()))
    assert all(torch.count_nonzero(g[:, :, hidden]) == 0 for g in grads)
    assert all(torch.count_nonzero(g[:, :, read]) > 0 for g in grads)


def test_final_state_is_of_the_last_document_alone() -> None:
    inputs = random_inputs(B=1, H=2, T=80, Dk=8, seed=11)
    _, packed = mlstm(**inputs, segment_ids=torch.tensor([[0] * 45 + [1] * 35]), return_state=True)
    _, alone = mlstm(**{name: x[:, :, 45:] for name, x in inputs.items()}, return_state=True)
    for actual, expected in zip(packed, alone, strict=True):
        assert error_ratio(actual, expected) < 2e-6


@pytest.mark.parametrize("lengths", [[50, 50], [1, 99], [32, 64, 4], [33, 33, 34]])
def test_passes_with_carried_state_equal_one_pass(lengths: list[int]) -> None:
    inputs = random_inputs(B=2, H=4, T=100, Dk=16, G=2, seed=12)

    def in_passes(**x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state, outputs = None, []
        for part in zip(*(t.split(lengths, dim=2) for t in x.values()), strict=True):
            h, state = mlstm(*part, state=state, return_state=True)
            outputs.append(h)
        return torch.cat(outputs, dim=2), state.C, state.n

    def in_one(**x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, state = mlstm(**x, return_state=True)
        return h, state.C, state.n

    assert_close(
        outputs_and_grads(in_passes, inputs), outputs_and_grads(in_one, inputs), bound=2e-6
    )


# Of 2 rows, 2 groups of 2 heads and 100 tokens: one chunk of a group; two; a group; a row; all.
# And sections of one part, of several, of all, of less than a part; lengths that do not fit.
@pytest.mark.parametrize(
    ("span", "section"),
    [(64, 64), (64, 128), (128, 512), (256, 1024), (512, 512), (1024, 1024), (150, 330), (300, 90)],
)
def test_parts_of_any_size_give_the_same_result(monkeypatch, span: int, section: int) -> None:
    inputs = random_inputs(B=2, H=4, T=100, Dk=8, Dv=6, G=2, seed=23)
    inputs |= random_state(2, 4, 8, 6, seed=24)
    segment_ids = random_segments(2, 100, mean_length=40, seed=25)
    operator = with_states(chunkwise, segment_ids)
    expected = outputs_and_grads(operator, inputs)
    monkeypatch.setattr(torch_chunkwise, "SPAN_CPU", (span, span))
    monkeypatch.setattr(torch_chunkwise, "SECTION_CPU", section)
    assert_close(outputs_and_grads(operator, inputs), expected, bound=2e-6)


def test_a_second_backward_pass_reads_what_the_first_one_read() -> None:
    inputs = random_inputs(B=2, H=4, T=100, Dk=8, Dv=6, G=2, seed=27)
    loss, asked = mlstm(**inputs).square().sum(), list(inputs.values())
    first = torch.autograd.grad(loss, asked, retain_graph=True)
    second = torch.autograd.grad(loss, asked)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_gradients_match_finite_differences() -> None:
    inputs = to_float64(
        random_inputs(B=1, H=2, T=35, Dk=2, G=1, seed=13) | random_state(1, 2, 2, 2, seed=14)
    )
    names = [name for name in inputs if name != "m"]
    segment_ids = torch.tensor([[0] * 10 + [1] * 25])

    def read(*values: Tensor) -> Tensor:
        x = dict(zip(names, values, strict=True))
        state = MLSTMState(x.pop("C"), x.pop("n"), inputs["m"])
        return mlstm(**x, state=state, segment_ids=segment_ids)

    assert torch.autograd.gradcheck(read, [inputs[name] for name in names])


# Measured at B=2, H=4, G=2, T=200, D=32: at most 2.4e-3 (bfloat16) and 3.0e-4 (float16), which is
# the rounding of outputs and gradients to the dtype itself (2^-9 and 2^-12, relative, at most).
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3.2e-3), (torch.float16, 4e-4)])
def test_low_precision_inputs_lose_only_their_rounding(dtype: torch.dtype, bound: float) -> None:
    inputs = random_inputs(B=2, H=4, T=200, Dk=32, G=2, seed=0)
    low = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    actual = outputs_and_grads(mlstm, low)
    assert actual["h"].dtype == dtype
    assert_close(
        actual, outputs_and_grads(lambda **x: mlstm_reference(**x)[0], to_float64(low)), bound
    )
    _, state = mlstm(**low, return_state=True)
    assert {x.dtype for x in state} == {torch.float32}


def test_autocast_does_not_reach_the_recurrence() -> None:
    inputs = random_inputs(B=1, H=2, T=100, Dk=16, seed=15)
    expected = mlstm(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mlstm(**inputs), expected)


def test_strided_inputs_give_the_same_result() -> None:
    inputs = random_inputs(B=2, H=2, T=50, Dk=8, seed=16)
    strided = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()
    }
    assert not strided["q"].is_contiguous()
    assert torch.equal(mlstm(**strided), mlstm(**inputs))


def test_zero_keys_give_zero_and_finite_gradients() -> None:
    inputs = random_inputs(B=1, H=2, T=40, Dk=8, seed=17)
    inputs["k"] = torch.zeros_like(inputs["k"]).requires_grad_()
    actual = outputs_and_grads(mlstm, inputs)
    assert all(torch.count_nonzero(x) == 0 for x in actual.values())


def test_the_ratio_has_no_floor() -> None:
    # Scaling q and k down to 1e-15 changes neither the ratio nor dv: an eps in the denominator
    # would.
    inputs = random_inputs(B=1, H=2, T=64, Dk=16, seed=18)
    small = {
        name: (x.detach() * 1e-15 if name in "qk" else x.detach()).requires_grad_()
        for name, x in inputs.items()
    }
    expected, actual = outputs_and_grads(mlstm, inputs), outputs_and_grads(mlstm, small)
    for name in ("h", "dv", "di", "df"):
        assert error_ratio(actual[name], expected[name]) < 2e-6, name


def test_a_single_head_of_one_feature_gives_results_of_their_own_memory() -> None:
    # Views of such a state count as contiguous: without copies torch refuses the operator.
    inputs = random_inputs(B=1, H=1, T=40, Dk=1, Dv=3, seed=26)
    actual = outputs_and_grads(mlstm, inputs)
    expected = outputs_and_grads(lambda **x: mlstm_reference(**x)[0], to_float64(inputs))
    assert expected.pop("dq").abs().max() < 1e-12  # of one feature, the ratio does not depend on q
    assert_close(actual, expected)


def test_incoming_state_is_not_modified() -> None:
    inputs = random_inputs(B=1, H=2, T=40, Dk=8, seed=19)
    state = MLSTMState(
        **{name: x.detach() for name, x in random_state(1, 2, 8, 8, seed=20).items()}
    )
    before = [x.clone() for x in state]
    mlstm(**inputs, state=state)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


def test_traces_into_one_graph() -> None:
    inputs = random_inputs(B=1, H=2, T=40, Dk=8, seed=21)
    compiled = torch.compile(mlstm, backend="aot_eager", fullgraph=True)
    assert_close(outputs_and_grads(compiled, inputs), outputs_and_grads(mlstm, inputs), bound=2e-6)

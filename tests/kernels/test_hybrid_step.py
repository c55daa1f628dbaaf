"""The hybrid decoding step: equal to the sequence operators, in place; torch and Triton."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from xlstm_kernels import MLSTMState, Ring, RingSlots, hybrid_step, mlstm_step, window_step
from xlstm_kernels.dispatch import Backend
from xlstm_kernels.reference import mlstm_reference, sliding_window_reference
from xlstm_kernels.state import held_positions
from xlstm_kernels.testing import error_ratio, random_inputs

D, Dk, Dv = 16, 32, 16
BOUND = 1e-5
BACKENDS: tuple[Backend, ...] = ("torch",)
if importlib.util.find_spec("triton") is not None:
    BACKENDS += ("triton",)


def draw_row(device: str, B: int, H: int, G: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Draw what a mixer computes from `tokens` tokens, (B, heads, T, ...).

    The names are the arguments of hybrid_step, in their order.
    """
    x = {name: t.detach() for name, t in random_inputs(B, H, tokens, Dk, Dv, G, seed=seed).items()}
    draw = torch.Generator().manual_seed(seed)
    row = {
        "q": torch.randn(B, H, tokens, D, generator=draw),
        "k": torch.randn(B, G, tokens, D, generator=draw),
        "v": x["v"],
        "phi_q": x["q"],
        "phi_k": x["k"],
        "i": x["i"],
        "f": x["f"],
        "gate": torch.rand(B, H, tokens, generator=draw),
    }
    return {name: t.to(device) for name, t in row.items()}


def decode(
    row: dict[str, Tensor], window: int, sinks: int, backend: Backend
) -> tuple[Tensor, MLSTMState, Ring]:
    device, (B, H, tokens), G = row["q"].device, row["q"].shape[:3], row["k"].shape[1]
    state = MLSTMState.zeros(B, H, Dk, Dv, device=device)
    ring = Ring.empty(B, G, D, Dv, window=window, sinks=sinks, device=device)
    if backend == "triton":
        # Its kernel reads no empty slot; torch's softmax reads them with weight 0.
        ring.keys.fill_(float("nan"))
        ring.values.fill_(float("nan"))
    addresses = [x.data_ptr() for x in (*state, *ring)]
    outputs = []
    for t in range(tokens):
        token = (x[:, :, t] for x in row.values())
        outputs.append(hybrid_step(*token, state, ring, sinks=sinks, backend=backend))
    assert [x.data_ptr() for x in (*state, *ring)] == addresses
    return torch.stack(outputs, dim=2), state, ring


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_steps(device: str, backend: Backend) -> None:
    row = draw_row(device, 2, 4, 2, 7)
    plain, state, ring = decode(row, 4, 2, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        same, same_state, same_ring = decode(row, 4, 2, backend)
        token = (row[name][:, :, 0] for name in "qkv")
        attended = window_step(*token, Ring(*(x.clone() for x in ring)), sinks=2, backend=backend)
    assert torch.equal(same, plain)
    pairs = zip((*same_state, same_ring.lengths), (*state, ring.lengths), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    token = (row[name][:, :, 0] for name in "qkv")
    assert torch.equal(attended, window_step(*token, ring, sinks=2, backend=backend))


@pytest.mark.parametrize("first", ["fake", "real"])
def test_steps_without_data_leave_those_with_data_alone(first: str) -> None:
    # A window of its own each time: what is kept for later calls is kept by window.
    window = 21 if first == "fake" else 22
    row = draw_row("cpu", 1, 2, 1, 3)

    def fake() -> None:
        with FakeTensorMode() as mode:
            given = {name: mode.from_tensor(x) for name, x in row.items()}
            assert isinstance(decode_without_addresses(given, window), FakeTensor)

    if first == "fake":
        fake()
    expected, _, _ = decode(row, window, 2, "torch")
    if first == "real":
        fake()
    assert torch.equal(decode_without_addresses(row, window), expected)


def decode_without_addresses(row: dict[str, Tensor], window: int) -> Tensor:
    state = MLSTMState.zeros(1, 2, Dk, Dv)
    ring = Ring.empty(1, 1, D, Dv, window=window, sinks=2)
    tokens = [[x[:, :, t] for x in row.values()] for t in range(row["q"].shape[2])]
    return torch.stack([hybrid_step(*x, state, ring, sinks=2) for x in tokens], dim=2)


# Rows and heads; tokens beyond window and sinks, without sinks, with more sinks than window, and
# fewer tokens than slots (74, which two programs of Triton's share).
@pytest.mark.parametrize(
    ("heads", "tokens", "window", "sinks"),
    [((1, 4, 2), 11, 5, 2), ((2, 2, 1), 6, 3, 0), ((1, 2, 1), 12, 4, 6), ((1, 2, 2), 6, 70, 4)],
)
def test_steps_equal_the_sequence_operators(
    device: str, heads: tuple[int, int, int], tokens: int, window: int, sinks: int
) -> None:
    row = draw_row(device, *heads, tokens)
    x = {name: t.double() for name, t in row.items()}
    recalled, final = mlstm_reference(x["phi_q"], x["phi_k"], x["v"], x["i"], x["f"])
    attended = sliding_window_reference(x["q"], x["k"], x["v"], window=window, sinks=sinks)
    expected_out = torch.lerp(attended, recalled, x["gate"].unsqueeze(-1))
    rings = []
    for backend in BACKENDS:
        out, state, ring = decode(row, window, sinks, backend)
        assert error_ratio(out, expected_out) < BOUND, backend
        for actual, expected in zip(state, final, strict=True):
            assert error_ratio(actual, expected) < BOUND, backend
        assert ring.lengths.tolist() == [tokens] * heads[0]
        rings.append(ring)
    # The slots of Triton's ring that are empty hold NaN.
    filled = held_positions(rings[0].lengths, window, sinks) >= 0
    for field, first, last in zip(Ring._fields, rings[0], rings[-1], strict=True):
        if field in ("keys", "values"):
            mask = filled[:, None, :, None]
            first, last = (torch.where(mask, held, 0.0) for held in (first, last))
        assert torch.equal(first, last), field


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_hold_the_sinks_and_the_latest_tokens(device: str, backend: Backend) -> None:
    row = draw_row(device, 1, 1, 1, 11, seed=1)
    _, _, ring = decode(row, 4, 2, backend)
    held = held_positions(ring.lengths, 4, 2)
    assert held[0].tolist() == [0, 1, 8, 9, 10, 7]
    assert torch.equal(ring.keys, row["k"][:, :, held[0]])
    assert torch.equal(ring.values, row["v"][:, :, held[0]])
    assert held_positions(torch.tensor([0, 3], device=device), 4, 2).tolist() == [
        [-1, -1, -1, -1, -1, -1],
        [0, 1, 0, 1, 2, -1],
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_found_once_serve_several_rings(device: str, backend: Backend) -> None:
    rows = [draw_row(device, 2, 4, 2, 9, seed=seed) for seed in (1, 2)]
    before = torch.tensor([0, 5], device=device)  # rows need not be equally long
    states = [MLSTMState.zeros(2, 4, Dk, Dv, device=device) for _ in range(4)]
    rings = [Ring.empty(2, 2, D, Dv, window=4, sinks=2, device=device) for _ in range(4)]
    for ring in rings:
        ring.lengths.copy_(before)
    for t in range(9):
        slots = RingSlots.of(before + t, 4, 2, torch.float32)
        for n, row in enumerate(rows):
            token = [x[:, :, t] for x in row.values()]
            alone = hybrid_step(*token, states[n], rings[n], sinks=2, backend=backend)
            together = hybrid_step(
                *token, states[2 + n], rings[2 + n],
                sinks=2, slots=slots, check=False, backend=backend,
            )  # fmt: skip
            assert torch.equal(alone, together)
    for n in range(2):
        assert torch.equal(rings[n].keys, rings[2 + n].keys)
        assert torch.equal(rings[2 + n].lengths, before)  # the caller's


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_pool_are_stepped_by_index(device: str, backend: Backend) -> None:
    """As the rows alone would be, bit for bit; other rows of the pool stay as they are."""
    row, before = draw_row(device, 2, 4, 2, 5), torch.tensor([0, 3], device=device)
    index, rest = torch.tensor([4, 1], device=device), [0, 2, 3]
    # A request's tensors lie side by side, so the rows of each are far apart.
    pool = torch.randn(5, 4096, generator=torch.Generator().manual_seed(1)).to(device)
    shapes = [(4, Dk, Dv), (4, Dk), (4,), (2, 6, D), (2, 6, Dv)]
    held, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        held.append(pool[:, start : start + size].view(5, *shape))
        start += size
    untouched = pool[rest].clone()
    alone = [x[index].clone() for x in held]
    for t in range(5):
        token = [x[:, :, t] for x in row.values()]
        slots, outputs = RingSlots.of(before + t, 4, 2, torch.float32), []
        for (C, n, m, keys, values), rows in ((alone, None), (held, index)):
            given = (MLSTMState(C, n, m), Ring(keys, values, before))
            settings = {"sinks": 2, "slots": slots, "index": rows, "backend": backend}
            out = hybrid_step(*token, *given, **settings)
            again = mlstm_step(
                token[3], token[4], token[2], *token[5:7], given[0], index=rows, backend=backend
            )
            attended = window_step(*token[:3], given[1], **settings)
            outputs.append(torch.stack([out, again, attended]))
        assert torch.equal(*outputs)
    for mine, theirs in zip(held, alone, strict=True):
        assert torch.equal(mine[index], theirs)
    assert torch.equal(pool[rest], untouched)


def test_a_bad_index_is_refused() -> None:
    token = [x[:, :, 0] for x in draw_row("cpu", 2, 4, 2, 1).values()]
    state = MLSTMState.zeros(3, 4, Dk, Dv)
    ring = Ring.empty(3, 2, D, Dv, window=4, sinks=2)._replace(lengths=torch.zeros(2).long())
    for index, message in (
        (torch.tensor([0]), r"index has shape \(1,\); expected \(B,\) = \(2\)"),
        (torch.tensor([0, 1], dtype=torch.int32), "index has dtype int32; allowed: int64"),
    ):
        with pytest.raises(ValueError, match=f"^hybrid_step: {message}"):
            hybrid_step(*token, state, ring, sinks=2, index=index)
    small = state._replace(C=state.C[:1])
    with pytest.raises(ValueError, match=r"^hybrid_step: state.C has 1 rows, but index names 2"):
        hybrid_step(*token, small, ring, sinks=2, index=torch.tensor([0, 1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_steps_equal_the_sequence_operator(device: str, backend: Backend) -> None:
    row = draw_row(device, 1, 4, 2, 11)
    ring = Ring.empty(1, 2, D, Dv, window=3, sinks=2, device=device)
    outputs = []
    for t in range(11):
        token = (row[name][:, :, t] for name in "qkv")
        outputs.append(window_step(*token, ring, sinks=2, backend=backend))
    q, k, v = (row[name].double() for name in "qkv")
    expected = sliding_window_reference(q, k, v, window=3, sinks=2)
    assert error_ratio(torch.stack(outputs, dim=2), expected) < BOUND
    assert ring.lengths.tolist() == [11]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(2, 3)}, r"gate has shape \(2, 3\); expected \(B, H\) = \(2, 4\)"),
        ({"q": torch.zeros(2, 3, 16)}, r"q has shape \(2, 3, 16\)"),
        ({"k": torch.zeros(2, 2, 8)}, r"k has shape \(2, 2, 8\)"),
        (
            {"phi_k": torch.zeros(2, 4, 8)},
            r"phi_k has shape \(2, 4, 8\); expected \(B, H, Dk\), as phi_q",
        ),
    ],
)
def test_bad_tensors_are_refused(change: dict[str, Tensor], message: str) -> None:
    token = {name: x[:, :, 0] for name, x in draw_row("cpu", 2, 4, 2, 1).items()} | change
    ring = Ring.empty(2, 2, D, Dv, window=4, sinks=2)
    with pytest.raises(ValueError, match=f"^hybrid_step: {message}"):
        hybrid_step(*token.values(), MLSTMState.zeros(2, 4, Dk, Dv), ring, sinks=2)


RING = Ring.empty(2, 2, D, Dv, window=4, sinks=2)
BAD_RINGS = {
    "sinks": (RING, 6, r"sinks=6 is not allowed; the ring's 6 slots hold 0 to 5"),
    "shape": (
        RING._replace(keys=RING.keys[..., :8]),
        2,
        r"ring.keys has shape \(2, 2, 6, 8\)",
    ),
    "dtype of keys": (
        RING._replace(keys=RING.keys.int()),
        2,
        r"ring.keys has dtype int32; allowed: float32, bfloat16",
    ),
    "dtype of lengths": (
        RING._replace(lengths=RING.lengths.int()),
        2,
        r"ring.lengths has dtype int32; allowed: int64",
    ),
}


@pytest.mark.parametrize(("ring", "sinks", "message"), BAD_RINGS.values(), ids=BAD_RINGS.keys())
def test_a_ring_that_does_not_fit_is_refused(ring: Ring, sinks: int, message: str) -> None:
    token = [x[:, :, 0] for x in draw_row("cpu", 2, 4, 2, 1).values()]
    with pytest.raises(ValueError, match=f"^hybrid_step: {message}"):
        hybrid_step(*token, MLSTMState.zeros(2, 4, Dk, Dv), ring, sinks=sinks)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_ring_beyond_32_bits_is_refused_by_triton(device: str) -> None:
    token = {name: x[:, :, 0] for name, x in draw_row(device, 1, 1, 1, 1).items()}
    slots = 2**31 // D
    # Expanded: the tensors have this shape and next to no memory.
    values = torch.zeros(1, device=device).expand(1, 1, slots, D)
    lengths = torch.zeros(1, dtype=torch.int64, device=device)
    state = MLSTMState.zeros(1, 1, Dk, Dv, device=device)
    with pytest.raises(ValueError, match=f"has no kernel for a ring of {slots} slots of 16 values"):
        hybrid_step(
            *token.values(), state, Ring(values, values, lengths),
            sinks=2, backend="triton",
        )  # fmt: skip

"""The Triton kernels at real sizes on a CUDA device: accuracy, state passing, determinism.

Run with `pytest -m gpu`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, Ring, hybrid_step, mlstm, mlstm_step, sliding_window_attention
from xlstm_kernels.testing import (
    error_ratio,
    outputs_and_grads,
    random_inputs,
    random_segments,
    random_state,
)

pytest.importorskip("triton")
from xlstm_kernels.triton.mlstm import mlstm_triton
from xlstm_kernels.triton.window import window_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Of bfloat16: rounding of outputs and gradients (2^-9), and of the weights and states that tensor
# cores multiply.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Tensors = dict[str, Tensor]


def cuda(
    inputs: Tensors, dtype: torch.dtype, wide: tuple[str, ...] = ("i", "f", "C", "n", "m")
) -> Tensors:
    return {
        name: x.detach()
        .to("cuda", torch.float32 if name in wide else dtype)
        .requires_grad_(x.requires_grad)
        for name, x in inputs.items()
    }


def double(inputs: Tensors) -> Tensors:
    """Copy as float64 leaves: the torch backend in float64, itself tested, is the truth here."""
    return {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in inputs.items()}


def with_state(backend: str, ids: Tensor | None):
    def run(C: Tensor, n: Tensor, m: Tensor, **x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, final = mlstm(
            **x, segment_ids=ids, state=MLSTMState(C, n, m), return_state=True, backend=backend
        )
        return h, final.C, final.n

    return run


def assert_close(actual: Tensors, expected: Tensors, bound: float) -> None:
    ratios = {name: error_ratio(actual[name], expected[name]) for name in expected}
    assert all(ratio < bound for ratio in ratios.values()), ratios


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("Dk", "Dv"), [(32, 32), (64, 128), (128, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mlstm_with_states(dtype: torch.dtype, Dk: int, Dv: int, documents: bool) -> None:
    inputs = cuda(
        random_inputs(2, 4, 1037, Dk, Dv, 2, seed=1) | random_state(2, 4, Dk, Dv, seed=2), dtype
    )
    ids = random_segments(2, 1037, mean_length=300, seed=3).cuda() if documents else None
    if ids is not None:
        ids[1] = 0
    actual = outputs_and_grads(with_state("triton", ids), inputs)
    expected = outputs_and_grads(with_state("torch", ids), double(inputs))
    assert_close(actual, expected, BOUNDS.get(dtype, 2e-3))


@pytest.mark.parametrize("offset", [1.0, 3.0, 10.0])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)]
)
def test_mlstm_with_a_common_component(dtype: torch.dtype, bound: float, offset: float) -> None:
    inputs = random_inputs(1, 4, 1024, 64, G=2, seed=5, forget_bias=6.0)
    common = offset * torch.randn(64, generator=torch.Generator().manual_seed(0))
    inputs = cuda(inputs | {"v": (inputs["v"].detach() + common).requires_grad_()}, dtype)
    actual = outputs_and_grads(lambda **x: mlstm(**x, backend="triton"), inputs)
    assert_close(
        actual, outputs_and_grads(lambda **x: mlstm(**x, backend="torch"), double(inputs)), bound
    )


@pytest.mark.parametrize("operator", ["mlstm", "window"])
def test_compiled_equals_eager(operator: str) -> None:
    inputs = cuda(random_inputs(1, 4, 300, 64, seed=14), torch.bfloat16)

    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        if operator == "mlstm":
            return mlstm_triton(q, k, v, i, f, segment_ids=None, state=None)[0]
        out = window_triton(q, k, v, window=100, sinks=4, segment_ids=None, scale=0.125)
        return out + 0.0 * (i + f).unsqueeze(-1)

    compiled = outputs_and_grads(torch.compile(run, fullgraph=True), inputs)
    assert_close(compiled, outputs_and_grads(run, inputs), 1e-6)


def test_more_heads_than_65535() -> None:
    inputs = cuda(random_inputs(4400, 16, 20, 16, seed=15), torch.float32)
    actual = outputs_and_grads(lambda **x: mlstm(**x, backend="triton"), inputs)
    assert_close(
        actual, outputs_and_grads(lambda **x: mlstm(**x, backend="torch"), double(inputs)), 1e-5
    )
    q, k, v = (inputs[name].detach() for name in "qkv")
    windows = [
        sliding_window_attention(q, k, v, window=5, sinks=2, backend=name)
        for name in ("triton", "torch")
    ]
    assert error_ratio(windows[0], windows[1]) < 1e-5


# On a large GPU these few heads run in super-chunks.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlstm_at_16k_tokens(dtype: torch.dtype) -> None:
    inputs = cuda(random_inputs(1, 4, 16384, 128, 128, 1, seed=4, forget_bias=6.0), dtype)
    ids = random_segments(1, 16384, mean_length=3000, seed=5).cuda()
    actual = outputs_and_grads(lambda **x: mlstm(**x, segment_ids=ids, backend="triton"), inputs)
    expected = outputs_and_grads(
        lambda **x: mlstm(**x, segment_ids=ids, backend="torch"), double(inputs)
    )
    assert_close(actual, expected, BOUNDS[dtype])


def test_mlstm_gates_at_60() -> None:
    inputs = random_inputs(1, 2, 500, 64, seed=6)
    draw = torch.Generator().manual_seed(7)
    for name in ("i", "f"):
        inputs[name] = (
            120.0 * torch.randint(0, 2, inputs[name].shape, generator=draw) - 60.0
        ).requires_grad_()
    inputs = cuda(inputs, torch.float32)
    actual = outputs_and_grads(lambda **x: mlstm(**x, backend="triton"), inputs)
    assert_close(
        actual, outputs_and_grads(lambda **x: mlstm(**x, backend="torch"), double(inputs)), 1e-5
    )


def test_mlstm_passes_equal_one_pass() -> None:
    inputs = {
        n: x.detach()
        for n, x in cuda(random_inputs(1, 4, 5000, 128, seed=8), torch.float32).items()
    }
    state, parts = None, []
    for part in zip(*(x.split([1700, 1, 3299], dim=2) for x in inputs.values()), strict=True):
        h, state = mlstm(*part, state=state, return_state=True, backend="triton")
        parts.append(h)
    whole, final = mlstm(**inputs, return_state=True, backend="triton")
    assert error_ratio(torch.cat(parts, dim=2), whole) < 2e-6
    for actual, expected in zip(state, final, strict=True):
        assert error_ratio(actual, expected) < 2e-6


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("D", "window", "sinks"),
    [(64, 512, 4), (128, 512, 4), (128, 100, 0), (256, 64, 17), (32, 1, 2)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window(dtype: torch.dtype, D: int, window: int, sinks: int, documents: bool) -> None:
    draw = torch.Generator().manual_seed(D)
    shapes = {"q": (2, 4, 2055, D), "k": (2, 2, 2055, D), "v": (2, 2, 2055, D)}
    inputs = cuda(
        {n: torch.randn(s, generator=draw).requires_grad_() for n, s in shapes.items()}, dtype
    )
    settings = {
        "window": window,
        "sinks": sinks,
        "segment_ids": random_segments(2, 2055, mean_length=700, seed=1).cuda()
        if documents
        else None,
    }
    actual = outputs_and_grads(
        lambda **x: sliding_window_attention(**x, **settings, backend="triton"), inputs
    )
    expected = outputs_and_grads(
        lambda **x: sliding_window_attention(**x, **settings, backend="torch"), double(inputs)
    )
    assert_close(actual, expected, BOUNDS[dtype])


@pytest.mark.parametrize("operator", ["mlstm", "mlstm in super-chunks", "window"])
def test_two_runs_give_the_same_bits(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLSTM_KERNELS_SUPER_CHUNKS", "3" if "super" in operator else "1")
    inputs = cuda(random_inputs(2, 8, 3000, 128, 128, 2, seed=9), torch.bfloat16)
    ids = random_segments(2, 3000, mean_length=500, seed=10).cuda()

    def run(**x: Tensor) -> Tensor:
        if operator.startswith("mlstm"):
            return mlstm(**x, segment_ids=ids, backend="triton")
        return sliding_window_attention(**x, window=512, sinks=4, segment_ids=ids, backend="triton")

    if operator == "window":
        inputs = {
            "q": inputs["q"],
            "k": inputs["v"].detach().clone().requires_grad_(),
            "v": inputs["v"],
        }
    first, second = outputs_and_grads(run, inputs), outputs_and_grads(run, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hybrid_steps_equal_the_torch_steps(dtype: torch.dtype) -> None:
    B, H, G, D = 8, 32, 8, 128
    x = {n: t.detach() for n, t in cuda(random_inputs(B, H, 40, D, D, G, seed=11), dtype).items()}
    draw = torch.Generator().manual_seed(12)
    k = torch.randn(B, G, 40, D, generator=draw).to("cuda", dtype)
    gate = torch.rand(B, H, 40, generator=draw).cuda()
    outputs = []
    for backend in ("torch", "triton"):
        state = MLSTMState.zeros(B, H, D, D, device="cuda")
        ring = Ring.empty(B, G, D, D, window=16, sinks=4, dtype=dtype, device="cuda")
        row = (x["q"], k, x["v"], x["q"], x["k"], x["i"], x["f"], gate)
        steps = []
        for token in zip(*(t.unbind(2) for t in row), strict=True):
            steps.append(hybrid_step(*token, state, ring, sinks=4, backend=backend))
        outputs.append((torch.stack(steps), state, ring))
    assert error_ratio(outputs[1][0], outputs[0][0]) < BOUNDS[dtype]
    assert error_ratio(outputs[1][1].C, outputs[0][1].C) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][2], outputs[1][2], strict=True))


def test_mlstm_steps_race_free() -> None:
    x = {
        n: t.detach()
        for n, t in cuda(random_inputs(64, 32, 4, 128, 128, 8, seed=13), torch.bfloat16).items()
    }
    finals = []
    for _ in range(5):
        state = MLSTMState.zeros(64, 32, 128, 128, device="cuda")
        tokens = zip(*(t.unbind(2) for t in x.values()), strict=True)
        h = [mlstm_step(*token, state, backend="triton") for token in tokens]
        finals.append((torch.stack(h), *state))
    for final in finals[1:]:
        assert all(torch.equal(a, b) for a, b in zip(final, finals[0], strict=True))


def test_hybrid_steps_give_the_same_bits_whichever_program_is_last() -> None:
    draw = torch.Generator().manual_seed(3)
    shapes = [(8, 32, 128), (8, 8, 128), (8, 8, 128), (8, 32, 128), (8, 32, 128)]
    q, k, v, phi_q, phi_k = (
        torch.rand(shape, generator=draw).to("cuda", torch.bfloat16) for shape in shapes
    )
    i, f, gate = torch.rand(3, 8, 32, generator=draw).cuda()

    def run() -> list[Tensor]:
        state = MLSTMState.zeros(8, 32, 128, 128, device="cuda")
        kind = {"dtype": torch.bfloat16, "device": "cuda"}
        ring = Ring.empty(8, 8, 128, 128, window=512, sinks=4, **kind)
        token = (q, k, v, phi_q, phi_k, i, f, gate)
        outputs = [hybrid_step(*token, state, ring, sinks=4, backend="triton") for _ in range(600)]
        assert ring.lengths.tolist() == [600] * 8
        return [*outputs, *state, *ring]

    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))

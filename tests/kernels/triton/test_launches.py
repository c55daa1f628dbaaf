"""How the Triton operators start their kernels.

Grids, only the gradients asked for, autograd, and torch.compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from xlstm_kernels import MLSTMState, Ring, hybrid_step, mlstm, mlstm_step, sliding_window_attention
from xlstm_kernels.testing import error_ratio, outputs_and_grads, random_inputs

pytest.importorskip("triton")
from xlstm_kernels.triton import (
    common,
    mlstm_backward,
    mlstm_forward,
    window_kernels,
    window_sinks,
)

MODULES = (common, mlstm_forward, mlstm_backward, window_kernels, window_sinks)
CUT = "XLSTM_KERNELS_SUPER_CHUNKS"
Log = list[tuple[str, tuple[int, ...]]]


class Logged:
    """A kernel that writes its name and grid down and starts."""

    def __init__(self, name: str, kernel: Any, log: Log) -> None:
        self.name, self.kernel, self.log = name, kernel, log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.log.append((self.name.removesuffix("_kernel"), grid))
        return self.kernel[grid]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Names and grids of the kernels, in the order of their starts."""
    entries: Log = []
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Logged(name, getattr(module, name), entries))
    return entries


def backward_names(out: Tensor, log: Log) -> set[str]:
    log.clear()
    out.float().sum().backward()
    return {name for name, _ in log}


@pytest.mark.parametrize("cut", ["1", "2"])
@pytest.mark.parametrize(
    ("trained", "left_out"),
    [
        ("qkif", set()),
        ("v", {"gate_grad", "state_end"}),
        ("qkvif", set()),
    ],
)
def test_mlstm_computes_the_gradients_asked_for(
    device: str,
    log: Log,
    trained: str,
    left_out: set[str],
    cut: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CUT, cut)
    tokens = 20 if cut == "1" else 70  # two chunks
    inputs = {n: x.detach().to(device) for n, x in random_inputs(1, 2, tokens, 16, G=1).items()}
    for name in trained:
        inputs[name].requires_grad_()
    names = backward_names(mlstm(**inputs, backend="triton"), log)
    every = {"denominator", "state_grad", "token_grad", "gate_grad"}
    if cut == "2":
        every |= {"state_end", "state_grad_end"}
    assert names == every - left_out
    # One (16, 16) tile a head and super-chunk walks back; as many walk forward, for all but v.
    (grid,) = [grid for name, grid in log if name == "state_grad"]
    assert grid == (2 * int(cut) * (1 if trained == "v" else 2),)
    assert all((x.grad is not None) == (name in trained) for name, x in inputs.items())


def saved_for(trained: str, inputs: dict[str, Tensor]) -> int:
    """Numbers that the mLSTM keeps if one input is trained."""
    leaves = {n: x.detach().requires_grad_(n == trained) for n, x in inputs.items()}
    saved = mlstm(**leaves, backend="triton").grad_fn.saved_tensors
    return sum(x.numel() for x in saved if x is not None)


@pytest.mark.parametrize(("dtype", "cut"), [(torch.float32, "2"), (torch.bfloat16, "1")])
def test_kept_states_give_the_same_bits_with_less_work(
    device: str,
    log: Log,
    dtype: torch.dtype,
    cut: str,
    monkeypatch: pytest.MonkeyPatch,
    gpu_arithmetic: None,
) -> None:
    monkeypatch.setenv(CUT, cut)
    drawn = random_inputs(1, 2, 150, 16, G=1)
    x = {n: t.to(device, t.dtype if n in "if" else dtype) for n, t in drawn.items()}
    ids = torch.tensor([[0] * 60 + [1] * 90], device=device)

    def run() -> dict[str, Tensor]:
        log.clear()
        return outputs_and_grads(
            lambda **x: mlstm(**x, segment_ids=ids, backend="triton"),
            {name: t.detach().requires_grad_() for name, t in x.items()},
        )

    again, launches = run(), list(log)
    monkeypatch.setenv("XLSTM_KERNELS_KEEP_STATES", "1")
    kept = run()
    assert all(torch.equal(kept[name], again[name]) for name in again)
    # The backward pass walks forward no more: half the programs, and no ends of super-chunks.
    at = [name for name, _ in launches].index("state_grad")
    launches[at] = ("state_grad", (launches[at][1][0] // 2,))
    if cut == "2":
        assert launches.pop(at - 1)[0] == "state_end"
    assert log == launches
    assert len(log) == (10 if cut == "2" else 8)
    assert saved_for("v", x) < saved_for("k", x)  # the gradient of v reads no states
    monkeypatch.setenv("XLSTM_KERNELS_KEEP_STATES", "yes")
    with pytest.raises(
        ValueError, match=r"^XLSTM_KERNELS_KEEP_STATES='yes' is not allowed; allowed: 0, 1"
    ):
        run()


@pytest.mark.parametrize("given", ["0", "-1", "all", "2.0"])
def test_a_wrong_number_of_super_chunks_is_refused(
    device: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {n: x.to(device) for n, x in random_inputs(1, 1, 5, 16).items()}
    monkeypatch.setenv(CUT, given)
    with pytest.raises(ValueError, match=f"^{CUT}='{given}' is not allowed; allowed: auto, or a "):
        mlstm(**inputs, backend="triton")


@pytest.mark.parametrize(
    ("trained", "sinks", "expected"),
    [
        ("q", 2, {"mean_grad", "query_grad"}),
        ("kv", 2, {"mean_grad", "key_value_grad", "sink_part", "sink_sum", "sink_grad"}),
        ("kv", 0, {"mean_grad", "key_value_grad"}),
    ],
)
def test_window_computes_the_gradients_asked_for(
    device: str, log: Log, trained: str, sinks: int, expected: set[str]
) -> None:
    inputs = {name: torch.randn(1, 1, 40, 16, device=device) for name in "qkv"}
    for name in trained:
        inputs[name].requires_grad_()
    out = sliding_window_attention(**inputs, window=5, sinks=sinks, backend="triton")
    assert backward_names(out, log) == expected
    assert all((x.grad is not None) == (name in trained) for name, x in inputs.items())


def test_no_grid_dimension_that_ends_at_65535_grows(
    device: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = []
    monkeypatch.setenv(CUT, "2")
    for heads, tokens in ((1, 70), (3, 70), (1, 134)):  # more heads, and more chunks
        log.clear()
        inputs = {n: x.to(device) for n, x in random_inputs(1, heads, tokens, 16).items()}
        h = mlstm(**inputs, backend="triton")
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        (
            h + sliding_window_attention(q, k, v, window=5, sinks=2, backend="triton")
        ).sum().backward()
        rest.append([(name, grid[1:]) for name, grid in log])
    assert rest[0] == rest[1] == rest[2]


def token(device: str) -> list[Tensor]:
    return [x.detach()[:, :, 0].to(device) for x in random_inputs(1, 2, 1, 16, seed=3).values()]


def test_a_step_in_place_is_seen_by_autograd(device: str) -> None:
    inputs = {
        n: x.detach().to(device).requires_grad_() for n, x in random_inputs(1, 2, 20, 16).items()
    }
    state = MLSTMState(*(torch.ones_like(x) for x in MLSTMState.zeros(1, 2, 16, 16, device=device)))
    h = mlstm(**inputs, state=state, backend="triton")
    mlstm_step(*token(device), state, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_steps_count_as_changes_of_state_and_ring_outside_inference_mode(device: str) -> None:
    q, k, v, i, f = token(device)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            state = MLSTMState.zeros(1, 2, 16, 16, device=device)
            ring = Ring.empty(1, 2, 16, 16, window=4, sinks=1, device=device)
            before = [x._version for x in (*state, *ring)] if not state.C.is_inference() else None
            hybrid_step(q, k, v, q, k, i, f, i, state, ring, sinks=1, backend="triton")
            if before is not None:
                assert all(x._version > old for x, old in zip((*state, *ring), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_step_attends_to_keys_as_the_ring_holds_them(device: str, dtype: torch.dtype) -> None:
    outputs = []
    for backend in ("torch", "triton"):
        draw = torch.Generator().manual_seed(0)
        state = MLSTMState.zeros(1, 2, 16, 16, device=device)
        ring = Ring.empty(1, 2, 16, 16, window=4, sinks=2, dtype=dtype, device=device)
        for _ in range(10):
            q, k, v, phi_q, phi_k = (
                2 * torch.randn(1, 2, 16, generator=draw).to(device) for _ in range(5)
            )
            i, f = torch.randn(2, 1, 2, generator=draw).to(device)
            step = (q, k, v, phi_q.exp(), phi_k.exp(), i, f, torch.full_like(i, 0.2))
            outputs.append(hybrid_step(*step, state, ring, sinks=2, backend=backend))
    assert error_ratio(torch.stack(outputs[10:]), torch.stack(outputs[:10])) < 1e-6


def test_a_strided_state_is_stepped_without_a_copy(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {n: x.detach().to(device) for n, x in random_inputs(1, 2, 20, 16).items()}
    _, state = mlstm(**inputs, return_state=True, backend="torch")
    memory = torch.cat([state.C, state.n.unsqueeze(-1)], dim=-1)  # as one tensor may hold both
    state = state._replace(C=memory[..., :-1], n=memory[..., -1])
    assert not state.C.is_contiguous()
    expected = mlstm_step(*token(device), MLSTMState(*(x.clone() for x in state)), backend="torch")
    copied, copy = [], Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda x, y: copied.append(x.shape) or copy(x, y))
    assert error_ratio(mlstm_step(*token(device), state, backend="triton"), expected) < 1e-5
    assert state.C.shape not in copied


# Without a GPU, dynamo does not look for Triton kernels; the graph is captured and never run.
COMPILED = """
import torch
import torch.utils._triton
torch.utils._triton.has_triton = lambda: True
from xlstm_kernels.state import MLSTMState, Ring
from xlstm_kernels.testing import random_inputs
from xlstm_kernels.triton.mlstm import mlstm_triton
from xlstm_kernels.triton.step import hybrid_step_triton, mlstm_step_triton
from xlstm_kernels.triton.window import window_triton

def capture(graph, _):
    raise RuntimeError("captured")

x = {n: t.detach() for n, t in random_inputs(1, 2, 70, 32).items()}
q, k, v, i, f = (t[:, :, 0].contiguous() for t in x.values())
state, ring = MLSTMState.zeros(1, 2, 32, 32), Ring.empty(1, 2, 32, 32, window=4, sinks=2)
calls = {
    "mlstm": lambda: mlstm_triton(**x, segment_ids=None, state=None)[0],
    "window": lambda: window_triton(
        x["q"], x["k"], x["v"], window=5, sinks=2, segment_ids=None, scale=1.0
    ),
    "step": lambda: mlstm_step_triton(q, k, v, i, f, state),
    "hybrid": lambda: hybrid_step_triton(
        q, k, v, q, k, i, f, i, state, ring, None, sinks=2, scale=1.0
    ),
}
for grads in (False, True):
    for t in x.values():
        t.requires_grad_(grads)
    for name, call in calls.items():
        torch._dynamo.reset()
        try:
            torch.compile(call, backend=capture, fullgraph=True)()
        except Exception as error:
            print(name, "captured" if "captured" in str(error) else str(error)[:1500])
"""


def test_dynamo_traces_every_operator_and_its_gradients_in_one_graph() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    captured = [f"{name} captured" for name in ("mlstm", "window", "step", "hybrid")]
    assert done.stdout.splitlines() == 2 * captured, done.stdout

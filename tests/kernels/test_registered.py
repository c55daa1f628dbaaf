"""The operators as torch.library has them: one node forward, one backward, whatever T is."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_kernels import mlstm, sliding_window_attention
from xlstm_kernels.testing import (
    error_ratio,
    outputs_and_grads,
    random_inputs,
    random_segments,
    random_state,
)

NO_TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
BACKENDS = ["torch", pytest.param("triton", marks=NO_TRITON)]
Inputs = dict[str, Tensor]


def inputs_of(tokens: int, device: str = "cpu") -> Inputs:
    inputs = random_inputs(B=2, H=4, T=tokens, Dk=16, G=2, seed=tokens)
    return {name: x.detach().to(device).requires_grad_() for name, x in inputs.items()}


def mixed(backend: Any, ids: Tensor | None = None) -> Callable[..., Tensor]:
    """Both operators, as the mixer calls them."""

    def run(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        recalled = mlstm(q, k, v, i, f, segment_ids=ids, backend=backend)
        settings = {"window": 8, "sinks": 2, "segment_ids": ids, "backend": backend}
        return recalled + sliding_window_attention(q, k[:, :2], v, **settings)

    return run


def traced(backend: Any, tokens: int, device: str) -> tuple[list[str], list[int], Inputs]:
    """Compile; return our operators in the graphs, the graphs' sizes, and outputs and gradients."""
    ours: list[str] = []
    sizes: list[int] = []

    def inspect(graph: torch.fx.GraphModule, _: Any) -> Any:
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        ours.extend(name for name in calls if name.startswith("xlstm_kernels"))
        sizes.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        mixed(backend), backend=aot_autograd(fw_compiler=inspect), fullgraph=True, dynamic=False
    )
    return ours, sizes, outputs_and_grads(compiled, inputs_of(tokens, device))


@pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("triton", marks=[NO_TRITON, pytest.mark.slow])],  # interpreted: a minute
)
def test_a_compiled_graph_holds_one_node_for_each_pass(backend: str, device: str) -> None:
    passes = [f"{operator}_{backend}" for operator in ("mlstm", "window")]
    passes += [f"{name}_backward" for name in passes]
    expected = [f"xlstm_kernels.{name}.default" for name in passes]
    sizes = []
    for tokens in (40, 150):
        ours, size, found = traced(backend, tokens, device)
        assert sorted(ours) == sorted(expected)
        sizes.append(size)
        plain = outputs_and_grads(mixed(backend), inputs_of(tokens, device))
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert sizes[0] == sizes[1]


def arguments(backend: str, device: str, requires_grad: bool) -> Iterator[tuple[Any, tuple]]:
    """Arguments of every registered operator, forward and backward."""
    x = {n: t.detach().requires_grad_(requires_grad) for n, t in inputs_of(37, device).items()}
    start = {n: t.detach().to(device) for n, t in random_state(2, 4, 16, 16).items()}
    ids = random_segments(2, 37, mean_length=12).to(device)
    dh, q, k, v = torch.ones(2, 4, 37, 16, device=device), x["q"], x["k"][:, :2], x["v"]
    plain = [t.detach() for t in (*x.values(), *start.values())]
    logits = torch.linspace(-1, 1, 4, device=device).requires_grad_(requires_grad)
    if backend == "torch":
        from xlstm_kernels.torch import bounded, chunkwise, tiles, window

        given = (*x.values(), ids, *start.values(), True)
        yield chunkwise.forward, given
        _, C, n, _, *kept = chunkwise.forward(*plain[:5], ids, *plain[5:], True)
        yield chunkwise.backward, (dh, C, n, *plain[:5], *kept, True)
        yield window.forward, (q, k, v, ids, 8, 2, 0.25)
        out, statistics = window.forward(q.detach(), k.detach(), v.detach(), ids, 8, 2, 0.25)
        rows = (q.detach(), k.detach(), v.detach(), ids, out, statistics)
        yield window.backward, (dh, *rows, 8, 2, 0.25)
        yield tiles.forward, (q, k, v, 8, 2, 0.25)
        yield tiles.backward, (dh, *rows[:3], 8, 2, 0.25)
        settings = (8, 2, 0.25, 5.0)
        yield bounded.forward, (q, k, v, ids, logits, *settings)
        rows = (q.detach(), k.detach(), v.detach(), ids, logits.detach())
        yield bounded.backward, (dh, *rows, *bounded.forward(*rows, *settings), *settings)
        return
    from xlstm_kernels.segments import document_runs, document_starts
    from xlstm_kernels.triton import mlstm as chunks
    from xlstm_kernels.triton import window as bands
    from xlstm_kernels.triton.configs import mlstm_config, window_config

    runs = document_runs(ids).int()
    starts = document_starts(runs).int()
    numbers = mlstm_config(torch.float32, 16, 16).numbers()
    for keep_states, cut in ((False, 1), (True, 2)):
        settings = (numbers, True, keep_states, cut)
        yield chunks.forward, (*x.values(), *start.values(), runs, *settings)
        _, C, n, _, *kept = chunks.forward(*plain, runs, *settings)
        yield chunks.backward, ([dh, C, n], plain, runs, kept, numbers, True, False, cut)
    k = k.detach().contiguous().requires_grad_(requires_grad)
    config = list(window_config(torch.float32, 16))
    for softcap, sink_logits in ((0.0, None), (5.0, logits)):
        settings = (8, 2, 0.25, softcap, config)
        yield bands.forward, (q, k, v, runs, starts, sink_logits, *settings)
        held = None if sink_logits is None else sink_logits.detach()
        rows = (q.detach(), k.detach(), v.detach(), runs, starts, held)
        found, wanted = bands.forward(*rows, *settings), (True, True, held is not None)
        yield bands.backward, (dh, *rows, *found, *settings, *wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_passes_opcheck(backend: str, device: str) -> None:
    for operator, given in arguments(backend, device, requires_grad=True):
        torch.library.opcheck(operator, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["mlstm", "sliding_window_attention"])
def test_a_second_derivative_raises(backend: Any, operator: str, device: str) -> None:
    x = inputs_of(20, device)
    if operator == "mlstm":
        out = mlstm(**x, backend=backend)
    else:
        out = sliding_window_attention(x["q"], x["k"], x["q"], window=5, sinks=1, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), x["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{operator}: second derivatives are not"):
        grad.sum().backward()


@pytest.mark.parametrize("operator", ["mlstm", "sliding_window_attention"])
def test_a_forward_mode_derivative_raises(operator: str) -> None:
    # torch itself would return one of 0.
    x = {name: t.detach() for name, t in inputs_of(20, "cpu").items()}

    def call(q: Tensor) -> Tensor:
        if operator == "mlstm":
            return mlstm(**x | {"q": q})
        return sliding_window_attention(q, x["k"], x["q"], window=5, sinks=1)

    with pytest.raises(NotImplementedError, match=f"^{operator}: forward-mode derivatives"):
        torch.func.jvp(call, (x["q"],), (x["q"],))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_reaches_neither_pass(backend: Any, device: str) -> None:
    x = inputs_of(70, device)
    expected = outputs_and_grads(mixed(backend), x)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = outputs_and_grads(mixed(backend), x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_and_dtypes_without_data(where: str, dtype: torch.dtype) -> None:
    def run(inputs: Inputs) -> Inputs:
        ids = torch.zeros(2, 70, dtype=torch.int64, device=inputs["q"].device)
        h = mixed("torch", ids)(**inputs)
        # A window that holds all rows: torch's causal attention, and bands of one document.
        q, k, v = inputs["q"], inputs["k"][:, :2], inputs["v"]
        h = h + sliding_window_attention(q, k, v, window=70, sinks=2, backend="torch")
        h = h + sliding_window_attention(q, k, v, window=16, sinks=2, backend="torch")
        _, state = mlstm(**inputs, return_state=True, backend="torch")
        h.sum().backward()
        grads = {name: x.grad for name, x in inputs.items() if x.grad is not None}
        return grads | {"h": h} | state._asdict()

    def leaves(device: str) -> Inputs:
        given = {n: x.detach().to(device=device, dtype=dtype) for n, x in inputs_of(70).items()}
        return {name: x.requires_grad_() for name, x in given.items()}

    expected = run(leaves("cpu"))
    if where == "meta":
        actual = run(leaves("meta"))
    else:
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(x.detach()) for name, x in leaves("cpu").items()}
            actual = run({name: x.requires_grad_() for name, x in fake.items()})
    facts = {name: (x.shape, x.dtype, x.stride()) for name, x in expected.items()}
    assert {name: (x.shape, x.dtype, x.stride()) for name, x in actual.items()} == facts


# A window above most lengths, and shorter ones.
@pytest.mark.parametrize("window", [512, 64, 8])
def test_an_exported_program_serves_any_length(window: int) -> None:
    class Mixed(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
            h = mlstm(q, k, v, i, f, backend="torch")
            settings = {"window": window, "sinks": 2, "backend": "torch"}
            return h + sliding_window_attention(q, k, v, **settings)

    def row(tokens: int) -> tuple[Tensor, ...]:
        inputs = random_inputs(B=1, H=2, T=tokens, Dk=16, Dv=16, G=2, seed=tokens)
        return tuple(x.detach() for x in inputs.values())

    tokens = torch.export.Dim("tokens", min=65, max=4096)
    shapes = {name: {2: tokens} for name in "qkvif"}
    program = torch.export.export(Mixed(), row(100), dynamic_shapes=shapes).module()
    for length in (65, 100, 511, 600):
        plain = Mixed()(*row(length))  # first, so that its plan of the window is kept
        assert error_ratio(program(*row(length)), plain) < 1e-6


class Reads(TorchDispatchMode):
    """Count the operations that read a value of a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_value_is_read_on_the_host(backend: Any, device: str) -> None:
    x, ids = inputs_of(40, device), random_segments(2, 40, mean_length=12).to(device)
    with Reads() as seen:
        mixed(backend, ids)(**x).sum().backward()
    assert seen.reads == []


def graph_nodes(out: Tensor) -> int:
    """Count the nodes of the autograd graph behind a tensor."""
    seen, open_nodes = set(), [out.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        open_nodes.extend(following for following, _ in node.next_functions)
    return len(seen)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_autograd_graph_does_not_grow_with_tokens(backend: Any, device: str) -> None:
    few, many = (
        graph_nodes(mlstm(**inputs_of(tokens, device), backend=backend)) for tokens in (33, 200)
    )
    assert few == many
    assert few <= 8  # ours, and the leaves


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc 2.33 or later")
@pytest.mark.parametrize("called", [True, False], ids=["after-a-call", "without"])
def test_what_a_call_frees_is_kept_for_the_next(called: bool) -> None:
    # In a process of its own: others' allocations raise the same bounds.
    code = f"""if True:
        import ctypes, torch
        from xlstm_kernels import mlstm
        from xlstm_kernels.testing import random_inputs

        class Memory(ctypes.Structure):  # struct mallinfo2; the ninth is what the heap has free
            _fields_ = [(str(n), ctypes.c_size_t) for n in range(10)]

        def free():
            glibc.mallinfo2.restype = Memory
            return getattr(glibc.mallinfo2(), "8")

        glibc = ctypes.CDLL(None)
        if {called}:
            mlstm(**random_inputs(B=1, H=1, T=4, Dk=4, seed=0))
        before = free()
        torch.ones(5 * 2**20)  # 20 MiB
        print(free() - before)
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(run.stdout) > 15 * 2**20) is called

"""Offsets are 64-bit: kernels read and write beyond 2^31 elements of a tensor.

A tensor of that size is a file with holes, which takes no room. Every kernel is recorded on a small
case. Then it runs again where the case lies at the end of a very long row, or in the last of very
many rows; its programs are told that those of the other tokens or rows come before them. It has to
write the same bits. So all offsets are the kernel's own, from the program's number on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from xlstm_kernels.testing import random_inputs

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from xlstm_kernels import MLSTMState, Ring, hybrid_step, mlstm_step  # noqa: E402
from xlstm_kernels.triton import (  # noqa: E402
    common,
    mlstm_backward,
    mlstm_forward,
    step_kernels,
    window_kernels,
    window_sinks,
)
from xlstm_kernels.triton.configs import Launch, MLSTMConfig, TokenLaunch, WindowConfig  # noqa: E402
from xlstm_kernels.triton.mlstm import mlstm_triton  # noqa: E402
from xlstm_kernels.triton.window import window_triton  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the GPU's memory has no holes; the interpreter shows it"
)
MODULES = (common, mlstm_forward, mlstm_backward, window_kernels, window_sinks, step_kernels)
# Over the chunks of a row, one after the other.
WALKS = ("centre_kernel", "state_kernel", "state_end_kernel", "state_grad_kernel")
WALKS += ("state_grad_end_kernel",)
STEPS = ("step_kernel", "hybrid_step_kernel")
CHUNK, DIM, HEADS, SINKS = 16, 16, 2, 8
TOKENS, WINDOW_TOKENS = 20, 52  # two chunks, four blocks
SLOTS = 16  # of the steps' ring
FAR_CHUNKS = 2**23  # before the case: 2^27 tokens of 16 features
FAR_GATES = 2**26  # for kernels that read no features: 2^30 tokens of 2 heads
# Rows before the case: of 2 heads, 2 chunks and 16 x 16 features; of 16 slots and 16 features.
FAR_ROWS = dict.fromkeys(WALKS, 2**22) | dict.fromkeys(STEPS, 2**23)
LIMIT = 2**31


class Recorded(NamedTuple):
    """A launch: the kernel, its grid, and its arguments before and after."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def chunks(self) -> int:
        """The chunks or blocks of a row."""
        return -(-self.before["T"] // CHUNK)


class Recording:
    """A kernel that runs and writes down what it got and what it wrote."""

    def __init__(self, name: str, kernel: Any, log: list[Recorded]) -> None:
        self.name, self.kernel, self.log = name, kernel, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            before = copied(arguments)
            self.kernel[grid](**arguments)
            self.log.append(Recorded(self.name, self.kernel, grid, before, copied(arguments)))

        return launch


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: x.detach().clone() if isinstance(x, Tensor) else x for n, x in arguments.items()}


def record(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[Recorded]:
    log: list[Recorded] = []
    with monkeypatch.context() as patch:
        for module in MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recording(name, getattr(module, name), log))
        run()
    return log


def with_holes(shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> Tensor:
    """Zeros that take no memory until they are written."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def longer_axis(launch: Recorded, name: str, x: Tensor) -> int | None:
    """The axis of tokens or chunks; None if a tensor has neither."""
    if name in ("C_ptr", "C_scale_ptr", "n_ptr", "dC_ptr", "dC_scale_ptr", "dn_ptr"):
        return 1
    if name in ("d_pass_ptr", "v_parts_ptr"):
        return 2
    if name in ("sink_dk_ptr", "sink_dv_ptr"):
        return 2
    tokens = launch.before["T"]
    return x.shape.index(tokens) if tokens in x.shape else None


def placed(x: Tensor, axis: int, front: int, path: Path) -> Tensor:
    """x at the end of a longer tensor: `front` entries of `axis` come before it."""
    shape = list(x.shape)
    shape[axis] += front
    long = with_holes(tuple(shape), x.dtype, path)
    long.narrow(axis, front, x.shape[axis]).copy_(x)
    return long


def strides_of(arguments: dict[str, Any]) -> dict[str, int]:
    named = {}
    for name in "qkv":
        if f"{name}_t" in arguments:
            x = arguments[f"{name}_ptr"]
            named |= {f"{name}_{letter}": x.stride(axis) for axis, letter in enumerate("bht")}
    return named


def far_arguments(launch: Recorded, tmp_path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The launch's arguments with its tensors far out; and the axis along which each one is."""
    arguments, axes = dict(launch.before), {}
    rows, chunks = FAR_ROWS.get(launch.name), far_chunks(launch)
    for name, x in launch.before.items():
        if not isinstance(x, Tensor) or not x.numel():
            continue
        path = tmp_path / f"{launch.name}-{name}"
        if name == "arrived_ptr":  # of each group, then of each row
            assert rows is not None
            arguments[name] = with_holes((2 * (rows + 1) * HEADS,), x.dtype, path)
            continue
        axis = longer_axis(launch, name, x) if rows is None else 0
        if axis is None:
            continue
        if rows is not None:  # tensors by chunk have rows and heads in one axis
            front = rows * (HEADS if x.shape[0] == HEADS else 1)
        else:
            front = chunks * (1 if x.shape[axis] == launch.chunks else CHUNK)
        axes[name] = axis
        arguments[name] = placed(x, axis, front, path)
        if name == "m_ptr" and rows is None and "m0_ptr" in arguments:
            # The first chunk's state has this stabiliser; here a token stands before it.
            arguments[name][:, :, front - 1] = launch.before["m0_ptr"]
        if name == "starts_ptr":
            arguments[name][:, front:] += front
        if name == "runs_ptr" and rows is None:
            arguments[name][:, front - 1] = x[:, 0] if "m0_ptr" in arguments else 0
    if rows is None:
        arguments["T"] += chunks * CHUNK
        for name in ("chunks", "blocks"):
            if name in arguments:
                arguments[name] += chunks
    return arguments | strides_of(arguments), axes


def far_chunks(launch: Recorded) -> int:
    return FAR_GATES if launch.name == "gate_grad_kernel" else FAR_CHUNKS


def programs_before(launch: Recorded) -> int:
    """The programs of the rows, or of the chunks, that lie before the case."""
    rows = FAR_ROWS.get(launch.name)
    if rows is None:
        of_heads = launch.before.get("heads", 0)  # the last ones, one a head and not one a chunk
        return (launch.grid[0] - of_heads) // launch.chunks * far_chunks(launch)
    return launch.grid[0] * rows


def tell_programs(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Tell programs that so many others come before them."""
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def number(value: int) -> Any:
        return interpreter.TensorHandle(np.array([value], dtype=np.int32), tl.int32)

    def program_id(self: Any, axis: int) -> Any:
        return number(self.grid_idx[axis] + (before if axis == 0 else 0))

    def num_programs(self: Any, axis: int) -> Any:
        return number(self.grid_dim[axis] + (before if axis == 0 else 0))

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program_id)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_num_programs", num_programs)


def assert_same_far_out(
    log: list[Recorded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run every launch again, where one tensor at least passes the limit."""
    for launch in log:
        arguments, axes = far_arguments(launch, tmp_path)
        tell_programs(monkeypatch, programs_before(launch))
        launch.kernel[launch.grid](**arguments)
        for name, axis in axes.items():
            # Positions, which are others out there; and what a step counts at `lengths_ptr`.
            if name in ("starts_ptr", "before_ptr"):
                continue
            found, expected = arguments[name], launch.after[name]
            front = found.shape[axis] - expected.shape[axis]
            written = found.narrow(axis, front, expected.shape[axis])
            assert torch.equal(written.nan_to_num(7.0), expected.nan_to_num(7.0)), (
                launch.name, name,
            )  # fmt: skip
        assert any(arguments[name].numel() > LIMIT for name in axes), launch.name


@pytest.mark.slow
@pytest.mark.parametrize(("super_chunks", "launches"), [(1, 8), (2, 11)])
def test_every_kernel_of_the_mlstm(
    super_chunks: int, launches: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inputs = random_inputs(1, HEADS, TOKENS, DIM, G=1, seed=1)
    settings = [Launch(16, 16, 4, 1)] * 3
    config = MLSTMConfig(CHUNK, CHUNK, *settings, TokenLaunch(16, 16, 4, 1))
    row = {"segment_ids": (torch.arange(TOKENS) >= 9).long()[None] + 1, "state": None}

    def run() -> None:
        h, final = mlstm_triton(**inputs, **row, config=config, cut=super_chunks)
        (h.sum() + final.C.sum()).backward()

    log = record(monkeypatch, run)
    assert len(log) == launches
    assert_same_far_out(log, monkeypatch, tmp_path)


@pytest.mark.slow
def test_every_kernel_of_the_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    heads = {"q": HEADS, "k": 1, "v": 1}
    x = {
        name: torch.randn(1, count, WINDOW_TOKENS, DIM, generator=draw).requires_grad_()
        for name, count in heads.items()
    }
    # The last block sees the sinks of the second document from before its band.
    ids = (torch.arange(WINDOW_TOKENS) >= CHUNK).long()[None]

    def run() -> None:
        config = WindowConfig(CHUNK, 4, 1, 4, 1, 4, CHUNK)
        out = window_triton(**x, window=5, sinks=SINKS, segment_ids=ids, scale=0.25, config=config)
        out.square().sum().backward()

    log = record(monkeypatch, run)
    assert len(log) == 7
    parts = next(launch.after for launch in log if launch.name == "sink_part_kernel")
    assert parts["sink_dk_ptr"].any()
    assert parts["sink_dv_ptr"].any()
    # In the long row, what comes before is another document.
    for launch in log:
        for arguments in (launch.before, launch.after):
            if "runs_ptr" in arguments:
                arguments["runs_ptr"] += 1
    assert_same_far_out(log, monkeypatch, tmp_path)


@pytest.mark.slow
def test_every_kernel_of_the_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    q, phi_q, phi_k = torch.rand(3, 1, HEADS, DIM, generator=draw)
    k, v = torch.randn(2, 1, 1, DIM, generator=draw)
    i, f, gate = torch.rand(3, 1, HEADS, generator=draw)
    state = MLSTMState(*(torch.rand(x.shape, generator=draw) for x in empty_state()))
    ring = Ring.empty(1, 1, DIM, DIM, window=SLOTS - SINKS, sinks=SINKS)
    ring.keys.normal_(generator=draw)
    ring.values.normal_(generator=draw)
    ring.lengths.fill_(SINKS + SLOTS)

    def run() -> None:
        mlstm_step(phi_q, phi_k, v, i, f, state, backend="triton")
        step = (q, k, v, phi_q, phi_k, i, f, gate)
        hybrid_step(*step, state, ring, sinks=SINKS, backend="triton")

    log = record(monkeypatch, run)
    assert tuple(launch.name for launch in log) == STEPS
    assert_same_far_out(log, monkeypatch, tmp_path)


def empty_state() -> MLSTMState:
    return MLSTMState.zeros(1, HEADS, DIM, DIM)


def test_a_state_whose_rows_are_far_apart_is_stepped(tmp_path: Path) -> None:
    token = [x.detach()[:, :, 0] for x in random_inputs(1, 1, 1, DIM, seed=3).values()]
    plain = MLSTMState.zeros(1, 1, DIM, DIM)
    far = with_holes((DIM, 2**27 + 1, 1, DIM), torch.float32, tmp_path / "C")
    state = plain._replace(C=far[:, -1:].permute(1, 2, 0, 3), n=plain.n.clone(), m=plain.m.clone())
    assert state.C.stride(2) * (DIM - 1) > LIMIT
    expected = mlstm_step(*token, plain, backend="torch")
    assert torch.allclose(mlstm_step(*token, state, backend="triton"), expected)
    assert torch.allclose(state.C, plain.C)

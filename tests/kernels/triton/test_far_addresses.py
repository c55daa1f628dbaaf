"""Offsets are 64-bit: kernels read and write beyond 2^31 elements of a tensor.

A tensor of that size is a file with holes, which takes no room. Every kernel is recorded on a small
case. Then it runs again where the case lies at the end of a very long row, or in the last of very
many rows; each program is told that it stands there. It has to write the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from xlstm_kernels.testing import random_inputs

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from xlstm_kernels import MLSTMState, mlstm_step  # noqa: E402
from xlstm_kernels.triton import (  # noqa: E402
    common,
    mlstm_backward,
    mlstm_forward,
    window_kernels,
    window_sinks,
)
from xlstm_kernels.triton.configs import Launch, MLSTMConfig, TokenLaunch, WindowConfig  # noqa: E402
from xlstm_kernels.triton.mlstm import mlstm_triton  # noqa: E402
from xlstm_kernels.triton.window import window_triton  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the GPU's memory has no holes; the interpreter shows it"
)
MODULES = (common, mlstm_forward, mlstm_backward, window_kernels, window_sinks)
# Over the chunks of a row, one after the other.
WALKS = ("centre_kernel", "state_kernel", "state_end_kernel", "state_grad_kernel")
WALKS += ("state_grad_end_kernel",)
CHUNK, TOKENS, DIM, HEADS, CHUNKS = 16, 20, 16, 2, 2
FAR_CHUNKS = tl.constexpr(2**23)  # before the case: 2^27 tokens of 16 features
FAR_ROWS = tl.constexpr(2**22)  # before the case, of 2 heads, 2 chunks and 16 x 16 features
LIMIT = 2**31


@triton.jit
def far_chunk_and_head(unit, units, chunks):
    heads = units // 2
    return unit // heads + FAR_CHUNKS, (unit % heads).to(tl.int64)


@triton.jit
def far_tile_head_and_super_chunk(tiles_k, tiles_v, super_chunks):
    head = (tl.program_id(0) // super_chunks).to(tl.int64) + FAR_ROWS * 2
    return 0, 0, head, tl.program_id(0) % super_chunks


class Recorded(NamedTuple):
    """A launch: the kernel, its grid, and its arguments before and after."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    before: dict[str, Any]
    after: dict[str, Any]


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


def record(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor]) -> list[Recorded]:
    log: list[Recorded] = []
    with monkeypatch.context() as patch:
        for module in MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recording(name, getattr(module, name), log))
        run().sum().backward()
    return log


def with_holes(shape: tuple[int, ...], dtype: torch.dtype, path: Path) -> Tensor:
    """Zeros that take no memory until they are written."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def longer_axis(name: str, x: Tensor) -> int | None:
    """The axis of tokens or chunks; None if a tensor has neither."""
    if name in ("C_ptr", "C_scale_ptr", "n_ptr", "dC_ptr", "dC_scale_ptr", "dn_ptr"):
        return 1
    if name in ("d_pass_ptr", "v_parts_ptr"):
        return 2
    if name in ("sink_dk_ptr", "sink_dv_ptr"):
        return 2
    return x.shape.index(TOKENS) if TOKENS in x.shape else None


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
    walks = launch.name in WALKS
    for name, x in launch.before.items():
        if not isinstance(x, Tensor) or not x.numel():
            continue
        axis = 0 if walks else longer_axis(name, x)
        if axis is None:
            continue
        if walks:  # tensors by chunk have rows and heads in one axis
            front = FAR_ROWS.value * (HEADS if x.shape[0] == HEADS else 1)
        else:
            front = FAR_CHUNKS.value * (1 if x.shape[axis] == CHUNKS else CHUNK)
        axes[name] = axis
        arguments[name] = placed(x, axis, front, tmp_path / f"{launch.name}-{name}")
        if name == "m_ptr" and not walks and "m0_ptr" in arguments:
            # The first chunk's state has this stabiliser; here a token stands before it.
            arguments[name][:, :, front - 1] = launch.before["m0_ptr"]
        if name == "starts_ptr":
            arguments[name][:, front:] += front
        if name == "runs_ptr" and not walks:
            arguments[name][:, front - 1] = x[:, 0] if "m0_ptr" in arguments else 0
    if not walks:
        arguments["T"] += FAR_CHUNKS.value * CHUNK
        for name in ("chunks", "blocks"):
            if name in arguments:
                arguments[name] += FAR_CHUNKS.value
    return arguments | strides_of(arguments), axes


def assert_same_far_out(
    log: list[Recorded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> set[str]:
    """Run every launch again, far out; returns the names of the kernels that wrote out there."""
    for module in MODULES:
        for name, far in (
            ("unit_chunk_and_head", far_chunk_and_head),
            ("tile_head_and_super_chunk", far_tile_head_and_super_chunk),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, far)
    reached = set()
    for launch in log:
        arguments, axes = far_arguments(launch, tmp_path)
        launch.kernel[launch.grid](**arguments)
        for name, axis in axes.items():
            if name == "starts_ptr":  # positions, which are others out there
                continue
            found, expected = arguments[name], launch.after[name]
            front = found.shape[axis] - expected.shape[axis]
            written = found.narrow(axis, front, expected.shape[axis])
            assert torch.equal(written.nan_to_num(7.0), expected.nan_to_num(7.0)), (
                launch.name, name,
            )  # fmt: skip
            if found.numel() > LIMIT:
                reached.add(launch.name)
    return reached


@pytest.mark.slow
@pytest.mark.parametrize(("super_chunks", "launches"), [(1, 9), (2, 12)])
def test_every_kernel_of_the_mlstm(
    super_chunks: int, launches: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inputs = random_inputs(1, HEADS, TOKENS, DIM, G=1, seed=1)
    settings = [Launch(16, 16, 4, 1)] * 3
    config = MLSTMConfig(CHUNK, CHUNK, *settings, TokenLaunch(16, 16, 4, 1))
    row = {"segment_ids": (torch.arange(TOKENS) >= 9).long()[None] + 1, "state": None}

    def run() -> Tensor:
        h, final = mlstm_triton(**inputs, **row, config=config, cut=super_chunks)
        return h.sum() + final.C.sum()

    log = record(monkeypatch, run)
    assert len(log) == launches
    reached = assert_same_far_out(log, monkeypatch, tmp_path)
    of_gates = {"gate_grad_kernel"}  # it has no features
    assert reached == {launch.name for launch in log} - of_gates


@pytest.mark.slow
def test_every_kernel_of_the_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(2)
    shapes = {"q": (1, HEADS, TOKENS, DIM), "k": (1, 1, TOKENS, DIM), "v": (1, 1, TOKENS, DIM)}
    x = {n: torch.randn(s, generator=draw).requires_grad_() for n, s in shapes.items()}
    ids = torch.ones(1, TOKENS, dtype=torch.int64)

    def run() -> Tensor:
        config = WindowConfig(CHUNK, 4, 1, 4, 1, 4, CHUNK)
        return window_triton(
            **x, window=5, sinks=2, segment_ids=ids, scale=0.25, config=config
        ).sum()

    log = record(monkeypatch, run)
    assert len(log) == 7
    # In the long row, what comes before is another document.
    for launch in log:
        for arguments in (launch.before, launch.after):
            if "runs_ptr" in arguments:
                arguments["runs_ptr"] += 1
    reached = assert_same_far_out(log, monkeypatch, tmp_path)
    assert {"window_kernel", "query_grad_kernel", "key_value_grad_kernel"} <= reached


def test_a_state_whose_rows_are_far_apart_is_stepped(tmp_path: Path) -> None:
    token = [x.detach()[:, :, 0] for x in random_inputs(1, 1, 1, DIM, seed=3).values()]
    plain = MLSTMState.zeros(1, 1, DIM, DIM)
    far = with_holes((DIM, 2**27 + 1, 1, DIM), torch.float32, tmp_path / "C")
    state = plain._replace(C=far[:, -1:].permute(1, 2, 0, 3), n=plain.n.clone(), m=plain.m.clone())
    assert state.C.stride(2) * (DIM - 1) > LIMIT
    expected = mlstm_step(*token, plain, backend="torch")
    assert torch.allclose(mlstm_step(*token, state, backend="triton"), expected)
    assert torch.allclose(state.C, plain.C)

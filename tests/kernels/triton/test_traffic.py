"""Bytes that the kernels load and store, launches and programs, counted in the interpreter.

`limits.json` holds the counts: a change that moves more fails. There are two. In one each program's
loads and stores count, whatever the caches save. In the other each address counts once in a launch,
as if the caches held all that its programs share. What torch runs around the
launches is counted too.
"""

from __future__ import annotations

import collections
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_kernels import MLSTMState, Ring, hybrid_step, mlstm, sliding_window_attention
from xlstm_kernels.testing import random_inputs, random_state

pytest.importorskip("triton")
from xlstm_kernels.triton import (
    common,
    mlstm_backward,
    mlstm_forward,
    mlstm_passes,
    step_kernels,
    window_kernels,
    window_sinks,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counted in the interpreter, which a GPU does not use"
)
LIMITS = json.loads((Path(__file__).parent / "limits.json").read_text())["traffic"]
HEADS, GROUPS, TOKENS, DIM = 4, 1, 128, 128
# As many bytes as there are tokens and heads in the first case, in two chunks of a row.
MLSTM_HEADS, MLSTM_TOKENS = 2, 256
FORWARD = ["chunk_kernel", "centre_kernel", "state_end_kernel", "state_kernel", "output_kernel"]
MODULES = (common, mlstm_forward, mlstm_backward, step_kernels, window_kernels, window_sinks)


class Counter:
    """Bytes by kernel, and launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes: dict[str, int] = collections.Counter()
        self.launches: list[str] = []
        self.addresses: list[list[np.ndarray]] = []  # of bfloat16, by launch
        self.programs = 0
        self.running = ""
        builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
        for name in ("create_masked_load", "create_masked_store"):
            monkeypatch.setattr(builder, name, self.counted(getattr(builder, name), name))
        for module in MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Named(name, getattr(module, name), self))

    def counted(self, access: Any, name: str) -> Any:
        mask_at = 1 if name == "create_masked_load" else 2

        def count(builder: Any, ptrs: Any, *rest: Any) -> Any:
            width = ptrs.get_element_ty().primitive_bitwidth // 8
            mask = rest[mask_at - 1].data
            self.bytes[self.running] += int(mask.sum()) * width
            if width == 2:
                self.addresses[-1].append(ptrs.data[mask])
            return access(builder, ptrs, *rest)

        return count

    def per_token_and_head(self, tokens: int) -> dict[str, float]:
        return {name: total / (HEADS * tokens) for name, total in self.bytes.items()}

    def bytes_once(self) -> list[int]:
        """Bytes of bfloat16 by launch, each address once: tokens' features and states of chunks."""
        return [
            2 * np.unique(np.concatenate(found or [np.empty(0)])).size for found in self.addresses
        ]


class Named:
    """A kernel that says that it runs."""

    def __init__(self, name: str, kernel: Any, counter: Counter) -> None:
        self.name, self.kernel, self.counter = name, kernel, counter

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.counter.running = self.name
        self.counter.launches.append(self.name)
        self.counter.addresses.append([])
        self.counter.programs += math.prod(grid)
        return self.kernel[grid]


def run(operator: str) -> None:
    sizes = (MLSTM_HEADS, MLSTM_TOKENS, DIM, DIM, MLSTM_HEADS)
    x = random_inputs(1, *(sizes if operator == "mlstm" else (HEADS, TOKENS, DIM, DIM, GROUPS)))
    wide = {"i", "f"}
    x = {
        name: t.detach().to(torch.float32 if name in wide else torch.bfloat16).requires_grad_()
        for name, t in x.items()
    }
    if operator == "mlstm":
        h: Tensor = mlstm(**x, backend="triton")
    else:
        keys = x["v"].detach().clone().requires_grad_()
        h = sliding_window_attention(x["q"], keys, x["v"], window=64, sinks=4, backend="triton")
    h.float().sum().backward()


# bf16 products are wrong in the interpreter; what is loaded and stored does not depend on them.
@pytest.mark.parametrize(
    "case",
    [
        "mlstm",
        "mlstm, super-chunks",
        "window",
        pytest.param("mlstm, states kept", marks=pytest.mark.slow),
    ],
)
def test_bytes_and_launches_stay_within_the_recorded_limits(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, limits, operator = Counter(monkeypatch), LIMITS[case], case.split(",")[0]
    monkeypatch.setenv("XLSTM_KERNELS_KEEP_STATES", "1" if "kept" in case else "0")
    monkeypatch.setenv("XLSTM_KERNELS_SUPER_CHUNKS", "2" if "super" in case else "1")
    run(operator)
    found = counter.per_token_and_head(TOKENS)
    assert found.keys() == limits["bytes"].keys(), found
    over = {name: size for name, size in found.items() if size > limits["bytes"][name]}
    assert not over
    assert len(counter.launches) == limits["launches"]
    if operator == "mlstm":
        forward = [name for name in FORWARD if name in found]
        assert counter.launches[: len(forward)] == forward
        once = np.split(np.array(counter.bytes_once()), [len(forward)])
        features = {
            name: part.sum() / (MLSTM_HEADS * MLSTM_TOKENS)
            for name, part in zip(("forward", "backward"), once, strict=True)
        }
        assert features == limits["once"]


PASSES = {"mlstm_triton": "launch_forward", "mlstm_triton_backward": "launch_backward"}


class TorchCounter(TorchDispatchMode):
    """Torch's operators that run something, inside of our registered ones too, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: dict[str, int] = collections.Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        room, name = function._schema.name.split("::")
        if room == "xlstm_kernels":
            with self:
                return getattr(mlstm_passes, PASSES[name])(*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        alias = function._schema.returns[0].alias_info
        is_view = alias is not None and not alias.is_write
        results = result if isinstance(result, tuple | list) else (result,)
        written = [x for x in results if isinstance(x, Tensor)]
        if written and not is_view and "empty" not in name:
            self.operators[name] += 1
            tensors = [x for x in args if isinstance(x, Tensor)] + written
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


class NotStarted:
    """A kernel that does nothing: what torch runs does not depend on it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: None


@pytest.mark.parametrize("case", ["one document", "documents", "a trained state"])
def test_torch_runs_no_more_around_the_launches_than_recorded(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (mlstm_forward, mlstm_backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NotStarted())
    heads, tokens = 4, 1024
    x = {n: t.detach() for n, t in random_inputs(1, heads, tokens, DIM, G=2).items()}
    wanted = {n: t if n in "if" else t.bfloat16() for n, t in x.items()}
    ids = torch.arange(tokens)[None] // 300 if case == "documents" else None
    start = {n: t.detach() for n, t in random_state(1, heads, DIM, DIM).items()}
    state = None
    if case == "a trained state":
        wanted |= {name: start[name] for name in "Cn"}
        state = MLSTMState(**start)
    leaves = [t.requires_grad_() for t in wanted.values()]
    sequence = {name: wanted[name] for name in "qkvif"}
    with TorchCounter() as forward:
        h = mlstm(**sequence, segment_ids=ids, state=state, backend="triton")
    grad = torch.ones_like(h)
    with TorchCounter() as backward:
        torch.autograd.grad(h, leaves, grad)
    found = {"forward": dict(forward.operators), "backward": dict(backward.operators)}
    found["bytes"] = {"forward": forward.bytes, "backward": backward.bytes}
    assert found == LIMITS["torch around the mlstm"][case]


def test_a_decoding_step_reads_each_ring_once_by_many_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row, one group of four heads; window 512 and 4 sinks, all slots filled."""
    counter, limits = Counter(monkeypatch), LIMITS["hybrid_step"]
    x = random_inputs(1, HEADS, 1, DIM, DIM, GROUPS)
    phi_q, phi_k, v, i, f = (t.detach()[:, :, 0] for t in x.values())
    q, v = phi_q.bfloat16(), v.bfloat16()
    state = MLSTMState.zeros(1, HEADS, DIM, DIM)
    ring = Ring.empty(1, GROUPS, DIM, DIM, window=512, sinks=4, dtype=torch.bfloat16)
    ring.lengths.fill_(1000)
    hybrid_step(q, v, v, q, phi_k.bfloat16(), i, f, i, state, ring, sinks=4, backend="triton")
    assert counter.launches == ["hybrid_step_kernel"]
    assert ring.lengths.tolist() == [1001]
    assert counter.per_token_and_head(1)["hybrid_step_kernel"] <= limits["bytes"]
    assert counter.programs >= limits["programs"]

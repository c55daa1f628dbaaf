"""For what Triton would compile the kernels: no more often than needed, and what was checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xlstm_kernels import (
    MLSTMState,
    Ring,
    RingSlots,
    hybrid_step,
    mlstm,
    mlstm_step,
    selfcheck,
    sliding_window_attention,
    window_step,
)
from xlstm_kernels.testing import random_inputs
from xlstm_kernels.verdicts import Question

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit

from xlstm_kernels.triton import (
    common,
    mlstm_backward,
    mlstm_forward,
    step_kernels,
    window_kernels,
    window_sinks,
)

MODULES = (common, mlstm_forward, mlstm_backward, window_kernels, window_sinks, step_kernels)
CUT = "XLSTM_KERNELS_SUPER_CHUNKS"


class Bound:
    """A kernel that notes what Triton would compile it for, and does not start."""

    def __init__(self, name: str, kernel: Any, compiled: set[str]) -> None:
        made = jit.JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self.bind = jit.create_function_from_signature(made.signature, made.params, backend)
        self.name, self.compiled = name, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(**arguments: Any) -> None:
            _, *specialised = self.bind(**arguments)
            self.compiled.add(f"{self.name} {specialised}")

        return launch


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What Triton would compile; no kernel starts."""
    if torch.cuda.is_available():
        pytest.skip("there, the kernels are compiled ones")
    found: set[str] = set()
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Bound(name, getattr(module, name), found))
    return found


# The walks are other kernels where a row has super-chunks. Of the second window, the first three
# lengths are shorter than it, and the first two than its sinks.
@pytest.mark.parametrize(
    ("cut", "window", "sinks", "lengths", "of_the_mlstm"),
    [
        ("1", 5, 2, (2, 16, 63, 64, 65, 128, 1000), 8),
        ("1", 512, 4, (1, 2, 500, 512, 513, 1000), 8),
        ("3", 5, 2, (65, 128, 129, 1000, 5000), 10),
    ],
)
def test_a_new_length_compiles_nothing(
    compiled: set[str],
    cut: str,
    window: int,
    sinks: int,
    lengths: tuple[int, ...],
    of_the_mlstm: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after = []
    monkeypatch.setenv(CUT, cut)
    for tokens in lengths:
        train(tokens, 4, 2, 32, torch.float32, window, sinks, packed=True)
        after.append(len(compiled))
    assert after == [of_the_mlstm + 7] * len(after), compiled  # seven of the window


def train(
    tokens: int, H: int, G: int, D: int, dtype: torch.dtype, window: int, sinks: int, packed: bool
) -> None:
    """Run both operators and their gradients."""
    ids = torch.zeros(1, tokens).long() if packed else None
    inputs = {
        name: x.detach().to(x.dtype if name in "if" else dtype).requires_grad_()
        for name, x in random_inputs(1, H, tokens, D, G=G).items()
    }
    q, k, v = inputs["q"], inputs["q"][:, :G], inputs["v"]
    h = mlstm(**inputs, segment_ids=ids, backend="triton")
    attended = sliding_window_attention(
        q, k, v, window=window, sinks=sinks, segment_ids=ids, backend="triton"
    )
    (h + attended).sum().backward()


def checked(operator: str, dims: dict[str, int], compiled: set[str]) -> set[str]:
    """What the self-check of an operator compiles in bfloat16."""
    compiled.clear()
    question = Question(operator, "bfloat16", tuple(dims.items()))
    selfcheck.measure(question, torch.device("cpu"), selfcheck.TOKENS)
    return set(compiled)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("H", "G"), [(32, 8), (32, 32), (16, 1)])
def test_training_and_prefill_run_the_kernels_that_the_self_check_ran(
    compiled: set[str], H: int, G: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checked("mlstm", {"Dk": 32, "Dv": 32}, compiled)
    found |= checked("sliding_window_attention", {"D": 32}, compiled)
    compiled.clear()
    train(600, H, G, 32, torch.bfloat16, window=512, sinks=4, packed=packed)
    assert compiled - found == set()
    assert len(compiled) == 15
    compiled.clear()
    monkeypatch.setattr(Tensor, "backward", lambda x: None)
    with torch.no_grad():
        train(600, H, G, 32, torch.bfloat16, window=512, sinks=4, packed=packed)
    assert compiled - found == set()
    assert len(compiled) == 5


def decode(B: int, H: int, G: int, D: int, window: int, sinks: int, way: str) -> None:
    """Take a step of the mLSTM and one of the mixer, with gates from one product as a model's.

    way: the mixer counts its token, or is given slots, or slots and the rows of a pool.
    """
    q, phi = torch.zeros(2, B, H, D, dtype=torch.bfloat16)
    k = torch.zeros(B, G, D, dtype=torch.bfloat16)
    i, f, gate = torch.zeros(B, 3 * H).split(H, dim=1)
    ring = Ring.empty(B, G, D, D, window=window, sinks=sinks, dtype=k.dtype)
    state = MLSTMState.zeros(B, H, D, D)
    slots = None if way == "counts" else RingSlots.of(ring.lengths, window, sinks, k.dtype)
    settings: dict[str, Any] = {"index": torch.arange(B) if way == "rows" else None}
    settings["backend"] = "triton"
    mlstm_step(q, q, k, i, f, state, **settings)
    given = {"slots": slots, "sinks": sinks, **settings}
    hybrid_step(q, k, k, phi, phi, i, f, gate, state, ring, **given)
    if way == "slots":  # as a student without the mLSTM decodes
        window_step(q, k, k, ring, **given)


@pytest.mark.parametrize("way", ["counts", "slots", "rows"])
def test_decoding_runs_the_kernels_that_the_self_check_ran(compiled: set[str], way: str) -> None:
    found = checked("mlstm_step", {"Dk": 32, "Dv": 32}, compiled)
    found |= checked("hybrid_step", {"D": 32, "Dk": 32, "Dv": 32}, compiled)
    compiled.clear()
    for B, H, G, window, sinks in ((1, 32, 8, 512, 4), (16, 14, 7, 100, 16), (3, 32, 16, 1, 1)):
        decode(B, H, G, 32, window, sinks, way)
    assert compiled - found == set()
    assert len(compiled) == (3 if way == "slots" else 2)


def test_a_length_would_be_noticed_if_it_were_specialised() -> None:
    """Were T specialised, 16 tokens and 17 would be different kernels."""
    kernel = mlstm_forward.state_kernel
    free = type(kernel)(kernel.fn, do_not_specialize=())
    compiled: set[str] = set()
    bound = Bound("state_kernel", free, compiled)
    names = [argument for argument in bound.bind.__code__.co_varnames if argument != "options"]
    for tokens in (16, 17):
        bound[1,](**dict.fromkeys(names[: bound.bind.__code__.co_argcount], 2) | {"T": tokens})
    assert len(compiled) == 2

"""No intermediate of either operator grows faster than the tokens, forward or backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xlstm_kernels import MLSTMState, mlstm, sliding_window_attention
from xlstm_kernels.testing import allocated_peak, random_inputs, random_segments
from xlstm_kernels.torch import chunkwise


def measure(operator: Callable[..., Tensor], tokens: int) -> int:
    """Return the most bytes that a forward and backward pass held at once."""
    inputs = random_inputs(B=1, H=2, T=tokens, Dk=8, G=1, seed=0)
    segment_ids = random_segments(1, tokens, mean_length=50, seed=0)
    return allocated_peak(lambda: operator(inputs, segment_ids).sum().backward())


OPERATORS = {
    "mlstm": lambda x, ids: mlstm(**x, segment_ids=ids),
    "sliding_window_attention": lambda x, ids: sliding_window_attention(
        x["q"], x["k"][:, :1], x["v"], window=32, sinks=4, segment_ids=ids
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_memory_is_linear_in_tokens(name: str) -> None:
    short, long = measure(OPERATORS[name], 2048), measure(OPERATORS[name], 8192)
    assert long < 4.1 * short
    assert long < 8192 * 8192 * 4  # one float32 matrix of T x T


def test_the_measure_sees_a_quadratic_operator() -> None:
    def quadratic(x: dict[str, Tensor], _: Tensor) -> Tensor:
        return (x["q"] @ x["k"].transpose(-1, -2)).softmax(dim=-1) @ x["v"]

    assert measure(quadratic, 2048) > 12 * measure(quadratic, 512)


@pytest.mark.parametrize("groups", [1, 4])
def test_values_are_not_repeated_per_query_head(groups: int) -> None:
    # 8 query heads over fewer value heads: no tensor may hold v once per query head, and Dv is by
    # far the largest dim.
    inputs = {
        n: x.detach()
        for n, x in random_inputs(B=1, H=8, T=32, Dk=2, Dv=512, G=groups, seed=1).items()
    }
    copies: list[int] = []

    class Inspect(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "bmm" in func.__name__:
                copies.extend(
                    x.numel()
                    for x in args
                    if isinstance(x, Tensor) and x.shape[-1] == 513 and x.shape[-2] == 32
                )
            return result

    state = MLSTMState.zeros(1, 8, 2, 512)
    # Not through the registered operator: torch does not look inside of that.
    with Inspect():
        chunkwise.compute(*inputs.values(), None, *state, keep=False)
    assert copies
    assert max(copies) == groups * 32 * 513

"""No intermediate of either operator grows faster than the tokens, forward or backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xlstm_kernels import mlstm, sliding_window_attention
from xlstm_kernels.testing import random_inputs, random_segments


class Storages(TorchDispatchMode):
    """Record the bytes of the largest storage that operations make, and the sum of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.total = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor)
        }
        for x in tree_leaves(result):
            # Results that are neither views nor made in place.
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                size = x.untyped_storage().nbytes()
                self.largest, self.total = max(self.largest, size), self.total + size
        return result


def measure(operator: Callable[..., Tensor], tokens: int) -> Storages:
    inputs = random_inputs(B=1, H=2, T=tokens, Dk=8, G=1, seed=0)
    segment_ids = random_segments(1, tokens, mean_length=50, seed=0)
    with Storages() as seen:
        h = operator(inputs, segment_ids)
        h.sum().backward()
    return seen


OPERATORS = {
    "mlstm": lambda x, ids: mlstm(**x, segment_ids=ids),
    "sliding_window_attention": lambda x, ids: sliding_window_attention(
        x["q"], x["k"][:, :1], x["v"], window=32, sinks=4, segment_ids=ids
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_memory_is_linear_in_tokens(name: str) -> None:
    short, long = measure(OPERATORS[name], 1024), measure(OPERATORS[name], 4096)
    assert long.largest < 4.1 * short.largest
    assert long.total < 4.1 * short.total
    assert long.largest < 4096 * 4096 * 4  # one float32 matrix of T x T


def test_the_measure_sees_a_quadratic_operator() -> None:
    def quadratic(x: dict[str, Tensor], _: Tensor) -> Tensor:
        return (x["q"] @ x["k"].transpose(-1, -2)).softmax(dim=-1) @ x["v"]

    assert measure(quadratic, 512).largest > 15 * measure(quadratic, 128).largest


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

    with Inspect(), torch.no_grad():
        mlstm(**inputs)
    assert copies
    assert max(copies) == groups * 32 * 513

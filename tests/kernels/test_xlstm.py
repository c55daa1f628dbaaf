"""xlstm's own mLSTM beside ours: equal in value and gradient where both mean the same.

They mean the same where the denominator q . n is at least exp(-m) on every row. Below, xlstm
divides by exp(-m) instead: its output is then the numerator, ours the ratio (the paper's Eq. 10).
Softmax features give such denominators. And its kernels take the denominator for a constant in the
backward pass, so that their gradients of q, k and both gates are others.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from xlstm_kernels import mlstm
from xlstm_kernels.testing import error_ratio, outputs_and_grads, random_inputs, to_float64

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        not (importlib.util.find_spec("xlstm") and importlib.util.find_spec("mlstm_kernels")),
        reason="xlstm or mlstm_kernels is not installed",
    ),
]
D, TOKENS = 16, 64
Tensors = dict[str, Tensor]


def drawn(input_bias: float) -> Tensors:
    """Inputs whose denominators are large (a bias of 12) or small (0); it cancels in our ratio."""
    inputs = to_float64(random_inputs(1, 2, TOKENS, D, seed=3))
    inputs["i"] = (inputs["i"].detach() + input_bias).requires_grad_()
    return inputs


def ours(**x: Tensor) -> Tensor:
    return mlstm(**x, backend="torch")


def parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    backends = importlib.import_module("xlstm.blocks.mlstm.backends")
    gates = {"igate_preact": i.unsqueeze(-1), "fgate_preact": f.unsqueeze(-1)}
    out: Tensor = backends.parallel_stabilized_simple(q, k, v, **gates, eps=0.0)
    return out


def recurrent(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    step = importlib.import_module("xlstm.blocks.mlstm.backends").recurrent_step_stabilized_simple
    heads = q.shape[:2]
    # Its state before the first token has the log-weight 0; ours has none. C and n are 0 in both.
    state: Any = (q.new_zeros(*heads, D, D), q.new_zeros(*heads, D, 1), q.new_zeros(*heads, 1, 1))
    outputs = []
    for t in range(q.shape[2]):
        # It takes an axis away from its arguments in place.
        token = [x[:, :, t : t + 1].clone() for x in (q, k, v)]
        gates = [x[:, :, t, None, None] for x in (i, f)]
        h, state = step(*state, *token, *gates, eps=0.0)
        outputs.append(h)
    return torch.cat(outputs, dim=2)


def chunkwise(kernel: str) -> Any:
    run = importlib.import_module("mlstm_kernels.torch.chunkwise").registry[kernel]

    def operator(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        # Its own backward pass computes in float32 at most.
        kept = {"autocast_kernel_dtype": torch.float32, "chunk_size": 16, "eps": 0.0}
        out: Tensor = run(q, k, v, i, f, **kept)
        return out

    return operator


@pytest.mark.parametrize(
    "theirs", [parallel, recurrent, "native_autograd"], ids=["parallel", "recurrent", "chunkwise"]
)
def test_values_and_all_gradients_are_equal_where_both_mean_the_same(theirs: Any) -> None:
    inputs = drawn(input_bias=12.0)
    operator = chunkwise(theirs) if isinstance(theirs, str) else theirs
    found, expected = outputs_and_grads(operator, inputs), outputs_and_grads(ours, inputs)
    for name in expected:
        assert error_ratio(found[name], expected[name]) < 1e-10, name


def test_below_one_xlstm_does_not_normalise() -> None:
    inputs = {name: x.detach() for name, x in drawn(input_bias=0.0).items()}
    log_f = torch.nn.functional.logsigmoid(inputs["f"]).cumsum(-1)
    weights = (log_f[..., :, None] - log_f[..., None, :] + inputs["i"][..., None, :]).exp().tril()
    scores = inputs["q"] @ inputs["k"].transpose(-1, -2) / D**0.5 * weights
    den = scores.sum(-1, keepdim=True)
    assert (den < 1).any()
    # max(|q . n|, exp(-m)) in units of exp(-m) is max(|den|, 1).
    assert error_ratio(parallel(**inputs), ours(**inputs) * den / den.abs().clamp(min=1)) < 1e-10


def test_its_kernels_take_the_denominator_for_a_constant() -> None:
    inputs = drawn(input_bias=12.0)
    single = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    found = outputs_and_grads(chunkwise("native_custbw"), single)
    expected = outputs_and_grads(ours, inputs)
    wrong = {name for name in expected if error_ratio(found[name], expected[name]) > 1e-2}
    assert wrong == {"dq", "dk", "di", "df"}
    assert error_ratio(found["h"], expected["h"]) < 1e-5
    assert error_ratio(found["dv"], expected["dv"]) < 1e-5

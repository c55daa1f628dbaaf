"""Public operators: validate the arguments, then dispatch.

Letters: B batch, T tokens, H query heads, G key/value heads (H a multiple of G), D head dim (Dk keys, Dv values).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from xlstm_kernels.chunkwise import mlstm_chunkwise
from xlstm_kernels.recurrent import mlstm_step_in_place
from xlstm_kernels.state import MLSTMState, state_dtype
from xlstm_kernels.window import banded_attention

Backend = Literal["auto", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "torch")


@overload
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None = ...,
    state: MLSTMState | None = ...,
    return_state: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...


@overload
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None = ...,
    state: MLSTMState | None = ...,
    return_state: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, MLSTMState]: ...


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None = None,
    state: MLSTMState | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, MLSTMState]:
    """Run the mLSTM over a sequence: the exact ratio q S / (q . z) of the paper (Eq. 8-10; docs/math.md).

    q, k (B, H, T, Dk) after the feature map, not scaled here; v (B, G, T, Dv); i, f (B, H, T) preactivations of the
    exponential input gate and the sigmoid forget gate. segment_ids (B, T), integers: the state restarts where the id
    changes between neighbours. `state` continues into the first segment and is not modified.

    Returns h (B, H, T, Dv) in v's dtype and, with return_state, the MLSTMState after the last token. Computes in
    float32, or in float64 if an input is float64. Where q . z is exactly 0 (all keys 0, say), h and its gradient are 0.
    Differentiable in q, k, v, i, f and in C, n of both states; m is detached. Time and memory are linear in T.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    check_sequence(q, k, v, i, f, segment_ids)
    if state is not None:
        check_state("mlstm", state, q, v, state_dtype(q, k, v, i, f))
    if backend not in BACKENDS:
        raise ValueError(f"mlstm: backend={backend!r} is unknown; allowed: {', '.join(BACKENDS)}")
    h, final = mlstm_chunkwise(q, k, v, i, f, segment_ids, state)
    return (h, final) if return_state else h


def mlstm_step(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState) -> Tensor:
    """Advance the mLSTM by one token, updating `state` in place; for decoding, never records gradients.

    q, k (B, H, Dk); v (B, G, Dv); i, f (B, H); state as returned by `mlstm` or `MLSTMState.zeros`.
    Returns h (B, H, Dv) in v's dtype. The state's tensors keep their addresses. For gradients, call `mlstm` with T = 1.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    check_floats("mlstm_step", q=q, k=k, v=v, i=i, f=f)
    check_shape("mlstm_step", "q", q, "(B, H, Dk)", (None, None, None))
    check_shape("mlstm_step", "k", k, "(B, H, Dk), as q", tuple(q.shape))
    check_shape("mlstm_step", "v", v, "(B, G, Dv)", (q.shape[0], None, None))
    check_groups("mlstm_step", "v", v, q)
    for name, gate in (("i", i), ("f", f)):
        check_shape("mlstm_step", name, gate, "(B, H)", tuple(q.shape[:2]))
    check_state("mlstm_step", state, q, v, state_dtype(q, k, v, i, f))
    return mlstm_step_in_place(q, k, v, i, f, state).to(v.dtype)


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend to the last `window` tokens and the first `sinks` tokens of the query's document; exact softmax.

    q (B, H, T, D); k, v (B, G, T, D); segment_ids (B, T), integers: a document ends where the id changes. Query t sees
    the keys s of its document with t - window < s <= t or s one of its first `sinks` tokens (s <= t), each once.
    scale: factor of q . k, 1 / sqrt(D) by default. Returns (B, H, T, D) in q's dtype. Linear in T for a fixed window.
    Raises ValueError naming the argument, its value and what is allowed.
    """
    check_window(q, k, v, window, sinks, segment_ids)
    return banded_attention(q, k, v, window, sinks, segment_ids, q.shape[-1] ** -0.5 if scale is None else scale)



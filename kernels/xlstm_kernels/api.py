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
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    _check_sequence(q, k, v, i, f, segment_ids)
    if state is not None:
        _check_state("mlstm", state, q, v, state_dtype(q, k, v, i, f))
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
    _check_floats("mlstm_step", q=q, k=k, v=v, i=i, f=f)
    _check_shape("mlstm_step", "q", q, "(B, H, Dk)", (None, None, None))
    _check_shape("mlstm_step", "k", k, "(B, H, Dk), as q", tuple(q.shape))
    _check_shape("mlstm_step", "v", v, "(B, G, Dv)", (q.shape[0], None, None))
    _check_groups("mlstm_step", "v", v, q)
    for name, gate in (("i", i), ("f", f)):
        _check_shape("mlstm_step", name, gate, "(B, H)", tuple(q.shape[:2]))
    _check_state("mlstm_step", state, q, v, state_dtype(q, k, v, i, f))
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
    _check_window(q, k, v, window, sinks, segment_ids)
    return banded_attention(q, k, v, window, sinks, segment_ids, q.shape[-1] ** -0.5 if scale is None else scale)


def _check_sequence(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, segment_ids: Tensor | None) -> None:
    _check_floats("mlstm", q=q, k=k, v=v, i=i, f=f)
    _check_shape("mlstm", "q", q, "(B, H, T, Dk)", (None, None, None, None))
    B, H, T, _ = q.shape
    _check_shape("mlstm", "k", k, "(B, H, T, Dk), as q", tuple(q.shape))
    _check_shape("mlstm", "v", v, "(B, G, T, Dv)", (B, None, T, None))
    _check_groups("mlstm", "v", v, q)
    for name, gate in (("i", i), ("f", f)):
        _check_shape("mlstm", name, gate, "(B, H, T)", (B, H, T))
    _check_segments("mlstm", segment_ids, q)


def _check_window(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, segment_ids: Tensor | None) -> None:
    name = "sliding_window_attention"
    _check_floats(name, q=q, k=k, v=v)
    _check_shape(name, "q", q, "(B, H, T, D)", (None, None, None, None))
    B, _, T, D = q.shape
    _check_shape(name, "k", k, "(B, G, T, D)", (B, None, T, D))
    _check_shape(name, "v", v, "(B, G, T, D), as k", tuple(k.shape))
    _check_groups(name, "k", k, q)
    _check_segments(name, segment_ids, q)
    if window < 1:
        raise ValueError(f"{name}: window={window} is not allowed; at least 1 (the query itself)")
    if sinks < 0:
        raise ValueError(f"{name}: sinks={sinks} is not allowed; 0 or more")


def _check_floats(operator: str, **tensors: Tensor) -> None:
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            allowed = ", ".join(map(_name, FLOATS))
            raise ValueError(f"{operator}: {name} has dtype {_name(x.dtype)}; allowed: {allowed}")
        if x.device != device:
            raise ValueError(f"{operator}: {name} is on {x.device}, but the first argument is on {device}; use one")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_shape(operator: str, name: str, x: Tensor, letters: str, expected: tuple[int | None, ...]) -> None:
    """Refuse x unless its shape is `expected`, where None allows any size of at least 1."""
    fits = x.ndim == len(expected)
    if not (fits and all(n == (e or max(n, 1)) for n, e in zip(x.shape, expected, strict=True))):
        wanted = ", ".join("any >= 1" if e is None else str(e) for e in expected)
        raise ValueError(f"{operator}: {name} has shape {tuple(x.shape)}; expected {letters} = ({wanted})")


def _check_groups(operator: str, name: str, x: Tensor, q: Tensor) -> None:
    heads, groups = q.shape[1], x.shape[1]
    if heads % groups:
        raise ValueError(f"{operator}: {name} has {groups} heads; the {heads} heads of q must be a multiple of them")


def _check_segments(operator: str, segment_ids: Tensor | None, q: Tensor) -> None:
    if segment_ids is None:
        return
    _check_shape(operator, "segment_ids", segment_ids, "(B, T)", (q.shape[0], q.shape[2]))
    if segment_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"{operator}: segment_ids has dtype {_name(segment_ids.dtype)}; allowed: integers")
    if segment_ids.device != q.device:
        raise ValueError(f"{operator}: segment_ids is on {segment_ids.device}, but q is on {q.device}; use one")


def _check_state(operator: str, state: MLSTMState, q: Tensor, v: Tensor, dtype: torch.dtype) -> None:
    B, H, Dk, Dv = *q.shape[:2], q.shape[-1], v.shape[-1]
    _check_shape(operator, "state.C", state.C, "(B, H, Dk, Dv)", (B, H, Dk, Dv))
    _check_shape(operator, "state.n", state.n, "(B, H, Dk)", (B, H, Dk))
    _check_shape(operator, "state.m", state.m, "(B, H)", (B, H))
    for name, x in zip(state._fields, state, strict=True):
        if x.dtype != dtype:
            raise ValueError(f"{operator}: state.{name} has dtype {_name(x.dtype)}; allowed: {_name(dtype)}")
        if x.device != q.device:
            raise ValueError(f"{operator}: state.{name} is on {x.device}, but q is on {q.device}; use one")

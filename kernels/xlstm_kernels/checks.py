"""Validation of the operators' arguments: one line that names the argument, its value and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from xlstm_kernels.state import MLSTMState, Ring, state_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_sequence(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, segment_ids: Tensor | None) -> None:
    check_floats("mlstm", q=q, k=k, v=v, i=i, f=f)
    check_shape("mlstm", "q", q, "(B, H, T, Dk)", (None, None, None, None))
    B, H, T, _ = q.shape
    check_shape("mlstm", "k", k, "(B, H, T, Dk), as q", tuple(q.shape))
    check_shape("mlstm", "v", v, "(B, G, T, Dv)", (B, None, T, None))
    check_groups("mlstm", "v", v, q)
    for name, gate in (("i", i), ("f", f)):
        check_shape("mlstm", name, gate, "(B, H, T)", (B, H, T))
    check_segments("mlstm", segment_ids, q)


def check_window(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, segment_ids: Tensor | None) -> None:
    name = "sliding_window_attention"
    check_floats(name, q=q, k=k, v=v)
    check_shape(name, "q", q, "(B, H, T, D)", (None, None, None, None))
    B, _, T, D = q.shape
    check_shape(name, "k", k, "(B, G, T, D)", (B, None, T, D))
    check_shape(name, "v", v, "(B, G, T, D), as k", tuple(k.shape))
    check_groups(name, "k", k, q)
    check_segments(name, segment_ids, q)
    if window < 1:
        raise ValueError(f"{name}: window={window} is not allowed; at least 1 (the query itself)")
    if sinks < 0:
        raise ValueError(f"{name}: sinks={sinks} is not allowed; 0 or more")


def check_floats(operator: str, **tensors: Tensor) -> None:
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            allowed = ", ".join(map(dtype_name, FLOATS))
            raise ValueError(f"{operator}: {name} has dtype {dtype_name(x.dtype)}; allowed: {allowed}")
        if x.device != device:
            raise ValueError(f"{operator}: {name} is on {x.device}, but the first argument is on {device}; use one")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_shape(operator: str, name: str, x: Tensor, letters: str, expected: tuple[int | None, ...]) -> None:
    """Refuse x unless its shape is `expected`, where None allows any size of at least 1."""
    fits = x.ndim == len(expected)
    if not (fits and all(n == (e or max(n, 1)) for n, e in zip(x.shape, expected, strict=True))):
        wanted = ", ".join("any >= 1" if e is None else str(e) for e in expected)
        raise ValueError(f"{operator}: {name} has shape {tuple(x.shape)}; expected {letters} = ({wanted})")


def check_groups(operator: str, name: str, x: Tensor, q: Tensor) -> None:
    heads, groups = q.shape[1], x.shape[1]
    if heads % groups:
        raise ValueError(f"{operator}: {name} has {groups} heads; the {heads} heads of q must be a multiple of them")


def check_segments(operator: str, segment_ids: Tensor | None, q: Tensor) -> None:
    if segment_ids is None:
        return
    check_shape(operator, "segment_ids", segment_ids, "(B, T)", (q.shape[0], q.shape[2]))
    if segment_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"{operator}: segment_ids has dtype {dtype_name(segment_ids.dtype)}; allowed: integers")
    if segment_ids.device != q.device:
        raise ValueError(f"{operator}: segment_ids is on {segment_ids.device}, but q is on {q.device}; use one")


def check_state(operator: str, state: MLSTMState, q: Tensor, v: Tensor, dtype: torch.dtype) -> None:
    B, H, Dk, Dv = *q.shape[:2], q.shape[-1], v.shape[-1]
    check_shape(operator, "state.C", state.C, "(B, H, Dk, Dv)", (B, H, Dk, Dv))
    check_shape(operator, "state.n", state.n, "(B, H, Dk)", (B, H, Dk))
    check_shape(operator, "state.m", state.m, "(B, H)", (B, H))
    for name, x in zip(state._fields, state, strict=True):
        if x.dtype != dtype:
            raise ValueError(f"{operator}: state.{name} has dtype {dtype_name(x.dtype)}; allowed: {dtype_name(dtype)}")
        if x.device != q.device:
            raise ValueError(f"{operator}: state.{name} is on {x.device}, but q is on {q.device}; use one")

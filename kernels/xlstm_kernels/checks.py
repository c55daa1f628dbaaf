"""Checks of the operators' arguments.

Each raises ValueError in one line that names the argument, its value and what is allowed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from xlstm_kernels.state import MLSTMState, Ring, state_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    segment_ids: Tensor | None,
    state: MLSTMState | None,
) -> None:
    """Check a sequence of the mLSTM, and the state it continues from."""
    check_floats("mlstm", q=q, k=k, v=v, i=i, f=f)
    refuse_forward_mode("mlstm", q, k, v, i, f)
    check_shape("mlstm", "q", q, "(B, H, T, Dk)", (None, None, None, None))
    B, H, T, _ = q.shape
    check_shape("mlstm", "k", k, "(B, H, T, Dk), as q", tuple(q.shape))
    check_shape("mlstm", "v", v, "(B, G, T, Dv)", (B, None, T, None))
    check_groups("mlstm", "v", v, q)
    for name, gate in (("i", i), ("f", f)):
        check_shape("mlstm", name, gate, "(B, H, T)", (B, H, T))
    check_segments("mlstm", segment_ids, q)
    if state is not None:
        check_state("mlstm", state, q, v, state_dtype(q, k, v, i, f))


def check_peer(segment_ids: Tensor | None, state: MLSTMState | None, return_state: bool) -> None:
    """Refuse what backend="mlstm_kernels" cannot do exactly."""
    asked = {
        "segment_ids": segment_ids is not None,
        "state": state is not None,
        "return_state": return_state,
    }
    for name, given in asked.items():
        if given:
            raise ValueError(
                f"mlstm: {name} is given, which backend='mlstm_kernels' does not take; "
                "use 'triton' or 'torch'"
            )


def check_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, segment_ids: Tensor | None
) -> None:
    """Check sliding-window attention."""
    name = "sliding_window_attention"
    check_floats(name, q=q, k=k, v=v)
    refuse_forward_mode(name, q, k, v)
    check_shape(name, "q", q, "(B, H, T, D)", (None, None, None, None))
    B, _, T, D = q.shape
    check_shape(name, "k", k, "(B, G, T, D)", (B, None, T, D))
    check_shape(name, "v", v, "(B, G, T, D), as k", tuple(k.shape))
    check_groups(name, "k", k, q)
    check_segments(name, segment_ids, q)
    for field, count in (("window", window), ("sinks", sinks)):
        if not isinstance(count, int):
            raise ValueError(f"{name}: {field}={count!r} is not allowed; a whole number")
    if window < 1:
        raise ValueError(f"{name}: window={window} is not allowed; at least 1 (the query itself)")
    if sinks < 0:
        raise ValueError(f"{name}: sinks={sinks} is not allowed; 0 or more")


def check_step(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState,
    prefix: str = "",
    index: Tensor | None = None,
) -> None:
    """Check one token of the mLSTM.

    prefix: what the caller's names of q and k start with; the messages use those names.
    """
    query, key = f"{prefix}q", f"{prefix}k"
    check_floats(operator, **{query: q, key: k, "v": v, "i": i, "f": f})
    check_shape(operator, query, q, "(B, H, Dk)", (None, None, None))
    check_shape(operator, key, k, f"(B, H, Dk), as {query}", tuple(q.shape))
    check_shape(operator, "v", v, "(B, G, Dv)", (q.shape[0], None, None))
    check_groups(operator, "v", v, q)
    for name, gate in (("i", i), ("f", f)):
        check_shape(operator, name, gate, "(B, H)", tuple(q.shape[:2]))
    rows = check_index(operator, index, "state.C", state.C, q)
    check_state(operator, state, q, v, state_dtype(q, k, v, i, f), rows)


def check_hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    i: Tensor,
    f: Tensor,
    gate: Tensor,
    state: MLSTMState,
    ring: Ring,
    sinks: int,
    index: Tensor | None = None,
) -> None:
    """Check one token of the hybrid mixer."""
    name = "hybrid_step"
    check_floats(name, q=q, k=k, v=v, gate=gate)
    check_step(name, phi_q, phi_k, v, i, f, state, prefix="phi_", index=index)
    B, H = phi_q.shape[:2]
    check_shape(name, "q", q, "(B, H, D)", (B, H, None))
    check_shape(name, "gate", gate, "(B, H)", (B, H))
    check_window_step(name, q, k, v, ring, sinks, index)


def check_window_step(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    sinks: int,
    index: Tensor | None = None,
) -> None:
    """Check one token of the attention to window and sinks; name: the operator's."""
    check_floats(name, q=q, k=k, v=v, **{"ring.keys": ring.keys, "ring.values": ring.values})
    check_shape(name, "q", q, "(B, H, D)", (None, None, None))
    B, G, D = len(q), v.shape[1], q.shape[-1]
    check_shape(name, "v", v, "(B, G, Dv)", (B, None, None))
    check_groups(name, "v", v, q)
    check_shape(name, "k", k, "(B, G, D)", (B, G, D))
    slots = ring.keys.shape[2] if ring.keys.ndim == 4 else 0
    rows = check_index(name, index, "ring.keys", ring.keys, q)
    check_shape(name, "ring.keys", ring.keys, "(B, G, N + W, D)", (rows, G, None, D))
    if not 0 <= sinks < slots:
        raise ValueError(
            f"{name}: sinks={sinks} is not allowed; the ring's {slots} slots hold 0 to {slots - 1}"
        )
    shape = (rows, G, slots, v.shape[-1])
    check_shape(name, "ring.values", ring.values, "(B, G, N + W, Dv)", shape)
    check_shape(name, "ring.lengths", ring.lengths, "(B,)", (B,))
    if ring.lengths.dtype != torch.int64:
        raise ValueError(
            f"{name}: ring.lengths has dtype {dtype_name(ring.lengths.dtype)}; allowed: int64"
        )
    if ring.lengths.device != q.device:
        raise ValueError(
            f"{name}: ring.lengths is on {ring.lengths.device}, but q is on {q.device}; use one"
        )


def check_scores(
    operator: str, q: Tensor, softcap: float | None, sink_logits: Tensor | None
) -> None:
    """Check what changes the softmax of the attention of q (B, H, ...)."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{operator}: softcap={softcap!r} is not allowed; a number above 0")
    if sink_logits is not None:
        check_floats(operator, q=q, sink_logits=sink_logits)
        check_shape(operator, "sink_logits", sink_logits, "(H,)", (q.shape[1],))


def check_floats(operator: str, **tensors: Tensor) -> None:
    """Refuse a dtype or a device that differs."""
    device = next(iter(tensors.values())).device
    for name, x in tensors.items():
        if x.dtype not in FLOATS:
            allowed = ", ".join(map(dtype_name, FLOATS))
            raise ValueError(
                f"{operator}: {name} has dtype {dtype_name(x.dtype)}; allowed: {allowed}"
            )
        if x.device != device:
            where = f"is on {x.device}, but the first argument is on {device}"
            raise ValueError(f"{operator}: {name} {where}; use one")


def refuse_forward_mode(operator: str, *inputs: Tensor) -> None:
    """Refuse inputs with a tangent: torch would drop it, and the derivative would be 0."""
    if torch.compiler.is_compiling():  # it could not trace the question
        return
    if any(unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            f"{operator}: forward-mode derivatives (jvp) are not implemented; use backward(), or "
            "the operator's float64 reference in xlstm_kernels.reference"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as users write it."""
    return str(dtype).removeprefix("torch.")


def check_shape(
    operator: str, name: str, x: Tensor, letters: str, expected: tuple[int | None, ...]
) -> None:
    """Refuse x unless its shape is `expected`, where None allows any size of at least 1."""
    fits = x.ndim == len(expected)
    if fits:
        sizes = zip(x.shape, expected, strict=True)
        fits = all(size >= 1 if allowed is None else size == allowed for size, allowed in sizes)
    if not fits:
        wanted = ", ".join("any >= 1" if size is None else str(size) for size in expected)
        raise ValueError(
            f"{operator}: {name} has shape {tuple(x.shape)}; expected {letters} = ({wanted})"
        )


def check_groups(operator: str, name: str, x: Tensor, q: Tensor) -> None:
    """Refuse x (B, G, ...) if the heads of q (B, H, ...) are not a multiple of its heads."""
    heads, groups = q.shape[1], x.shape[1]
    if heads % groups:
        allowed = f"the {heads} heads of q must be a multiple of them"
        raise ValueError(f"{operator}: {name} has {groups} heads; {allowed}")


def check_segments(operator: str, segment_ids: Tensor | None, q: Tensor) -> None:
    """Check segment ids (B, T)."""
    if segment_ids is None:
        return
    check_shape(operator, "segment_ids", segment_ids, "(B, T)", (q.shape[0], q.shape[2]))
    if segment_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(
            f"{operator}: segment_ids has dtype {dtype_name(segment_ids.dtype)}; allowed: integers"
        )
    if segment_ids.device != q.device:
        raise ValueError(
            f"{operator}: segment_ids is on {segment_ids.device}, but q is on {q.device}; use one"
        )


def check_index(operator: str, index: Tensor | None, name: str, held: Tensor, q: Tensor) -> int:
    """Check which rows of what is held each token continues; return how many rows that must have.

    index (B,), or None; name: that of `held` (rows, ...). Its values are not read: on a GPU that
    would wait.
    """
    if index is None:
        return len(q)
    check_shape(operator, "index", index, "(B,)", (len(q),))
    if index.dtype != torch.int64:
        raise ValueError(f"{operator}: index has dtype {dtype_name(index.dtype)}; allowed: int64")
    if index.device != q.device:
        raise ValueError(f"{operator}: index is on {index.device}, but q is on {q.device}; use one")
    rows = len(held) if held.ndim else 0
    if rows < len(q):
        raise ValueError(
            f"{operator}: {name} has {rows} rows, but index names {len(q)} different ones"
        )
    return rows


def check_state(
    operator: str,
    state: MLSTMState,
    q: Tensor,
    v: Tensor,
    dtype: torch.dtype,
    rows: int | None = None,
) -> None:
    """Check shapes, dtype and device of a state; rows: how many it must have, by default B."""
    B, H, Dk, Dv = *q.shape[:2], q.shape[-1], v.shape[-1]
    B = B if rows is None else rows
    check_shape(operator, "state.C", state.C, "(B, H, Dk, Dv)", (B, H, Dk, Dv))
    check_shape(operator, "state.n", state.n, "(B, H, Dk)", (B, H, Dk))
    check_shape(operator, "state.m", state.m, "(B, H)", (B, H))
    for name, x in zip(state._fields, state, strict=True):
        if x.dtype != dtype:
            found, allowed = dtype_name(x.dtype), dtype_name(dtype)
            raise ValueError(f"{operator}: state.{name} has dtype {found}; allowed: {allowed}")
        if x.device != q.device:
            raise ValueError(
                f"{operator}: state.{name} is on {x.device}, but q is on {q.device}; use one"
            )

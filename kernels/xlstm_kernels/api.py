"""Public operators: check the arguments, then dispatch to a backend.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from xlstm_kernels.checks import (
    check_hybrid_step,
    check_peer,
    check_scores,
    check_sequence,
    check_step,
    check_window,
    check_window_step,
)
from xlstm_kernels.dispatch import HEAD_DIMS, Backend, choose, score_extras
from xlstm_kernels.registration import without_autocast
from xlstm_kernels.state import MLSTMState, Ring, RingSlots
from xlstm_kernels.torch.absorbed import state_after
from xlstm_kernels.torch.bounded import bounded_attention
from xlstm_kernels.torch.chunkwise import mlstm_chunkwise
from xlstm_kernels.torch.recurrent import (
    hybrid_step_in_place,
    mlstm_step_in_place,
    next_slots,
    window_step_in_place,
)
from xlstm_kernels.torch.window import banded_attention


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
    """Run the mLSTM over a sequence: the exact ratio q S / (q . z).

    Source: the paper's Eq. 8-10; docs/math.md.

    q, k (B, H, T, Dk): after the feature map, not scaled here. v (B, G, T, Dv). i, f (B, H, T):
    preactivations of the exponential input gate and of the sigmoid forget gate. segment_ids (B, T),
    integers: the state restarts where the id changes between neighbours. state: continues into the
    first segment; it is not modified. backend: docs/kernels.md says what each can run.

    Returns h (B, H, T, Dv) in v's dtype and, with return_state, the MLSTMState after the last
    token. Where q . z is exactly 0 (if all keys are 0, say), h and its gradient are 0.

    Computes in float32, or in float64 if an input is float64. Differentiable in q, k, v, i, f and
    in C, n of both states; m is detached. Time and memory are linear in T.

    Raises ValueError, which names the argument, its value and what is allowed.
    """
    check_sequence(q, k, v, i, f, segment_ids, state)
    chosen = choose("mlstm", backend, q, k, v, i, f, dims={"Dk": q.shape[-1], "Dv": v.shape[-1]})
    if chosen == "triton":
        from xlstm_kernels.triton.mlstm import mlstm_triton

        h, final = mlstm_triton(q, k, v, i, f, segment_ids=segment_ids, state=state)
    elif chosen == "mlstm_kernels":
        from xlstm_kernels.peers import mlstm_ones_column

        check_peer(segment_ids, state, return_state)
        return mlstm_ones_column(q, k, v, i, f)
    else:
        h, final = mlstm_chunkwise(q, k, v, i, f, segment_ids=segment_ids, state=state)
    return (h, final) if return_state else h


def mlstm_state(
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    state: MLSTMState,
    segment_ids: Tensor | None = None,
    backend: Backend = "auto",
) -> MLSTMState:
    """Return the state after a sequence that continues `state`, as `mlstm` does, and no outputs.

    On a CPU it takes a quarter of the time of `mlstm`. Shapes and errors as there; not
    differentiable.
    """
    check_sequence(k, k, v, i, f, segment_ids, state)
    chosen = choose("mlstm", backend, k, v, i, f, dims={"Dk": k.shape[-1], "Dv": v.shape[-1]})
    if chosen == "torch" and k.device.type == "cpu":
        return state_after(k, v, i, f, segment_ids=segment_ids, state=state)
    with torch.no_grad():
        # Whatever the queries are, the state is the same.
        return mlstm(
            k,
            k,
            v,
            i,
            f,
            segment_ids=segment_ids,
            state=state,
            return_state=True,
            backend=chosen,
        )[1]


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState,
    *,
    index: Tensor | None = None,
    check: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Advance the mLSTM by one token, updating `state` in place; for decoding.

    q, k (B, H, Dk); v (B, G, Dv); i, f (B, H); state as returned by `mlstm` or `MLSTMState.zeros`.
    index (B,), int64: which row of the state each token continues, each row once; the state may
    then have any number of rows. Without it, the rows of the state are those of the tokens. check:
    whether to check shapes, dtypes and devices, which takes as long as a small layer's operators; a
    loop need not do it again for tensors like those before.

    Returns h (B, H, Dv) in v's dtype. The state's tensors keep their addresses. Never records
    gradients; for those, call `mlstm` with T = 1.

    Raises ValueError, which names the argument, its value and what is allowed.
    """
    if check:
        check_step("mlstm_step", q, k, v, i, f, state, index=index)
    dims = {"Dk": q.shape[-1], "Dv": v.shape[-1]}
    if choose("mlstm_step", backend, q, k, v, i, f, *state, dims=dims) == "triton":
        from xlstm_kernels.triton.step import mlstm_step_triton

        return mlstm_step_triton(q, k, v, i, f, state, index)
    with torch.no_grad(), without_autocast(q.device):
        return mlstm_step_in_place(q, k, v, i, f, state, index)


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    *,
    sinks: int,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slots: RingSlots | None = None,
    index: Tensor | None = None,
    check: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Decode one token of the attention to window and sinks.

    Arguments, and what is updated and returned, as of `hybrid_step`.

    Raises ValueError, which names the argument, its value and what is allowed.
    """
    if check:
        check_window_step("window_step", q, k, v, ring, sinks, index)
        check_scores("window_step", q, softcap, sink_logits)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # On Triton it is the hybrid step without a memory, so that is what must have been checked.
    dims = {"D": q.shape[-1], "Dk": min(HEAD_DIMS), "Dv": v.shape[-1]}
    extras = score_extras(softcap, sink_logits)
    if choose("hybrid_step", backend, q, k, v, dims=dims, extras=extras) == "triton":
        from xlstm_kernels.triton.step import window_step_triton

        return window_step_triton(
            q, k, v, ring, slots,
            sinks=sinks, scale=scale, index=index, softcap=softcap, sink_logits=sink_logits,
        )  # fmt: skip
    with torch.no_grad(), without_autocast(q.device):
        slots = slots or next_slots(ring, sinks)
        return window_step_in_place(q, k, v, ring, slots, scale, index, softcap, sink_logits)


def hybrid_step(
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
    *,
    sinks: int,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slots: RingSlots | None = None,
    index: Tensor | None = None,
    check: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Decode one token of the hybrid mixer: gate * mLSTM + (1 - gate) * attention.

    The attention is to window and sinks. Source: the paper's Eq. 11.

    q (B, H, D), k (B, G, D): after RoPE. v (B, G, Dv). phi_q, phi_k (B, H, Dk): after the feature
    maps. i, f (B, H): preactivations. gate (B, H): the output gate after its sigmoid. scale,
    softcap, sink_logits: as in `sliding_window_attention`. slots: where the token goes, where the
    caller has found it for several layers at once; `ring.lengths` is then neither read nor changed.
    index (B,): as in `mlstm_step`, of the state and of the ring's keys and values; `ring.lengths`
    stays (B,). check: as in `mlstm_step`.

    Updates `state` and `ring` in place; they keep their addresses. The window is the number of
    slots of the ring less the `sinks` (`Ring.empty`). Returns (B, H, Dv) in v's dtype. Never
    records gradients.

    Raises ValueError, which names the argument, its value and what is allowed.
    """
    if check:
        check_hybrid_step(q, k, v, phi_q, phi_k, i, f, gate, state, ring, sinks, index)
        check_scores("hybrid_step", q, softcap, sink_logits)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dims = {"D": q.shape[-1], "Dk": phi_q.shape[-1], "Dv": v.shape[-1]}
    tensors = (q, k, v, phi_q, phi_k, i, f, gate, *state)
    extras = score_extras(softcap, sink_logits)
    if choose("hybrid_step", backend, *tensors, dims=dims, extras=extras) == "triton":
        from xlstm_kernels.triton.step import hybrid_step_triton

        return hybrid_step_triton(
            q, k, v, phi_q, phi_k, i, f, gate, state, ring, slots,
            sinks=sinks, scale=scale, index=index, softcap=softcap, sink_logits=sink_logits,
        )  # fmt: skip
    with torch.no_grad(), without_autocast(q.device):
        slots = slots or next_slots(ring, sinks)
        return hybrid_step_in_place(
            q, k, v, phi_q, phi_k, i, f, gate, state, ring, slots,
            scale=scale, index=index, softcap=softcap, sink_logits=sink_logits,
        )  # fmt: skip


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend to the last `window` tokens and the first `sinks` tokens of the query's document.

    q (B, H, T, D); k, v (B, G, T, D). segment_ids (B, T), integers: a document ends where the id
    changes. Query t sees, once each, the keys s <= t of its document with t - window < s or with s
    one of the document's first `sinks` tokens. scale: factor of q . k, 1 / sqrt(D) by default.
    backend: docs/kernels.md says what each can run.

    softcap: a bound c of the scores x, which are then c tanh(x / c) (Gemma 2). sink_logits (H,): of
    each head one more logit in the softmax's denominator, which belongs to no token, has no value,
    and is not bounded (the learned sinks of gpt-oss; the `sinks` above are tokens). It is
    differentiable.

    Returns (B, H, T, D) in q's dtype. The softmax is exact. Linear in T for a fixed window.

    Raises ValueError, which names the argument, its value and what is allowed.
    """
    check_window(q, k, v, window, sinks, segment_ids)
    check_scores("sliding_window_attention", q, softcap, sink_logits)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    settings: dict[str, Any] = {
        "window": window,
        "sinks": sinks,
        "segment_ids": segment_ids,
        "scale": scale,
    }
    extras, name = score_extras(softcap, sink_logits), "sliding_window_attention"
    dims = {"D": q.shape[-1]}
    if choose(name, backend, q, k, v, dims=dims, sinks=sinks, extras=extras) == "triton":
        from xlstm_kernels.triton.window import window_triton

        return window_triton(q, k, v, **settings, softcap=softcap, sink_logits=sink_logits)
    if extras:
        return bounded_attention(q, k, v, **settings, softcap=softcap, sink_logits=sink_logits)
    return banded_attention(q, k, v, **settings)

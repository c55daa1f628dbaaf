"""What stands in for other modules in a student's own modeling file, which needs torch alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xlstm_kernels.state import MLSTMState, Ring, RingSlots
from xlstm_kernels.torch.absorbed import state_after
from xlstm_kernels.torch.bounded import bounded_attention
from xlstm_kernels.torch.chunkwise import mlstm_chunkwise
from xlstm_kernels.torch.recurrent import (
    hybrid_step_in_place,
    mlstm_step_in_place,
    window_step_in_place,
)
from xlstm_kernels.torch.window import banded_attention


class MixerConfig(SimpleNamespace):
    """The mixer's settings, as `config.mixer` holds them."""


def check_backend(backend: str) -> None:
    """Refuse all kernels but plain torch."""
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"backend: {backend!r} is not in this file, which has plain torch only; install "
            "xlstm-distill, import xlstm_distill, and load the student without trust_remote_code."
        )


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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, MLSTMState]:
    """Run the mLSTM over a sequence, as `xlstm_kernels.mlstm` does in plain torch."""
    check_backend(backend)
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
    backend: str = "auto",
) -> MLSTMState:
    """Return the state after a sequence, as `xlstm_kernels.mlstm_state` does in plain torch."""
    check_backend(backend)
    if k.device.type == "cpu":
        return state_after(k, v, i, f, segment_ids=segment_ids, state=state)
    with torch.no_grad():
        return mlstm_chunkwise(k, k, v, i, f, segment_ids=segment_ids, state=state)[1]


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
    backend: str = "auto",
) -> Tensor:
    """Advance the mLSTM by one token, as `xlstm_kernels.mlstm_step` does in plain torch."""
    check_backend(backend)
    return mlstm_step_in_place(q, k, v, i, f, state, index)


def window_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    *,
    sinks: int,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slots: RingSlots,
    index: Tensor | None = None,
    check: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Decode one token of the attention, as `xlstm_kernels.window_step` does in plain torch."""
    check_backend(backend)
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
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    slots: RingSlots,
    index: Tensor | None = None,
    check: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Decode one token of the mixer, as `xlstm_kernels.hybrid_step` does in plain torch."""
    check_backend(backend)
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
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to the window and the sinks, as `xlstm_kernels` does in plain torch."""
    check_backend(backend)
    settings: dict[str, Any] = {"window": window, "sinks": sinks}
    settings |= {"segment_ids": segment_ids, "scale": scale}
    if softcap is None and sink_logits is None:
        return banded_attention(q, k, v, **settings)
    return bounded_attention(q, k, v, **settings, softcap=softcap, sink_logits=sink_logits)

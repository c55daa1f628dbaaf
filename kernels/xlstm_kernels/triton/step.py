"""Decoding kernels: the mLSTM step, and the whole hybrid step (mLSTM, window and sinks, output gate) in one launch.

One program per head: it reads and writes its part of the state once, all heads and rows at the same time.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of kernels are what Triton makes of a launch: pointers, numbers, tiles.
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.state import MLSTMState, Ring
from xlstm_kernels.triton.common import log_sigmoid, on_device_of

ROWS = 32  # rows of C, and slots of the ring, that a program holds at a time
WARPS = 8


@triton.jit
def advance_state(
    q_ptr, k_ptr, v, i, f, C_ptr, n_ptr, m_ptr, bh, C_row, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Take one token into a head's state, in place, and read it: h (Dv). C_ptr: of the head, rows C_row apart."""
    m = tl.load(m_ptr + bh)
    carried = log_sigmoid(f) + m
    peak = tl.maximum(carried, i)
    decay, write = tl.exp(carried - peak), tl.exp(i - peak)
    dk, dv = tl.arange(0, DK), tl.arange(0, DV)
    n = tl.load(n_ptr + bh * DK + dk) * decay + tl.load(k_ptr + dk).to(tl.float32) * write
    den = tl.sum(tl.load(q_ptr + dk).to(tl.float32) * n, 0)
    tl.debug_barrier()  # every warp has read n and m before one of them writes
    tl.store(n_ptr + bh * DK + dk, n)
    tl.store(m_ptr + bh, peak)
    num = tl.zeros((DV,), tl.float32)
    for d in range(0, DK, BK):
        rows = d + tl.arange(0, BK)
        q = tl.load(q_ptr + rows).to(tl.float32)
        key = tl.load(k_ptr + rows).to(tl.float32) * write
        tile = C_ptr + rows[:, None] * C_row + dv[None, :]
        C = tl.load(tile) * decay + key[:, None] * v[None, :]
        tl.store(tile, C)
        num += tl.sum(q[:, None] * C, 0)
    return tl.where(den == 0.0, 0.0, num / tl.where(den == 0.0, 1.0, den))


@triton.jit
def step_kernel(
    q_ptr, k_ptr, v_ptr, i_ptr, f_ptr, C_ptr, n_ptr, m_ptr, h_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, i_b, i_h, f_b, f_h, C_b, C_h, C_row, H, R,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Advance one head by one token. Grid (B H)."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    dv = tl.arange(0, DV)
    i = tl.load(i_ptr + b * i_b + h * i_h).to(tl.float32)
    f = tl.load(f_ptr + b * f_b + h * f_h).to(tl.float32)
    v = tl.load(v_ptr + b * v_b + (h // R) * v_h + dv).to(tl.float32)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    C_ptr += b * C_b + h * C_h
    out = advance_state(q_ptr, k_ptr, v, i, f, C_ptr, n_ptr, m_ptr, bh, C_row, DK, DV, BK)
    tl.store(h_ptr + bh * DV + dv, out.to(h_ptr.dtype.element_ty))


@triton.jit
def attend_ring(
    q, key, value, keys_ptr, values_ptr, seen, window, sinks,
    D: tl.constexpr, DV: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Softmax attention of scaled q (D) to the new token and to the slots that it sees.

    What a slot holds follows from `seen`, the tokens before this one. The slot that the new token overwrites never is
    visible, so programs of the same group may read while one of them writes.
    """
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    peak = tl.sum(q * key, 0)
    total = peak * 0.0 + 1.0
    out = value
    for start in range(0, sinks + window, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        in_ring = slot >= sinks
        at = tl.where(in_ring, slot - sinks, slot)
        held = tl.where(in_ring, seen - 1 - tl.maximum(seen - 1 - at, 0) % window, at)
        filled = (slot < sinks + window) & (at < seen)
        visible = filled & (in_ring == (held > seen - window))
        k = tl.load(keys_ptr + slot[:, None] * D + d[None, :], mask=visible[:, None], other=0.0).to(
            tl.float32
        )
        v = tl.load(
            values_ptr + slot[:, None] * DV + dv[None, :], mask=visible[:, None], other=0.0
        ).to(tl.float32)
        scores = tl.where(visible, tl.sum(q[None, :] * k, 1), float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 0))
        weights, shrink = tl.exp(scores - higher), tl.exp(peak - higher)
        total = total * shrink + tl.sum(weights, 0)
        out = out * shrink + tl.sum(weights[:, None] * v, 0)
        peak = higher
    return out / total


@triton.jit
def hybrid_step_kernel(
    q_ptr, k_ptr, v_ptr, phi_q_ptr, phi_k_ptr, i_ptr, f_ptr, gate_ptr, C_ptr, n_ptr, m_ptr,
    keys_ptr, values_ptr, positions_ptr, lengths_ptr, out_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, phi_q_b, phi_q_h, phi_k_b, phi_k_h, i_b, i_h, f_b, f_h, gate_b, gate_h,
    C_b, C_h, C_row, scale, H, R, window, sinks,
    D: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Decode one token of one head: mLSTM, attention to ring and sinks, gate; the group's first head stores k, v."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    g = h // R
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    seen = tl.load(lengths_ptr + b)
    q = tl.load(q_ptr + b * q_b + h * q_h + d).to(tl.float32) * scale
    v = tl.load(v_ptr + b * v_b + g * v_h + dv).to(tl.float32)
    key = tl.load(k_ptr + b * k_b + g * k_h + d).to(
        keys_ptr.dtype.element_ty
    )  # attended to as the ring holds it
    value = v.to(values_ptr.dtype.element_ty)
    first_slot = (b * (H // R) + g) * (sinks + window)
    keys_ptr += first_slot * D
    values_ptr += first_slot * DV
    attended = attend_ring(
        q,
        key.to(tl.float32),
        value.to(tl.float32),
        keys_ptr,
        values_ptr,
        seen,
        window,
        sinks,
        D,
        DV,
        SLOTS,
    )
    i = tl.load(i_ptr + b * i_b + h * i_h).to(tl.float32)
    f = tl.load(f_ptr + b * f_b + h * f_h).to(tl.float32)
    phi_q_ptr += b * phi_q_b + h * phi_q_h
    phi_k_ptr += b * phi_k_b + h * phi_k_h
    C_ptr += b * C_b + h * C_h
    recalled = advance_state(
        phi_q_ptr, phi_k_ptr, v, i, f, C_ptr, n_ptr, m_ptr, bh, C_row, DK, DV, BK
    )
    gate = tl.load(gate_ptr + b * gate_b + h * gate_h).to(tl.float32)
    out = attended + gate * (recalled - attended)
    tl.store(out_ptr + bh * DV + dv, out.to(out_ptr.dtype.element_ty))
    ring_slot = sinks + seen % window
    if h % R == 0:
        tl.store(keys_ptr + ring_slot * D + d, key)
        tl.store(values_ptr + ring_slot * DV + dv, value)
        if seen < sinks:
            tl.store(keys_ptr + seen * D + d, key)
            tl.store(values_ptr + seen * DV + dv, value)
    if h == 0:
        positions_ptr += b * (sinks + window)
        tl.store(positions_ptr + ring_slot, seen)
        if seen < sinks:
            tl.store(positions_ptr + seen, seen)


@torch.no_grad()
def mlstm_step_triton(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState
) -> Tensor:
    """Advance `state` in one launch; shapes as in `xlstm_kernels.mlstm_step`, which validates them."""
    (B, H, Dk), Dv = q.shape, v.shape[-1]
    q, k, v = (_rows(x) for x in (q, k, v))
    h = torch.empty(B, H, Dv, dtype=v.dtype, device=v.device)
    held = [_rows(state.C), *(x.contiguous() for x in state[1:])]
    strides = [n for x in (q, k, v, i, f) for n in x.stride()[:2]] + [*held[0].stride()[:3]]
    with on_device_of(q):
        step_kernel[(B * H,)](
            q,
            k,
            v,
            i,
            f,
            *held,
            h,
            *strides,
            H,
            H // v.shape[1],
            DK=Dk,
            DV=Dv,
            BK=min(ROWS, Dk),
            num_warps=WARPS,
        )
    _write_back(held, state)
    return h


@torch.no_grad()
def hybrid_step_triton(
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
    scale: float,
) -> Tensor:
    """Decode one token in two launches (the second counts it); shapes as in `xlstm_kernels.hybrid_step`."""
    (B, H, D), Dv, Dk = q.shape, v.shape[-1], phi_q.shape[-1]
    q, k, v, phi_q, phi_k = (_rows(x) for x in (q, k, v, phi_q, phi_k))
    out = torch.empty(B, H, Dv, dtype=v.dtype, device=v.device)
    held = [_rows(state.C), *(x.contiguous() for x in (*state[1:], *ring))]
    strides = [n for x in (q, k, v, phi_q, phi_k, i, f, gate) for n in x.stride()[:2]] + [
        *held[0].stride()[:3]
    ]
    with on_device_of(q):
        hybrid_step_kernel[(B * H,)](
            q, k, v, phi_q, phi_k, i, f, gate, *held, out, *strides, scale, H, H // k.shape[1],
            ring.positions.shape[1] - sinks, sinks, D=D, DK=Dk, DV=Dv, BK=min(ROWS, Dk), SLOTS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    _write_back(held, (*state, *ring))
    ring.lengths.add_(1)
    return out


def _write_back(held: Sequence[Tensor], owners: Sequence[Tensor]) -> None:
    """Copy what was updated in a contiguous copy of a tensor into the tensor, and tell autograd that it changed."""
    for x, owner in zip(held, owners, strict=True):
        if x is not owner:
            owner.copy_(x)
    if not torch.compiler.is_compiling():  # the compiler knows what a kernel writes
        torch.autograd.graph.increment_version([x for x in owners if not x.is_inference()])


def _rows(x: Tensor) -> Tensor:
    """Make the last dimension adjacent in memory; other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()

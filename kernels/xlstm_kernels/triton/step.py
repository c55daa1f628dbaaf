"""Decoding kernels: the mLSTM step, and the whole hybrid step in one launch.

The hybrid step is the mLSTM step, attention to window and sinks, and the output gate. One program
per head of a row reads and writes its part of the state once; all heads run at the same time.
The letters and names are those of `triton/common.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton gives the arguments of kernels their types at launch: pointers, numbers or tiles.
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from xlstm_kernels.state import MLSTMState, Ring, RingSlots, state_dtype
from xlstm_kernels.triton.common import contiguous_rows, log_sigmoid, on_device_of

ROWS_AT_ONCE = 32  # rows of C, and slots of the ring, that a program holds at a time
WARPS = 8


@triton.jit
def advance_state(
    q_ptr, k_ptr, v, i, f, C_ptr, n_ptr, m_ptr, bh, C_row,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Update the state of one head by one token, in place, and return h (Dv).

    C_ptr points to the C of the head, whose rows are C_row apart. The four lines of docs/math.md,
    "Stabilised recurrence".
    """
    m = tl.load(m_ptr + bh)
    log_decay = log_sigmoid(f) + m
    m_new = tl.maximum(log_decay, i)
    decay, write = tl.exp(log_decay - m_new), tl.exp(i - m_new)
    dk, dv = tl.arange(0, DK), tl.arange(0, DV)
    n = tl.load(n_ptr + bh * DK + dk) * decay + tl.load(k_ptr + dk).to(tl.float32) * write
    den = tl.sum(tl.load(q_ptr + dk).to(tl.float32) * n, 0)
    # Several warps load the same n and m: all must have read them before one of them writes.
    tl.debug_barrier()
    tl.store(n_ptr + bh * DK + dk, n)
    tl.store(m_ptr + bh, m_new)
    num = tl.zeros((DV,), tl.float32)
    for d in range(0, DK, BK):
        rows = d + tl.arange(0, BK)
        q = tl.load(q_ptr + rows).to(tl.float32)
        key = tl.load(k_ptr + rows).to(tl.float32) * write
        # 32 bits are enough inside one C (`near_rows`). 64 would take half as many registers again.
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
    """Update the state of one head by one token and read it. Grid (B H)."""
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
    """Attend from the scaled query q (D) to the new token and to the slots that it sees.

    `seen` counts the tokens before this one; what a slot holds follows from it. The slot that the
    new token overwrites is never visible, so programs of the same group may read the ring while
    one of them writes to it.
    """
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    # A running softmax, as flash attention has it; it starts with the new token alone.
    largest = tl.sum(q * key, 0)
    total = largest * 0.0 + 1.0
    out = value
    for start in range(0, sinks + window, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        in_ring = slot >= sinks
        offset = tl.where(in_ring, slot - sinks, slot)
        # Position, in the document, of the token that the slot holds: in the ring, the latest token
        # before this one whose position is `offset` modulo the window.
        latest = seen - 1 - tl.maximum(seen - 1 - offset, 0) % window
        held = tl.where(in_ring, latest, offset)
        filled = (slot < sinks + window) & (offset < seen)
        # A sink that is still in the ring is read from there, and its own slot is not visible.
        visible = filled & (in_ring == (held > seen - window))
        mask = visible[:, None]
        # 32-bit offsets: a ring has fewer than 2^31 values (`hybrid_step_triton`). 64 bits would
        # take half as many registers again.
        k_tile = keys_ptr + slot[:, None] * D + d[None, :]
        k = tl.load(k_tile, mask=mask, other=0.0).to(tl.float32)
        v_tile = values_ptr + slot[:, None] * DV + dv[None, :]
        v = tl.load(v_tile, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(visible, tl.sum(q[None, :] * k, 1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights, rescale = tl.exp(scores - new_largest), tl.exp(largest - new_largest)
        total = total * rescale + tl.sum(weights, 0)
        out = out * rescale + tl.sum(weights[:, None] * v, 0)
        largest = new_largest
    return out / total


@triton.jit
def hybrid_step_kernel(
    q_ptr, k_ptr, v_ptr, phi_q_ptr, phi_k_ptr, i_ptr, f_ptr, gate_ptr, C_ptr, n_ptr, m_ptr,
    keys_ptr, values_ptr, before_ptr, out_ptr,
    q_b, q_h, k_b, k_h, v_b, v_h, phi_q_b, phi_q_h, phi_k_b, phi_k_h,
    i_b, i_h, f_b, f_h, gate_b, gate_h, C_b, C_h, C_row, scale, H, R, window, sinks,
    D: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Decode one token of one head: mLSTM, attention to ring and sinks, output gate. Grid (B H).

    before_ptr: tokens of each row before this one. The first head of a group stores the new key and
    value. Both branches are rounded before they are mixed, as in a sequence.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    g = h // R
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    seen = tl.load(before_ptr + b).to(tl.int32)  # a document has fewer than 2^31 tokens
    q = tl.load(q_ptr + b * q_b + h * q_h + d).to(tl.float32) * scale
    v = tl.load(v_ptr + b * v_b + g * v_h + dv).to(tl.float32)
    # The new token is attended to as the ring will hold it, as later steps do.
    key = tl.load(k_ptr + b * k_b + g * k_h + d).to(keys_ptr.dtype.element_ty)
    value = v.to(values_ptr.dtype.element_ty)
    first_slot = (b * (H // R) + g) * (sinks + window)
    keys_ptr += first_slot * D
    values_ptr += first_slot * DV
    # Before the attention, which never sees the slot: at the end, it takes half as many registers
    # again.
    ring_slot = sinks + seen % window
    if h % R == 0:
        tl.store(keys_ptr + ring_slot * D + d, key)
        tl.store(values_ptr + ring_slot * DV + dv, value)
        if seen < sinks:
            tl.store(keys_ptr + seen * D + d, key)
            tl.store(values_ptr + seen * DV + dv, value)
    attended = attend_ring(
        q, key.to(tl.float32), value.to(tl.float32), keys_ptr, values_ptr, seen, window, sinks,
        D, DV, SLOTS,
    )  # fmt: skip
    i = tl.load(i_ptr + b * i_b + h * i_h).to(tl.float32)
    f = tl.load(f_ptr + b * f_b + h * f_h).to(tl.float32)
    phi_q_ptr += b * phi_q_b + h * phi_q_h
    phi_k_ptr += b * phi_k_b + h * phi_k_h
    C_ptr += b * C_b + h * C_h
    recalled = advance_state(
        phi_q_ptr, phi_k_ptr, v, i, f, C_ptr, n_ptr, m_ptr, bh, C_row, DK, DV, BK
    )
    gate = tl.load(gate_ptr + b * gate_b + h * gate_h).to(tl.float32)
    rounded = out_ptr.dtype.element_ty
    attended, recalled = attended.to(rounded).to(tl.float32), recalled.to(rounded).to(tl.float32)
    out = attended + gate * (recalled - attended)
    tl.store(out_ptr + bh * DV + dv, out.to(rounded))


@torch.no_grad()
def mlstm_step_triton(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState
) -> Tensor:
    """Advance `state` in one launch.

    Shapes as in `xlstm_kernels.mlstm_step`, which checks the arguments.
    """
    (B, H, Dk), Dv = q.shape, v.shape[-1]
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    h = torch.empty(B, H, Dv, dtype=v.dtype, device=v.device)
    C, n, m = held = [near_rows(state.C), state.n.contiguous(), state.m.contiguous()]
    with on_device_of(q):
        step_kernel[(B * H,)](
            q_ptr=q, k_ptr=k, v_ptr=v, i_ptr=i, f_ptr=f, C_ptr=C, n_ptr=n, m_ptr=m, h_ptr=h,
            **head_strides(q=q, k=k, v=v, i=i, f=f, C=C), C_row=C.stride(2), H=H, R=H // v.shape[1],
            DK=Dk, DV=Dv, BK=min(ROWS_AT_ONCE, Dk), num_warps=WARPS,
        )  # fmt: skip
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
    slots: RingSlots | None,
    *,
    sinks: int,
    scale: float,
) -> Tensor:
    """Decode one token in one launch; without `slots`, a second one counts the token.

    Shapes as in `xlstm_kernels.hybrid_step`, which checks the arguments.
    """
    (B, H, D), Dv, Dk = q.shape, v.shape[-1], phi_q.shape[-1]
    count = ring.keys.shape[2]
    if count * max(D, Dv) >= 2**31:
        raise ValueError(
            f"hybrid_step: backend='triton' has no kernel for a ring of {count} slots of "
            f"{max(D, Dv)} values, 2^31 or more; use backend='torch'"
        )
    q, k, v, phi_q, phi_k = (contiguous_rows(x) for x in (q, k, v, phi_q, phi_k))
    out = torch.empty(B, H, Dv, dtype=v.dtype, device=v.device)
    written = (*state[1:], ring.keys, ring.values)
    held = [near_rows(state.C), *(x.contiguous() for x in written)]
    C, n, m, keys, values = held
    before = ring.lengths if slots is None else slots.before
    with on_device_of(q):
        hybrid_step_kernel[(B * H,)](
            q_ptr=q, k_ptr=k, v_ptr=v, phi_q_ptr=phi_q, phi_k_ptr=phi_k,
            i_ptr=i, f_ptr=f, gate_ptr=gate, C_ptr=C, n_ptr=n, m_ptr=m,
            keys_ptr=keys, values_ptr=values, before_ptr=before.contiguous(), out_ptr=out,
            **head_strides(q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, i=i, f=f, gate=gate, C=C),
            C_row=C.stride(2), scale=scale, H=H, R=H // k.shape[1],
            window=count - sinks, sinks=sinks,
            D=D, DK=Dk, DV=Dv, BK=min(ROWS_AT_ONCE, Dk), SLOTS=ROWS_AT_ONCE, num_warps=WARPS,
            maxnreg=_registers(max(D, Dv, Dk), v.element_size()),
        )  # fmt: skip
    _write_back(held, (state.C, *written))
    if slots is None:
        ring.lengths.add_(1)
    return out


def _registers(width: int, size: int) -> int:
    """Return the registers of a thread, for heads of `width` numbers of `size` bytes.

    ptxas takes half as many again, which spares no load: three or four programs on an SM become
    two. None of these spills (tests/kernels/triton/test_resources.py).
    """
    return 48 + width // (2 * size)


@torch.no_grad()
def window_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    slots: RingSlots | None,
    *,
    sinks: int,
    scale: float,
    width: int,
) -> Tensor:
    """Decode one token of the attention, by the hybrid kernel with a closed gate and no memory.

    Shapes as in `xlstm_kernels.window_step`, which checks the arguments. width: of the features, 0
    all of them; the narrowest that have a kernel.
    """
    B, H, _ = q.shape
    features, closed = q.new_zeros(B, H, width), q.new_zeros(B, H)
    state = MLSTMState.zeros(B, H, width, v.shape[-1], dtype=state_dtype(q, v), device=q.device)
    return hybrid_step_triton(
        q, k, v, features, features, closed, closed, closed, state, ring, slots,
        sinks=sinks, scale=scale,
    )  # fmt: skip


def near_rows(C: Tensor) -> Tensor:
    """Copy C if its rows are so far apart that 32-bit offsets do not reach the last one."""
    return contiguous_rows(C) if C.stride(2) * C.shape[2] < 2**31 else C.contiguous()


def head_strides(**tensors: Tensor) -> dict[str, int]:
    """Name the strides of (B, heads, ...) tensors as the kernels do: q_b and q_h for q."""
    named = {}
    for name, x in tensors.items():
        named[f"{name}_b"], named[f"{name}_h"] = x.stride()[:2]
    return named


def _write_back(held: Sequence[Tensor], owners: Sequence[Tensor]) -> None:
    """Copy what the kernel updated into its owners, and tell autograd that they changed.

    held: what the kernel wrote to: the owner itself or, if its strides did not fit, a copy.
    """
    for x, owner in zip(held, owners, strict=True):
        if x is not owner:
            owner.copy_(x)
    if not torch.compiler.is_compiling():  # the compiler knows what a kernel writes
        torch.autograd.graph.increment_version([x for x in owners if not x.is_inference()])

"""One decoding step on Triton: launches the kernels of `step_kernels.py`.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xlstm_kernels.state import MLSTMState, Ring, RingSlots
from xlstm_kernels.triton import step_kernels as kernels
from xlstm_kernels.triton.common import contiguous_rows, on_device_of

COLUMNS = 32  # of C, of a program
RING_BYTES = 8192  # of keys, and of values, of a program
MOST_SLOTS = 64
FEWEST_ROWS = 4
STEP_WARPS, HYBRID_WARPS = 8, 4  # by registers and programs on an SM, as the table's settings

# Counters by the state or ring that a step changes: two steps cannot change one at a time, so no
# two steps count on one counter at a time. All that were made for it stay as long as it: a captured
# graph counts at the addresses that it was captured with.
_counters = WeakTensorKeyDictionary()


def counters(owner: Tensor, count: int) -> Tensor:
    """Return `count` or more counters of this tensor's programs, which are 0 between steps."""
    if torch.compiler.is_compiling():
        return torch.zeros(count, dtype=torch.int32, device=owner.device)
    made: list[Tensor] = _counters.setdefault(owner, [])
    if made and len(made[-1]) >= count:
        return made[-1]
    # Twice as many each time, so that what stays is less than twice the last.
    size = triton.next_power_of_2(count)
    found = torch.zeros(size, dtype=torch.int32, device=owner.device)
    # In a graph that is being captured, they are only made 0 when it is replayed.
    if not (owner.is_cuda and torch.cuda.is_current_stream_capturing()):
        made.append(found)
    return found


@torch.no_grad()
def mlstm_step_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MLSTMState,
    index: Tensor | None = None,
) -> Tensor:
    """Advance `state` in one launch.

    Shapes as in `xlstm_kernels.mlstm_step`, which checks the arguments.
    """
    (B, H, Dk), Dv = q.shape, v.shape[-1]
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    h = torch.empty(B, H, Dv, dtype=v.dtype, device=v.device)
    C, n, m = near_rows(state.C), *state[1:]
    columns = min(COLUMNS, Dv)
    with on_device_of(q):
        kernels.step_kernel[(B * H * (Dv // columns),)](
            q_ptr=q, k_ptr=k, v_ptr=v, i_ptr=i, f_ptr=f, C_ptr=C, n_ptr=n, m_ptr=m,
            index_ptr=None if index is None else index.contiguous(),
            arrived_ptr=counters(state.C, B * H), h_ptr=h,
            **head_strides(q=q, k=k, v=v, i=i, f=f, C=C, n=n, m=m),
            C_row=C.stride(2), n_k=n.stride(2), H=H, R=H // v.shape[1],
            DK=Dk, DV=Dv, BV=columns, num_warps=STEP_WARPS,
        )  # fmt: skip
    _write_back((C, n, m), state)
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
    index: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Decode one token in one launch, which also counts it unless there are `slots`.

    Shapes as in `xlstm_kernels.hybrid_step`, which checks the arguments.
    """
    phi_q, phi_k = contiguous_rows(phi_q), contiguous_rows(phi_k)
    C, n, m = near_rows(state.C), *state[1:]
    memory = {"phi_q": phi_q, "phi_k": phi_k, "i": i, "f": f, "gate": gate, "C": C, "n": n, "m": m}
    attention: dict[str, Any] = {
        "sinks": sinks,
        "scale": scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
    }
    arrived = counters_of(state.C, v)
    out = _decode(q, k, v, memory, arrived, ring, slots, index, **attention)
    _write_back((C, n, m), state)
    return out


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
    index: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Decode one token of the attention, by the hybrid kernel without its memory.

    Shapes as in `xlstm_kernels.window_step`, which checks the arguments.
    """
    memory = dict.fromkeys(("phi_q", "phi_k", "i", "f", "gate", "C", "n", "m"))
    arrived = counters_of(ring.keys, v)
    attention: dict[str, Any] = {
        "sinks": sinks,
        "scale": scale,
        "softcap": softcap,
        "sink_logits": sink_logits,
    }
    return _decode(q, k, v, memory, arrived, ring, slots, index, **attention)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: dict[str, Tensor] | dict[str, None],
    arrived: Tensor,
    ring: Ring,
    slots: RingSlots | None,
    index: Tensor | None,
    *,
    sinks: int,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Launch the hybrid kernel. memory: what the mLSTM takes, by the kernel's names."""
    (B, H, D), (G, Dv), count = q.shape, v.shape[1:], ring.keys.shape[2]
    if count * max(D, Dv) >= 2**31:
        raise ValueError(
            f"hybrid_step: backend='triton' has no kernel for a ring of {count} slots of "
            f"{max(D, Dv)} values, 2^31 or more; use backend='torch'"
        )
    R, columns, C, n = H // G, min(COLUMNS, Dv), memory["C"], memory["n"]
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    keys, values = (adjacent_slots(x) for x in ring[:2])
    lengths = ring.lengths.contiguous() if slots is None else None
    at_once = min(MOST_SLOTS, max(16, RING_BYTES // (max(D, Dv) * keys.element_size())))
    splits = -(-count // at_once)
    parts = splits if C is None else splits + R * (Dv // columns)
    out = torch.empty(B, H, Dv, dtype=v.dtype, device=v.device)
    shapes = {
        "recalled": (B, H, Dv),
        "sums": (B, G, splits, R, 2),
        "attended": (B, G, splits, R, Dv),
    }
    handed = {f"{name}_ptr": torch.empty(shape, device=v.device) for name, shape in shapes.items()}
    with on_device_of(q):
        kernels.hybrid_step_kernel[(B * G * parts,)](
            q_ptr=q, k_ptr=k, v_ptr=v, **{f"{name}_ptr": x for name, x in memory.items()},
            keys_ptr=keys, values_ptr=values,
            before_ptr=lengths if slots is None else slots.before.contiguous(),
            lengths_ptr=lengths, index_ptr=None if index is None else index.contiguous(),
            sink_logits_ptr=None if sink_logits is None else sink_logits.contiguous(),
            **handed, arrived_ptr=arrived, out_ptr=out,
            **head_strides(q=q, k=k, v=v, keys=keys, values=values, **memory),
            C_row=0 if C is None else C.stride(2), n_k=0 if n is None else n.stride(2),
            scale=scale, G=G, R=R, splits=splits, window=count - sinks, sinks=sinks,
            D=D, DK=1 if C is None else C.shape[2], DV=Dv, BV=columns, SLOTS=at_once,
            RP=head_rows(R), CAP=softcap or 0.0, num_warps=HYBRID_WARPS,
        )  # fmt: skip
    _write_back((keys, values), ring[:2])
    if lengths is not None:
        _write_back((lengths,), (ring.lengths,))
    return out


def counters_of(owner: Tensor, v: Tensor) -> Tensor:
    """Return a counter for each group of v (B, G, Dv), then one for each row."""
    return counters(owner, v.shape[0] * (v.shape[1] + 1))


def head_rows(heads: int) -> int:
    """Return the rows of a tile of a group's heads; the same for 2 to 4, which share a kernel."""
    return 1 if heads == 1 else max(FEWEST_ROWS, triton.next_power_of_2(heads))


def adjacent_slots(x: Tensor) -> Tensor:
    """Copy the keys or values of a ring unless the slots of each group adjoin in memory."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


def near_rows(C: Tensor) -> Tensor:
    """Copy C if its rows are so far apart that 32-bit offsets do not reach the last one."""
    return contiguous_rows(C) if C.stride(2) * C.shape[2] < 2**31 else C.contiguous()


def head_strides(**tensors: Tensor | None) -> dict[str, int]:
    """Name the strides of (B, heads, ...) tensors as the kernels do: q_b and q_h for q."""
    named = {}
    for name, x in tensors.items():
        named[f"{name}_b"], named[f"{name}_h"] = (0, 0) if x is None else x.stride()[:2]
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

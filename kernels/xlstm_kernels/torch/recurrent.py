"""One decoding step, in place: of the mLSTM, and of the whole hybrid mixer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.state import MLSTMState, Ring


@torch.no_grad()
def mlstm_step_in_place(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState
) -> Tensor:
    """Update `state` by one token and read it: the four lines of docs/math.md.

    Shapes as in `xlstm_kernels.mlstm_step`, which checks the arguments. Returns h in the state's
    dtype.
    """
    C, n, m = state
    G = v.shape[1]
    q, k, v, i, f = (x.to(C.dtype) for x in (q, k, v, i, f))
    log_decay = F.logsigmoid(f) + m
    m_new = torch.maximum(log_decay, i)
    decay = (log_decay - m_new).exp().unsqueeze(-1)  # (B, H, 1)
    key = k * (i - m_new).exp().unsqueeze(-1)  # (B, H, Dk)
    n.mul_(decay).add_(key)
    C.mul_(decay.unsqueeze(-1))
    # The heads of a group share v, which is broadcast over them and never repeated in memory.
    C.unflatten(1, (G, -1)).addcmul_(key.unflatten(1, (G, -1)).unsqueeze(-1), v[:, :, None, None])
    m.copy_(m_new)
    num, den = (q.unsqueeze(-2) @ C).squeeze(-2), (q * n).sum(dim=-1, keepdim=True)
    return torch.where(den == 0, 0.0, num / den)


@torch.no_grad()
def hybrid_step_in_place(
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
) -> Tensor:
    """Update `state` and `ring` by one token and read both.

    Shapes as in `xlstm_kernels.hybrid_step`, which checks the arguments. Returns the output in the
    state's dtype.
    """
    append_to_ring(k, v, ring, sinks)
    slots = ring.positions.shape[1]
    oldest = (ring.lengths - (slots - sinks))[:, None]  # first position of the window
    in_ring = torch.arange(slots, device=q.device) >= sinks
    # A sink that is still in the window is read from the ring only, so that it counts once.
    visible = (ring.positions >= 0) & (in_ring | (ring.positions < oldest))
    attended = F.scaled_dot_product_attention(
        q.unsqueeze(2), ring.keys.to(q.dtype), ring.values.to(q.dtype),
        attn_mask=visible[:, None, None], scale=scale, enable_gqa=True,
    ).squeeze(2)  # fmt: skip
    recalled = mlstm_step_in_place(phi_q, phi_k, v, i, f, state)
    attended = attended.to(recalled.dtype)
    return torch.lerp(attended, recalled, gate.to(recalled.dtype).unsqueeze(-1))


def append_to_ring(k: Tensor, v: Tensor, ring: Ring, sinks: int) -> None:
    """Store one token, k (B, G, D) and v (B, G, Dv), in the ring and, if it is one, as a sink."""
    window = ring.positions.shape[1] - sinks
    ring_slot = sinks + ring.lengths % window  # (B,)
    # Once the sinks are full, the second slot is the first again: the shapes do not depend on data.
    sink_slot = torch.where(ring.lengths < sinks, ring.lengths, ring_slot)
    slots = torch.stack([ring_slot, sink_slot], dim=1)  # (B, 2)
    for held, new in ((ring.keys, k), (ring.values, v)):
        index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[2])
        held.scatter_(2, index, new.to(held.dtype).unsqueeze(2).expand(-1, -1, 2, -1))
    ring.positions.scatter_(1, slots, ring.lengths[:, None].expand(-1, 2))
    ring.lengths.add_(1)

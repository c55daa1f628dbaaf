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
    """Update `state` by one token and read it; shapes as in `xlstm_kernels.mlstm_step`, which validates them."""
    C, n, m = state
    G = v.shape[1]
    q, k, v, i, f = (x.to(C.dtype) for x in (q, k, v, i, f))
    carried = F.logsigmoid(f) + m
    peak = torch.maximum(carried, i)
    decay = (carried - peak).exp().unsqueeze(-1)  # (B, H, 1)
    key = k * (i - peak).exp().unsqueeze(-1)  # (B, H, Dk)
    n.mul_(decay).add_(key)
    C.mul_(decay.unsqueeze(-1))
    C.unflatten(1, (G, -1)).addcmul_(key.unflatten(1, (G, -1)).unsqueeze(-1), v[:, :, None, None])
    m.copy_(peak)
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
    sinks: int,
    scale: float,
) -> Tensor:
    """Update `state` and `ring` by one token and read both; shapes as in `xlstm_kernels.hybrid_step`."""
    append_to_ring(k, v, ring, sinks)
    oldest = (ring.lengths - (ring.positions.shape[1] - sinks))[:, None]
    in_ring = torch.arange(ring.positions.shape[1], device=q.device) >= sinks
    visible = (ring.positions >= 0) & (
        in_ring | (ring.positions < oldest)
    )  # a sink still in the ring counts once
    attended = F.scaled_dot_product_attention(
        q.unsqueeze(2), ring.keys.to(q.dtype), ring.values.to(q.dtype), attn_mask=visible[:, None, None], scale=scale,
        enable_gqa=True,
    ).squeeze(2)  # fmt: skip
    recalled = mlstm_step_in_place(phi_q, phi_k, v, i, f, state)
    attended = attended.to(recalled.dtype)
    return torch.lerp(attended, recalled, gate.to(recalled.dtype).unsqueeze(-1))


def append_to_ring(k: Tensor, v: Tensor, ring: Ring, sinks: int) -> None:
    """Store one token, k (B, G, D) and v (B, G, Dv): in the ring, and in the sinks while there are fewer than N."""
    window = ring.positions.shape[1] - sinks
    at = sinks + ring.lengths % window  # (B,)
    slots = torch.stack([at, torch.where(ring.lengths < sinks, ring.lengths, at)], dim=1)  # (B, 2)
    for held, new in ((ring.keys, k), (ring.values, v)):
        index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[2])
        held.scatter_(2, index, new.to(held.dtype).unsqueeze(2).expand(-1, -1, 2, -1))
    ring.positions.scatter_(1, slots, ring.lengths[:, None].expand(-1, 2))
    ring.lengths.add_(1)

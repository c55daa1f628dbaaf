"""One decoding step of the mLSTM, in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.state import MLSTMState


@torch.no_grad()
def mlstm_step_in_place(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: MLSTMState) -> Tensor:
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

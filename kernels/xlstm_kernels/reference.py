"""The truth: both operators token by token, written to be read. Pass float64 tensors; slow on purpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.state import MLSTMState


def mlstm_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None = None,
    state: MLSTMState | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Run the stabilised recurrence one token at a time; shapes as in `xlstm_kernels.mlstm`.

    Source: the paper's Eq. 8-10, with the stabiliser of docs/math.md. Returns h (B, H, T, Dv) and the final state.
    """
    B, H, T, Dk = q.shape
    v = v.repeat_interleave(H // v.shape[1], dim=1)
    C, n, m = state or MLSTMState.zeros(B, H, Dk, v.shape[-1], dtype=q.dtype, device=q.device)
    outputs = []
    for t in range(T):
        log_f, log_i = F.logsigmoid(f[:, :, t]), i[:, :, t]  # (B, H)
        keeps = torch.ones(B, dtype=torch.bool, device=q.device)
        if segment_ids is not None and t > 0:
            keeps = segment_ids[:, t] == segment_ids[:, t - 1]
        carried = torch.where(
            keeps[:, None],
            log_f + m,
            MLSTMState.zeros(B, H, 1, 1, dtype=q.dtype, device=q.device).m,
        )
        peak = torch.maximum(carried, log_i).detach()
        decay, write = (carried - peak).exp(), (log_i - peak).exp()
        key, value = k[:, :, t], v[:, :, t]
        C = decay[..., None, None] * C + write[..., None, None] * key.unsqueeze(
            -1
        ) * value.unsqueeze(-2)
        n = decay[..., None] * n + write[..., None] * key
        m = peak
        num = (q[:, :, t, :, None] * C).sum(dim=-2)
        den = (q[:, :, t] * n).sum(dim=-1, keepdim=True)
        outputs.append(torch.where(den == 0, 0.0, num / torch.where(den == 0, 1.0, den)))
    return torch.stack(outputs, dim=2), MLSTMState(C, n, m)


def sliding_window_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend from one query at a time to the list of keys it sees; as `xlstm_kernels.sliding_window_attention`."""
    B, H, T, D = q.shape
    scale = D**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    rows = []
    for b in range(B):
        outputs, start = [], 0
        for t in range(T):
            if segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]:
                start = t
            seen = [s for s in range(start, t + 1) if s > t - window or s < start + sinks]
            scores = (k[b, :, seen] * q[b, :, t, None]).sum(dim=-1) * scale  # (H, keys)
            outputs.append((scores.softmax(dim=-1).unsqueeze(-1) * v[b, :, seen]).sum(dim=1))
        rows.append(torch.stack(outputs, dim=1))
    return torch.stack(rows)

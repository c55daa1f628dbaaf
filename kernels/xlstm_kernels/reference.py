"""Reference of both operators: token by token, written to be read, slow.

Pass float64 tensors. Every other implementation is tested against these two functions.
"""

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

    Source: the paper's Eq. 8-10, with the stabiliser of docs/math.md.
    Returns h (B, H, T, Dv) and the final state.
    """
    B, H, T, Dk = q.shape
    v = v.repeat_interleave(H // v.shape[1], dim=1)
    C, n, m = state or MLSTMState.zeros(B, H, Dk, v.shape[-1], dtype=q.dtype, device=q.device)
    empty_m = MLSTMState.zeros(B, H, 1, 1, dtype=q.dtype, device=q.device).m
    outputs = []
    for t in range(T):
        log_f, log_i = F.logsigmoid(f[:, :, t]), i[:, :, t]  # (B, H)
        same_document = torch.ones(B, dtype=torch.bool, device=q.device)
        if segment_ids is not None and t > 0:
            same_document = segment_ids[:, t] == segment_ids[:, t - 1]
        # The first token of a document sees the empty state: that is a mask, not a forget gate.
        log_carried = torch.where(same_document[:, None], log_f + m, empty_m)
        m = torch.maximum(log_carried, log_i).detach()  # h does not depend on m
        decay, write = (log_carried - m).exp(), (log_i - m).exp()
        key, value = k[:, :, t], v[:, :, t]
        weighted_key = write[..., None, None] * key.unsqueeze(-1)
        C = decay[..., None, None] * C + weighted_key * value.unsqueeze(-2)
        n = decay[..., None] * n + write[..., None] * key
        num = (q[:, :, t, :, None] * C).sum(dim=-2)
        den = (q[:, :, t] * n).sum(dim=-1, keepdim=True)
        # Where the denominator is exactly 0, h is 0; the inner `where` keeps nan out of gradients.
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
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend from one query at a time to the list of keys that it sees.

    Shapes and meaning as in `xlstm_kernels.sliding_window_attention`.
    """
    B, H, T, D = q.shape
    scale = D**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    rows = []
    for b in range(B):
        outputs, start = [], 0  # start: first token of the document
        for t in range(T):
            if segment_ids is not None and t > 0 and segment_ids[b, t] != segment_ids[b, t - 1]:
                start = t
            seen = [s for s in range(start, t + 1) if s > t - window or s < start + sinks]
            scores = (k[b, :, seen] * q[b, :, t, None]).sum(dim=-1) * scale  # (H, keys seen)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sink_logits is not None:
                scores = torch.cat([scores, sink_logits[:, None]], dim=-1)
            weights = scores.softmax(dim=-1)[:, : len(seen), None]
            outputs.append((weights * v[b, :, seen]).sum(dim=1))
        rows.append(torch.stack(outputs, dim=1))
    return torch.stack(rows)

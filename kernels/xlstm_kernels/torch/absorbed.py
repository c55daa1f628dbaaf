"""The state of the mLSTM after a sequence, where nobody reads its outputs: a CPU's prompts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.segments import document_runs
from xlstm_kernels.state import LOG_ZERO, MLSTMState


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # its products would be of bfloat16
def state_after(
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None,
    state: MLSTMState,
) -> MLSTMState:
    """Return the state after T tokens that `mlstm` gives, in one product for all of them.

    Shapes as in `xlstm_kernels.mlstm`. Computes in the dtype of `state`. Not differentiable.

    C' = exp(D_0 + m - m') C + sum_t exp(D_t - m') k_t v_t^T, where D_t is the sum of log f over
    (t, T] plus i_t, D_0 that over all tokens, and m' the largest exponent; n' alike, with 1 for v.
    """
    (B, H, T, Dk), (G, Dv), exact = k.shape, (v.shape[1], v.shape[3]), state.C.dtype
    # From the end on: each sum has its own terms alone, and no difference of two cancels.
    # In float64, because a large sum or i would round away what the weights differ in.
    sums = F.logsigmoid(f.to(exact)).double().flip(-1).cumsum(-1).flip(-1)
    entering, log_weights = sums[..., 0], F.pad(sums[..., 1:], (0, 1)) + i
    if segment_ids is not None:
        runs = document_runs(segment_ids)
        earlier = runs != runs[:, -1:]
        log_weights.masked_fill_(earlier[:, None], LOG_ZERO)
        entering = entering.masked_fill(earlier[:, :1], LOG_ZERO)
    m = torch.maximum(entering + state.m, log_weights.amax(-1)).to(exact)
    decay = _exp((entering - (m.double() - state.m)).to(exact))[..., None]
    weights = _exp((log_weights - m[..., None]).to(exact))[..., None]
    # Weighed values, which are narrower than keys, and a column of weights for the normaliser.
    weighed = v.new_empty(B, H, T, Dv + 1, dtype=exact)
    values = weighed[..., :Dv].unflatten(1, (G, -1))
    values.copy_(v[:, :, None])
    values.mul_(weights.unflatten(1, (G, -1)))
    weighed[..., Dv:] = weights
    written = torch.bmm(k.to(exact).flatten(0, 1).mT, weighed.flatten(0, 1)).view(B, H, Dk, Dv + 1)
    C = torch.addcmul(written[..., :Dv], state.C, decay[..., None])
    return MLSTMState(C, torch.addcmul(written[..., Dv], state.n, decay), m)


def _exp(x: Tensor) -> Tensor:
    """Return exp(x); exactly 0 below the normal numbers, with which a CPU is slow."""
    return x.exp().masked_fill_(x < math.log(torch.finfo(x.dtype).tiny), 0)

"""Chunkwise mLSTM in plain torch: any device, exact, differentiable, linear in T.

Letters here, beyond the legend in `xlstm_kernels`: C chunks of L tokens, R = H / G query heads of a
group, Dw = Dv + 1 (v and a column of ones, which carries the normaliser).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xlstm_kernels.segments import document_runs
from xlstm_kernels.state import LOG_ZERO, MLSTMState, state_dtype

CHUNK_CPU = 32  # measured: docs/math.md, "Chunk size"
CHUNK_GPU = 64


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None,
    state: MLSTMState | None,
) -> tuple[Tensor, MLSTMState]:
    """Run the mLSTM chunk by chunk.

    Shapes and meaning as in `xlstm_kernels.mlstm`, which checks the arguments. One matrix per chunk
    holds the weights exp(log-weight - m_t) of every pair (query, key) of the chunk and, in its last
    column, those of the state that enters. So its last row holds the weights of what makes up the
    state that leaves.
    """
    B, H, T, Dk = q.shape
    G, Dv = v.shape[1], v.shape[3]
    dtype = state_dtype(q, k, v, i, f)
    L = min(CHUNK_CPU if q.device.type == "cpu" else CHUNK_GPU, T)
    state = state or MLSTMState.zeros(B, H, Dk, Dv, dtype=dtype, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        qc = _chunked(q, G, L, dtype)  # (B, G, C, R, L, Dk)
        kc = _chunked(k, G, L, dtype).transpose(-1, -2).contiguous()  # (B, G, C, R, Dk, L)
        vc = F.pad(_chunked(v, G, L, dtype), (0, 1), value=1.0).squeeze(3)  # (B, G, C, L, Dw)
        log_w = _log_weights(i, f, G, L, segment_ids, dtype)  # (B, G, C, R, L, L + 1)
        m_in, m_out = _chunk_stabilisers(log_w.detach()[..., -1, :], state.m.detach())
        log_w[..., -1] += m_in.unsqueeze(-1)
        weights: Tensor = Weights.apply(log_w)
        intra, inter = weights[..., :-1], weights[..., -1:]
        last = weights[..., -1:, :]  # (B, G, C, R, 1, L + 1)

        update = (kc * last[..., :-1]).flatten(3, 4) @ vc  # (B, G, C, R * Dk, Dw)
        update = update.unflatten(3, (-1, Dk))
        memory = torch.cat([state.C, state.n.unsqueeze(-1)], dim=-1).unflatten(1, (G, -1))
        before, after = CarryMemory.apply(last[..., -1:], update, memory.to(dtype))

        from_state = (qc * inter) @ before  # (B, G, C, R, L, Dw)
        from_chunk = (((qc @ kc) * intra).flatten(3, 4) @ vc).unflatten(3, (-1, L))
        out = Ratio.apply(from_state + from_chunk)
    h = out.transpose(2, 3).reshape(B, H, -1, Dv)[:, :, :T].to(v.dtype)
    final = after.flatten(1, 2)
    return h, MLSTMState(final[..., :-1], final[..., -1], m_out.flatten(1, 2))


class Ratio(Function):
    """Divide numerators (..., Dv) by the last column, the denominator.

    Where the denominator is exactly 0, the result and its gradient are 0. The gradient of the
    denominator is -(dh . h) / den. It has no square of den, which float32 cannot hold for den below
    1e-19.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        den = out[..., -1:]
        den = torch.where(den == 0, torch.inf, den)
        h = out[..., :-1] / den
        ctx.save_for_backward(h, den)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        h, den = ctx.saved_tensors
        return torch.cat([dh, -(dh * h).sum(dim=-1, keepdim=True)], dim=-1) / den


class Weights(Function):
    """Compute exp(log_w - max over the last dimension), the maximum detached.

    Weights below the range of normal numbers are exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, log_w: Tensor) -> Tensor:
        # The vectorised exp of the CPU is ten times slower where its result underflows, and half of
        # this matrix does. So clamp first, and set what was clamped to 0 afterwards.
        floor = math.log(torch.finfo(log_w.dtype).tiny) + 1
        shifted = (log_w - log_w.amax(dim=-1, keepdim=True)).clamp_(min=floor)
        weights = F.threshold(shifted.exp_(), 1.001 * math.exp(floor), 0.0, inplace=True)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        return grad * weights


class CarryMemory(Function):
    """Carry the memory over the chunks: memory <- decay * memory + update.

    decay (B, G, C, R, 1, 1), update (B, G, C, R, Dk, Dw), memory (B, G, R, Dk, Dw): what enters the
    first chunk. Returns the memory before each chunk (B, G, C, R, Dk, Dw) and after the last one
    (B, G, R, Dk, Dw). A function of its own, because autograd over a loop would stack copies: this
    writes each memory once and saves only what the gradient reads.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, update: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        before, after = torch.empty_like(update), torch.empty_like(memory)
        slots = [*before.unbind(2), after]
        slots[0].copy_(memory)
        per_chunk = zip(decay.unbind(2), update.unbind(2), strict=True)
        for c, (decay_c, update_c) in enumerate(per_chunk):
            slots[c + 1].copy_(torch.addcmul(update_c, decay_c, slots[c]))
        ctx.save_for_backward(decay, before)
        return before, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        decay, before = ctx.saved_tensors
        d_update, d_memory = torch.empty_like(before), torch.empty_like(d_after)
        slots = [d_memory, *d_update.unbind(2)]
        slots[-1].copy_(d_after)
        decays, d_befores = decay.unbind(2), d_before.unbind(2)
        for c in reversed(range(len(decays))):
            slots[c].copy_(torch.addcmul(d_befores[c], decays[c], slots[c + 1]))
        d_decay = d_update.flatten(-2).unsqueeze(-2) @ before.flatten(-2).unsqueeze(-1)
        return d_decay, d_update, d_memory


def _chunked(x: Tensor, groups: int, length: int, dtype: torch.dtype) -> Tensor:
    """Split (B, H, T, ...) into (B, G, C, R, L, ...), in `dtype`; T is filled up with zeros."""
    fill = -x.shape[2] % length
    if fill:
        x = F.pad(x, [0, 0] * (x.ndim - 3) + [0, fill])
    return x.to(dtype).unflatten(2, (-1, length)).unflatten(1, (groups, -1)).transpose(2, 3)


def _log_weights(
    i: Tensor, f: Tensor, groups: int, length: int, segment_ids: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sum the log-weights D_ts of every pair: log f over (s, t] plus i_s; i, f (B, H, T).

    Returns (B, G, C, R, L, L + 1), LOG_ZERO or lower where t does not see s. The last column is the
    incoming state. Each sum is formed from its own terms, by a product with a 0/1 matrix.
    Differences of cumulative sums would cancel: one closed forget gate (log f = -60) would cost
    every later pair of the chunk its accuracy.
    """
    L, fill = length, -i.shape[2] % length
    i, f = i.to(dtype), f.to(dtype)
    if fill:  # tokens after the end keep the state as it is: f -> 1, i -> 0
        i, f = F.pad(i, (0, fill), value=LOG_ZERO), F.pad(f, (0, fill), value=-LOG_ZERO)
    # Off the CPU a float32 product may be rounded to TF32; log-weights cannot be.
    exact = dtype if i.device.type == "cpu" else torch.float64
    log_f = _chunked(F.logsigmoid(f), groups, L, exact)  # (B, G, C, R, L)
    gates = torch.cat([log_f, _chunked(i, groups, L, exact)], dim=-1)
    t, s, r = (torch.arange(n, device=i.device) for n in (L, L + 1, L))
    s = torch.where(s == L, -1, s)  # the incoming state stands before the first token
    after_key = s < r[:, None, None]  # (r, 1, s)
    spans = after_key & (r[:, None, None] <= t[:, None])  # log f_r counts if s < r <= t
    picks = (s == r[:, None, None]).expand_as(spans)  # i_r counts if r = s
    to_pairs = torch.cat([spans, picks]).flatten(1).to(exact)  # (2L, L * (L + 1))
    log_w = (gates @ to_pairs).unflatten(-1, (L, L + 1)).to(dtype)
    return log_w.add_(_visibility(segment_ids, t, s, fill).to(dtype))


def _visibility(segment_ids: Tensor | None, t: Tensor, s: Tensor, fill: int) -> Tensor:
    """Return 0 where query t sees key s (the incoming state is s = -1), LOG_ZERO elsewhere."""
    causal = s <= t[:, None]  # (L, L + 1)
    if segment_ids is not None:
        runs = F.pad(document_runs(segment_ids).float(), (0, fill), mode="replicate")
        runs = runs.unflatten(1, (-1, len(t)))  # (B, C, L)
        # The entering state belongs to the document of the token before the chunk. At the start of
        # the row that is the first document (0).
        entering = F.pad(runs[:, :-1, -1:], (0, 0, 1, 0))
        keys = torch.cat([runs, entering], dim=-1)
        causal = causal & (runs.unsqueeze(-1) == keys.unsqueeze(-2))  # (B, C, L, L + 1)
        causal = causal[:, None, :, None]
    return torch.where(causal, 0.0, LOG_ZERO)


def _chunk_stabilisers(last: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stabiliser m of the state that enters each chunk, and of the one that leaves.

    last (B, G, C, R, L + 1): log-weights of each chunk's last row. m (B, H): of the initial state.
    Returns (B, G, C, R), and (B, G, R) after the last chunk.
    """
    largest = last[..., :-1].amax(dim=-1).unbind(2)  # of the chunk's own tokens
    log_decays = last[..., -1].unbind(2)
    stabilisers = [m.to(last.dtype).unflatten(1, (last.shape[1], -1))]
    for largest_c, log_decay in zip(largest, log_decays, strict=True):
        stabilisers.append(torch.maximum(log_decay + stabilisers[-1], largest_c))
    return torch.stack(stabilisers[:-1], dim=2), stabilisers[-1]

"""Exact sliding-window attention with sinks, in blocks of queries: linear in T for a fixed window.

Letters here, beyond the legend in `xlstm_kernels`: C blocks, L queries of a block, R = H / G query
heads of a group, span = L + W - 1 keys of a band.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.registration import refuse_second_derivative, without_autocast
from xlstm_kernels.torch.band_plan import band_plan
from xlstm_kernels.torch.bounded import bounded_attention, wide_product
from xlstm_kernels.torch.tiles import tiled_attention, tiles_pay
from xlstm_kernels.torch.window_cpu import attend, block_length, differentiate

# Queries of a block, at least and at most. Smaller blocks make many small products; larger ones
# multiply more masked pairs (docs/math.md, "Chunk size").
BLOCK_MIN, BLOCK_MAX = 32, 128
SCORES_AT_ONCE = 1 << 26  # of the gradient off the CPU
# Tokens of a call that its window holds whole; with more, bands would be T / L copies of all keys.
WHOLE_AT_MOST = 512


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int,
    segment_ids: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each block of queries to its band of keys and to the sinks before the band.

    Shapes as in `xlstm_kernels.sliding_window_attention`, which checks the arguments. The band of a
    block is the block itself and the window - 1 tokens before it; a bias masks the keys of the band
    that a query does not see. Sinks before the band can only belong to one document, that of the
    band's first token: a later document starts inside the band. So each block gathers N more keys.
    """
    T = q.shape[2]
    # An exported program serves any T, so it takes no branch that depends on it. A short call is
    # one block in any case.
    known = not isinstance(T, torch.SymInt)
    if known and segment_ids is None and BLOCK_MIN < T <= window:
        return _causal_attention(q, k, v, scale)
    if known and WHOLE_AT_MOST < T <= window:
        settings: dict[str, Any] = {"window": window, "sinks": sinks, "segment_ids": segment_ids}
        return bounded_attention(q, k, v, **settings, scale=scale, softcap=None, sink_logits=None)
    if segment_ids is None and q.device.type == "cpu" and tiles_pay(q, k, window):
        return tiled_attention(q, k, v, window=window, sinks=sinks, scale=scale)
    # The number of blocks of an exported program depends on the window alone, not on min(W, T).
    span = min(window, T) if known else window
    out, _ = forward(q, k, v, segment_ids, span, min(sinks, T), scale)
    return out


def looks_at_plans(device: torch.device) -> bool:
    """Return whether the host may look at what blocks read: a GPU would make it wait."""
    return device.type == "cpu"


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend to all earlier tokens, with torch's own attention, which skips the masked blocks."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.to(q.dtype), v.to(q.dtype)
    if repeats > 1:  # torch's fast kernels for CPUs and for float32 take no grouped heads
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    with without_autocast(q.device):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


class Bands(NamedTuple):
    """Queries, keys and values of every block, in the dtype of the queries.

    queries (B C, G, R L, D), keys and values (B C, G, N + span, D), bias (B C, 1, R L, N + span).
    sinks: of `BandPlan`. back: tokens of a band before its block. length: L.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    sinks: Tensor
    back: int
    length: int

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor | None, window: int, sinks: int
    ) -> Bands:
        """Cut a call into blocks."""
        (B, H, T, _), G = q.shape, k.shape[1]
        window = min(window, T)
        L = min(max(BLOCK_MIN, min(window, BLOCK_MAX)), T)
        plan = band_plan(segment_ids, q.device, T, L, window, sinks)
        keys = _bands(k, plan.sinks, L, window - 1).to(q.dtype)
        values = _bands(v, plan.sinks, L, window - 1).to(q.dtype)
        seen = torch.cat([plan.seen_sinks, plan.seen], dim=2).mT.unsqueeze(2)
        bias = torch.where(seen, 0.0, -torch.inf).to(q.dtype).expand(B, -1, H // G, -1, -1)
        bias = bias.flatten(2, 3).flatten(0, 1).unsqueeze(1)
        return cls(_blocks(q, G, L), keys, values, bias, plan.sinks, window - 1, L)


def _blocks(x: Tensor, groups: int, length: int) -> Tensor:
    """Cut x (B, H, T, D) into blocks (B C, G, R L, D)."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % length)).unflatten(2, (-1, length))
    x = x.unflatten(1, (groups, -1)).permute(0, 3, 1, 2, 4, 5)  # (B, C, G, R, L, D)
    return x.flatten(3, 4).flatten(0, 1)


def _join(x: Tensor, like: Tensor, length: int) -> Tensor:
    """Undo `_blocks`, in the shape of `like`."""
    B, H, T, D = like.shape
    x = x.unflatten(0, (B, -1)).unflatten(3, (-1, length))  # (B, C, G, R, L, D)
    x = x.permute(0, 2, 3, 1, 4, 5).reshape(B, H, -1, D)
    return x[:, :, :T].contiguous()


# Forward and backward pass are operators of their own, as in `chunkwise.py`.
@torch.library.custom_op("xlstm_kernels::window_torch", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the attention and, on a CPU, what `window_cpu.attend` returns of each softmax."""
    with without_autocast(q.device):
        if looks_at_plans(q.device):
            return attend(q, k, v, segment_ids, window, sinks, scale)
        bands = Bands.of(q, k, v, segment_ids, window, sinks)
        rows = bands.queries, bands.keys, bands.values
        out = F.scaled_dot_product_attention(*rows, attn_mask=bands.bias, scale=scale)
        return _join(out, q, bands.length), q.new_empty(0, dtype=torch.float32)


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (B, H, T, _), G, shape = q.shape, k.shape[1], torch.Size([0])
    if looks_at_plans(q.device):
        L = block_length(T, window, H // G)
        shape = torch.Size([B * -(-T // L), G, H // G * L])
    statistics = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=statistics)


@torch.library.custom_op("xlstm_kernels::window_torch_backward", mutates_args=())
def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> list[Tensor]:
    """Return the gradients of q, k and v."""
    with without_autocast(q.device):
        if looks_at_plans(q.device):
            rows = dout, q, k, v, segment_ids, logsumexp
            return differentiate(*rows, window, sinks, scale)
        bands = Bands.of(q, k, v, segment_ids, window, sinks)
        G, L = k.shape[1], bands.length
        d_blocks, out_blocks = _blocks(dout, G, L), _blocks(out, G, L)
        dq, d_keys, d_values = _attention_grads(bands, d_blocks, out_blocks, scale)
        dk, dv = _unband(d_keys, bands, k), _unband(d_values, bands, v)
        return [_join(dq, q, L), dk, dv]


def _attention_grads(
    bands: Bands, dout: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the blocks' queries, keys and values, for any device."""
    found = []
    # A few blocks at a time, because the scores of all of them are a large tensor.
    rows = (bands.queries, bands.keys, bands.values, bands.bias, dout, out)
    per_block = bands.queries.shape[1] * bands.bias[0].numel()
    for part in zip(*(x.split(max(1, SCORES_AT_ONCE // per_block)) for x in rows), strict=True):
        q, k, v, bias, d, o = part
        weights = (wide_product(q, k.mT) * scale + bias).softmax(dim=-1)
        mean = (d.to(weights.dtype) * o).sum(dim=-1, keepdim=True)
        d_scores = (weights * (wide_product(d, v.mT) - mean) * scale).to(q.dtype)
        found.append((d_scores @ k, d_scores.mT @ q, weights.to(q.dtype).mT @ d))
    dq, dk, dv = (torch.cat(parts) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _unband(d: Tensor, bands: Bands, like: Tensor) -> Tensor:
    """Add up the gradients (B C, G, N + span, D) that each token of `like` gets from bands."""
    (B, G, T, D), L, back = like.shape, bands.length, bands.back
    d = d.unflatten(0, (B, -1)).transpose(1, 2)  # (B, G, C, N + span, D)
    C, N = d.shape[2], bands.sinks.shape[2]
    band = d[:, :, :, N:]
    sums = torch.promote_types(like.dtype, torch.float32)
    blocks = d.new_zeros(B, G, C + -(-back // L), L, D, dtype=sums)
    for first in range(0, back + L, L):
        piece = band[:, :, :, first : first + L]
        blocks[:, :, first // L :][:, :, :C, : piece.shape[3]] += piece
    total = blocks.flatten(2, 3)[:, :, back : back + T]
    if N:
        rows = bands.sinks.expand(B, -1, -1).flatten(1)[:, None, :, None].expand(-1, G, -1, D)
        total = total.scatter_add(2, rows, d[:, :, :, :N].flatten(2, 3).to(sums))
    return total.to(like.dtype).contiguous()


@backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    window: int,
    sinks: int,
    scale: float,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, window, sinks, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the second one: zeros that nothing would read
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (window, sinks, scale)


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    found = backward(dout, *ctx.saved_tensors, *ctx.settings)
    wanted = [x if needs else None for x, needs in zip(found, ctx.needs_input_grad, strict=False)]
    return (*wanted, *[None] * 4)


forward.register_autograd(_gradients, setup_context=_keep)
backward.register_autograd(functools.partial(refuse_second_derivative, "sliding_window_attention"))


def _bands(x: Tensor, sinks: Tensor, length: int, back: int) -> Tensor:
    """Collect what each block reads of keys or values: (B, G, T, D) -> (B * C, G, N + span, D).

    sinks (B or 1, C, N): positions of the sinks. length: L. back: tokens of a band before the
    block.
    """
    B, G, T, D = x.shape
    C, span = sinks.shape[1], back + length
    rows = sinks.expand(B, -1, -1).flatten(1)[:, None, :, None].expand(-1, G, -1, D)
    pieces = [x.gather(2, rows).unflatten(2, sinks.shape[1:])]  # (B, G, C, N, D)
    padded = F.pad(x, (0, 0, back, C * length - T))
    padded = F.pad(padded, (0, 0, 0, -padded.shape[2] % length))
    blocks = padded.unflatten(2, (-1, length))  # (B, G, C and more, L, D)
    # A band is a few blocks in a row. Tensor.unfold would do, but its gradient is slow on the CPU.
    for first in range(0, span, length):
        piece = blocks[:, :, first // length :][:, :, :C]
        pieces.append(piece[:, :, :, : span - first])
    return torch.cat(pieces, dim=3).transpose(1, 2).flatten(0, 1)

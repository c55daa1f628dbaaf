"""Full causal attention inside documents, without a mask of T x T numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xlstm_kernels import Backend, sliding_window_attention
from xlstm_kernels.torch.bounded import bounded_attention

QUERIES = 512
"""Queries of a block: the mask of one is all of it that exists at once."""
FEWEST_QUERIES, MASK_SIZE = 128, 1 << 26
"""A block has fewer queries, down to this many, where its mask would have more numbers."""

Given: TypeAlias = tuple[Tensor, Tensor, Tensor, float, tuple[Tensor, Tensor] | None]


EVERYTHING = 2**30
"""A window that no document fills."""


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    segments: tuple[Tensor, Tensor] | None,
    *,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Let T queries attend to S keys, of which the last T are their own: (B, H, T, D).

    q (B, H, T, D), k and v (B, G, S, D). segments: documents of the queries (B, T) and of the keys
    (B, S), which decide what is seen besides causality; None: nothing else does.

    Documents need a mask, which SDPA takes whole. So queries come in blocks, and a backward pass
    makes each block's mask, and its scores, again: memory is linear in S.

    softcap, sink_logits, backend: as in `xlstm_kernels.sliding_window_attention`, which runs where
    one of them is given, because SDPA knows neither.
    """
    given = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    if softcap is not None or sink_logits is not None:
        return _by_operator(q, k, v, segments, backend, given)
    tokens = q.shape[2]
    if segments is None and tokens == k.shape[2]:
        # The kernel that needs no mask (flash), as the teacher calls it.
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=grouped
        )
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if recorded and torch.compiler.is_compiling():
        # One node of the graph, whatever T is; a compiler would unroll the blocks below.
        return _by_operator(q, k, v, segments, backend, given)
    # No segments: autograd functions take tensors or None, and no tuples of them.
    tensors = (q, k, v, *(segments or (None, None)), scale)
    if recorded:
        return cast(Tensor, _Recorded.apply(*tensors))
    parts = [_attend(*part) for _, _, part in _blocks(*tensors)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _by_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: tuple[Tensor, Tensor] | None,
    backend: Backend,
    given: dict[str, Any],
) -> Tensor:
    """Attend by the operator of the window, which is then over everything."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    settings = {"window": EVERYTHING, "sinks": 0, **given}
    settings["segment_ids"] = None if segments is None else segments[1]
    if q.shape[2] == k.shape[2]:
        return sliding_window_attention(q, k, v, backend=backend, **settings)
    return bounded_attention(q, k, v, **settings)


def _blocks(
    q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, held: Tensor | None, scale: float
) -> Iterator[tuple[slice, slice, Given]]:
    """Yield blocks: which queries, which keys, and what `_attend` takes of them."""
    tokens, before = q.shape[2], k.shape[2] - q.shape[2]
    size = _block(q, k)
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        queries, keys = slice(start, end), slice(0, before + end)
        part = None if own is None or held is None else (own[:, queries], held[:, keys])
        yield queries, keys, (q[:, :, queries], k[:, :, keys], v[:, :, keys], scale, part)


class _Recorded(torch.autograd.Function):
    """Attend in blocks; the backward pass makes each block again.

    Gradients of keys and values add up in float32: a key of 128k tokens has a thousand parts.
    Autograd itself would round each sum to bf16, and write zeros for all keys of each block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Tensor | None,
        held: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, own, held)
        parts = [_attend(*part) for _, _, part in _blocks(q, k, v, own, held, scale)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own, held = ctx.saved_tensors
        exact = torch.promote_types(k.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=exact) for x in (k, v))
        for queries, keys, part in _blocks(q, k, v, own, held, ctx.scale):
            with torch.enable_grad():
                read = [x.detach().requires_grad_() for x in part[:3]]
                out = _attend(read[0], read[1], read[2], *part[3:])
            grad = grads[0][:, :, queries].to(out.dtype)
            dq[:, :, queries], key, value = torch.autograd.grad(out, read, grad)
            dk[:, :, keys] += key
            dv[:, :, keys] += value
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _block(q: Tensor, k: Tensor) -> int:
    """Return the queries of a block."""
    per_query = q.shape[0] * (q.shape[1] // k.shape[1]) * k.shape[2]
    return int(min(QUERIES, max(FEWEST_QUERIES, MASK_SIZE // per_query)))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Attend as `full_attention` does, with one mask."""
    batch, heads, tokens, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    shared = heads // groups
    mask = None
    if tokens > 1 or segments is not None:
        mask = _visible(tokens, keys, segments, q.device)
    if shared > 1:
        # Queries of a group are further queries of its head: kernels that take a mask would want
        # keys and values repeated for each.
        q = q.reshape(batch, groups, shared * tokens, dim)
        if mask is not None and tokens > 1:
            mask = mask.repeat(1, 1, shared, 1)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return mixed.reshape(batch, heads, tokens, v.shape[-1])


def _visible(
    tokens: int, keys: int, segments: tuple[Tensor, Tensor] | None, device: torch.device
) -> Tensor:
    """Tell which of S keys each of the last T tokens sees, (B or 1, 1, T, S) bool."""
    if tokens == 1:
        assert segments is not None
        return (segments[1] == segments[0])[:, None, None]
    place = torch.arange(keys, device=device)
    seen = (place <= place[keys - tokens :, None])[None]
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
    return seen[:, None]

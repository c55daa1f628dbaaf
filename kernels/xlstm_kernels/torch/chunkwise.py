"""Chunkwise mLSTM in plain torch: any device, exact, differentiable, linear in T.

Letters: the legend in `xlstm_kernels`; Dw = Dv + 1 (v and a column of ones for the normaliser).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from xlstm_kernels.registration import (
    filled,
    keep_freed_memory,
    refuse_second_derivative,
    without_autocast,
)
from xlstm_kernels.segments import document_runs
from xlstm_kernels.state import MLSTMState, state_dtype
from xlstm_kernels.torch.passes import (
    Gradients,
    InChunks,
    Kept,
    Part,
    Tokens,
    differentiate_part,
    run_part,
)
from xlstm_kernels.torch.weights import Chunks, Documents, Weights, gate_grads, write_weights

CHUNK_CPU = 32  # measured: docs/math.md, "Chunk size"
CHUNK_GPU = 64
# A pass works on parts of a call, so its working memory does not grow with T. On a CPU, all states
# of a part have about so many numbers, which stay in the cache (measured for D of 16 to 256); and
# its rows and heads have at least and at most so many tokens together. Elsewhere they have
# SPAN_GPU tokens.
STATES_CPU = 1 << 19
SPAN_CPU = 1 << 9, 1 << 13
SPAN_GPU = 1 << 17
# Tokens of a section, whose weights are made at once: that takes many operators, most of them
# small.
SECTION_CPU, SECTION_GPU = 1 << 14, SPAN_GPU


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

    Shapes and meaning as in `xlstm_kernels.mlstm`, which checks the arguments.
    """
    if state is None:
        sizes = (*q.shape[:2], q.shape[3], v.shape[3])
        state = MLSTMState.zeros(*sizes, dtype=state_dtype(q, k, v, i, f), device=q.device)
    inputs = (q, k, v, i, f, state.C, state.n)
    # What a backward pass reads has the number of chunks in its shape, which an exported program
    # with a free number of tokens cannot have.
    records = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    keep = records and any(x.requires_grad for x in inputs)
    h, C, n, m, *_ = forward(q, k, v, i, f, segment_ids, *state, keep)
    return h, MLSTMState(C, n, m)


def chunks_of(q: Tensor, v: Tensor) -> Chunks:
    """Return the sizes of a call."""
    (B, H, T, Dk), (G, Dv) = q.shape, (v.shape[1], v.shape[3])
    L = min(CHUNK_CPU if q.device.type == "cpu" else CHUNK_GPU, T)
    return Chunks(B, G, H // G, T, Dk, Dv, L)


def span_of(device: str, Dk: int, Dv: int) -> int:
    """Return how many tokens of all rows and heads a part has at most, or one chunk."""
    if device != "cpu":
        return SPAN_GPU
    least, most = SPAN_CPU
    return min(most, max(least, STATES_CPU // (Dk * Dv) * CHUNK_CPU))


def sections(sizes: Chunks, device: torch.device) -> list[Part]:
    """Return the sections of a call."""
    if device.type == "cpu":
        return _cut_rows(sizes, SECTION_CPU)
    return _cut_tokens(sizes, SECTION_GPU)


def parts(sizes: Chunks, device: torch.device) -> list[Part]:
    """Return the parts of a section."""
    span = span_of(device.type, sizes.Dk, sizes.Dv)
    return _cut_rows(sizes, span) if device.type == "cpu" else _cut_tokens(sizes, span)


def _cut_rows(sizes: Chunks, span: int) -> list[Part]:
    """Cut a call for a CPU: whole rows of a few heads. Without grouped heads they are not copied.

    span: tokens of rows and heads in each, at most, or one chunk.
    """
    tokens = min(sizes.T, max(sizes.L, span // sizes.R // sizes.L * sizes.L))
    groups = min(sizes.G, max(1, span // (sizes.R * tokens)))
    return _cut(sizes, max(1, span // (sizes.R * tokens * sizes.G)), groups, tokens)


def _cut_tokens(sizes: Chunks, span: int) -> list[Part]:
    """Cut a call: a few chunks of all heads, because each chunk is a launch or two."""
    chunks = max(1, span // (sizes.B * sizes.G * sizes.R * sizes.L))
    return _cut(sizes, sizes.B, sizes.G, min(sizes.T, chunks * sizes.L))


def _cut(sizes: Chunks, rows: int, groups: int, tokens: int) -> list[Part]:
    found, first = [], 0
    for at in itertools.product(
        _slices(sizes.B, rows), _slices(sizes.G, groups), _slices(sizes.T, tokens)
    ):
        found.append(Part(*at, first))
        first += part_sizes(sizes, found[-1]).P
    return found


def part_sizes(sizes: Chunks, part: Part) -> Chunks:
    """Return the sizes of a part."""
    B, G, T = (at.stop - at.start for at in part[:3])
    return sizes._replace(B=B, G=G, T=T)


def _slices(whole: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, whole)) for first in range(0, whole, step)]


def all_tokens(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, segment_ids: Tensor | None
) -> Tokens:
    """Collect the arguments; an initial state belongs to the first document of its row."""
    if segment_ids is None:
        return Tokens(q, k, v, i, f, None)
    runs = document_runs(segment_ids)
    return Tokens(q, k, v, i, f, Documents(runs, runs[:, 0]))


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    segment_ids: Tensor | None,
    C0: Tensor,
    n0: Tensor,
    m0: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return h, the final C, n and m, and what the backward pass reads (`Kept`).

    C0, n0, m0: the initial state, in the dtype to compute in. keep: whether a backward pass will
    follow; else what it reads is empty.
    """
    keep_freed_memory()
    with without_autocast(q.device):
        tokens, sizes = all_tokens(q, k, v, i, f, segment_ids), chunks_of(q, v)
        h, device, R = v.new_empty(*q.shape[:3], v.shape[3]), q.device, sizes.R
        kept = Kept.empty(sizes, sizes, C0) if keep else _room(sizes, device, C0)
        memory, m = torch.cat([C0.mT, n0.unsqueeze(-2)], dim=-2), m0.clone()
        for section in sections(sizes, device):
            heads, of_section = section.heads(R), tokens.part(section)
            size, first = part_sizes(sizes, section), section.chunks if keep else 0
            held = kept.section(first, size)
            m[heads] = write_weights(*of_section[3:], m[heads], size, held)
            weights = Weights.of(held, size)
            for part in parts(size, device):
                chunks = InChunks.of(of_section, part, sizes.L, C0.dtype)
                rows = kept.part(first + part.chunks if keep else 0, chunks.sizes)
                out = part.of(section.of(h, R), R)
                state = memory[heads][part.heads(R)]
                run_part(chunks, part.weights(weights), state, rows, out)
        # Copies, also of a single row: the results of an operator may not share memory.
        C = memory[..., :-1, :].mT.clone(memory_format=torch.contiguous_format)
        n = memory[..., -1, :].clone(memory_format=torch.contiguous_format)
        return h, C, n, m, *(kept if keep else _nothing(C0))


def _room(sizes: Chunks, device: torch.device, like: Tensor) -> Kept:
    """Allocate for one section and one part: without a backward pass, each writes over the last.

    None is larger than the first.
    """
    section = part_sizes(sizes, sections(sizes, device)[0])
    return Kept.empty(part_sizes(section, parts(section, device)[0]), section, like)


def _nothing(like: Tensor) -> Kept:
    return Kept(*(like.new_empty(0) for _ in Kept._fields))


# Forward and backward pass are operators of their own. Autograd, compiled and exported models hold
# one node for each, whatever T is, and no trace looks inside.
forward = torch.library.custom_op("xlstm_kernels::mlstm_torch", compute, mutates_args=())


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    segment_ids: Tensor | None,
    C0: Tensor,
    n0: Tensor,
    m0: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    h = v.new_empty(*q.shape[:3], v.shape[3])
    C, n, m = (x.new_empty(x.shape) for x in (C0, n0, m0))
    sizes = chunks_of(q, v)
    return h, C, n, m, *(Kept.empty(sizes, sizes, C0) if keep else _nothing(C0))


@torch.library.custom_op("xlstm_kernels::mlstm_torch_backward", mutates_args=())
def backward(
    dh: Tensor,
    dC: Tensor,
    dn: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    weights: Tensor,
    scores: Tensor,
    outputs: Tensor,
    states: Tensor,
    values: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, i, f, C0 and n0; that of v is empty unless `values`.

    dh (B, H, T, Dv); dC, dn: gradients of the final state; weights to states: as in `Kept`.
    """
    with without_autocast(q.device):
        tokens, sizes = Tokens(q, k, v, i, f, None), chunks_of(q, v)
        *grads, dC0, dn0 = _allocate_grads(q, k, v, i, f, dC, dn, values)
        dq, dk, dv, di, df = grads
        out = Gradients(dq, dk, dv if values else None)
        kept, R = Kept(weights, scores, outputs, states), sizes.R
        d_memory = torch.cat([dC.mT, dn.unsqueeze(-2)], dim=-2)
        for section in reversed(sections(sizes, q.device)):
            of_section, size = tokens.part(section), part_sizes(sizes, section)
            held = kept.section(section.chunks, size)
            d_sums = torch.empty_like(held)  # of the log-weights
            both = Weights.of(held, size), Weights.of(d_sums, size)
            for part in reversed(parts(size, q.device)):
                chunks = InChunks.of(of_section, part, sizes.L, held.dtype)
                rows = kept.part(section.chunks + part.chunks, chunks.sizes)
                d = part.of(section.of(dh, R), R), d_memory[section.heads(R)][part.heads(R)]
                of_part = part.weights(both[0]), part.weights(both[1])
                differentiate_part(chunks, of_part, rows, d, out.part(section, R).part(part, R))
            found = gate_grads(d_sums, of_section.f, size)
            for x, place in zip(found, (di, df), strict=True):
                size.join_gates(x, section.of(place, R))
        dC0.copy_(d_memory[..., :-1, :].mT)
        dn0.copy_(d_memory[..., -1, :])
        return [*grads, dC0, dn0]


def _allocate_grads(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, C: Tensor, n: Tensor, values: bool
) -> list[Tensor]:
    """Allocate the gradients of the arguments; that of v is empty unless `values`."""
    dq, dk, dv, di, df, dC, dn = (x.new_empty(x.shape) for x in (q, k, v, i, f, C, n))
    return [dq, dk, dv if values else v.new_empty(0), di, df, dC, dn]


@backward.register_fake
def _(
    dh: Tensor,
    dC: Tensor,
    dn: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    weights: Tensor,
    scores: Tensor,
    outputs: Tensor,
    states: Tensor,
    values: bool,
) -> list[Tensor]:
    return _allocate_grads(q, k, v, i, f, dC, dn, values)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, i, f, *_, ctx.keep = inputs
    h, C, n, m, *kept = output
    ctx.mark_non_differentiable(m, *kept)
    # Else autograd would make a gradient of zeros for each of them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, i, f, *kept)
    ctx.results = [(x.shape, x.dtype, x.device) for x in (h, C, n)]


def _gradients(ctx: Any, dh: Any, dC: Any, dn: Any, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.keep:
        raise NotImplementedError(
            "mlstm: an exported program has no gradients; train the model that was exported"
        )
    values = ctx.needs_input_grad[2]
    dh, dC, dn = filled((dh, dC, dn), ctx.results)
    dq, dk, dv, di, df, dC0, dn0 = backward(dh, dC, dn, *ctx.saved_tensors, values)
    return dq, dk, dv if values else None, di, df, None, dC0, dn0, None, None


forward.register_autograd(_gradients, setup_context=_keep)
backward.register_autograd(functools.partial(refuse_second_derivative, "mlstm"))

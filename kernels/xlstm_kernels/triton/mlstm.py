"""Chunkwise mLSTM on Triton: the operator, registered and joined to autograd.

Letters: the legend in `xlstm_kernels`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from xlstm_kernels.registration import filled, refuse_second_derivative
from xlstm_kernels.segments import document_runs
from xlstm_kernels.state import MLSTMState
from xlstm_kernels.triton.common import contiguous_rows
from xlstm_kernels.triton.configs import MLSTMConfig, mlstm_config
from xlstm_kernels.triton.mlstm_passes import launch_backward, launch_forward
from xlstm_kernels.triton.mlstm_tensors import States, kept_dtype, sizes_of

STATES_VARIABLE = "XLSTM_KERNELS_KEEP_STATES"
CUT_VARIABLE = "XLSTM_KERNELS_SUPER_CHUNKS"


def mlstm_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    segment_ids: Tensor | None,
    state: MLSTMState | None,
    config: MLSTMConfig | None = None,
    cut: int | None = None,
) -> tuple[Tensor, MLSTMState]:
    """Run the mLSTM; shapes and meaning as in `xlstm_kernels.mlstm`, which checks the arguments.

    config: launch settings, from the table by default. cut: most super-chunks of a row, 0 for as
    many as the device needs; by default as the environment says.
    """
    B, H, _, Dk = q.shape
    Dv, dtype = v.shape[3], v.dtype
    state = state or MLSTMState.zeros(B, H, Dk, Dv, device=q.device)
    runs = None if segment_ids is None else document_runs(segment_ids).int()
    common_dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (contiguous_rows(x.to(common_dtype)) for x in (q, k, v))
    config = config or mlstm_config(common_dtype, Dk, Dv)
    inputs = (q, k, v, i.contiguous(), f.contiguous())
    start = [x.contiguous() for x in (state.C, state.n, state.m.detach())]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *start))
    # Only the gradients of q, k and the gates read the states.
    keep_states = keeps_states() and keep and any(x.requires_grad for x in (q, k, i, f))
    cut = most_super_chunks() if cut is None else cut
    h, C, n, m, *_ = forward(*inputs, *start, runs, config.numbers(), keep, keep_states, cut)
    return h.to(dtype), MLSTMState(C, n, m)


def keeps_states() -> bool:
    """Return whether XLSTM_KERNELS_KEEP_STATES says to keep the states of chunks for backward.

    Raises ValueError, in one line, if it is neither 0 nor 1.
    """
    given = os.environ.get(STATES_VARIABLE) or "0"
    if given not in ("0", "1"):
        raise ValueError(f"{STATES_VARIABLE}={given!r} is not allowed; allowed: 0, 1")
    return given == "1"


def most_super_chunks() -> int:
    """Return the most super-chunks of a row that XLSTM_KERNELS_SUPER_CHUNKS allows; 0: any number.

    Raises ValueError, in one line, if it is neither `auto` nor a number from 1 on.
    """
    given = os.environ.get(CUT_VARIABLE) or "auto"
    if given == "auto":
        return 0
    if not (given.isascii() and given.isdigit() and int(given)):
        allowed = "allowed: auto, or a number from 1 on"
        raise ValueError(f"{CUT_VARIABLE}={given!r} is not allowed; {allowed}")
    return int(given)


# Dynamo runs them once, while it traces, and takes the answers for constants.
keeps_states._dynamo_marked_constant = True  # type: ignore[attr-defined]
most_super_chunks._dynamo_marked_constant = True  # type: ignore[attr-defined]


forward = torch.library.custom_op("xlstm_kernels::mlstm_triton", launch_forward, mutates_args=())


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C0: Tensor,
    n0: Tensor,
    m0: Tensor,
    runs: Tensor | None,
    settings: list[int],
    keep: bool,
    keep_states: bool,
    cut: int = 0,
) -> tuple[Tensor, ...]:
    B, H, T, _ = q.shape
    h, row = v.new_empty(B, H, T, v.shape[3]), (B, H, T)
    centre = v.new_empty(B, v.shape[1], v.shape[3], dtype=torch.float32)
    config = MLSTMConfig.of_numbers(settings)
    sizes = sizes_of(q, v, runs is not None, config)
    v_max = v.new_empty(*v.shape[:2], sizes.chunks, dtype=torch.float32)
    C0_max = n0.new_empty(n0.shape)
    high, low, largest, den, m = (q.new_empty(row, dtype=torch.float32) for _ in range(5))
    h_centred, h_scale = v.new_empty(0, dtype=kept_dtype(v.dtype)), m.new_empty(0)
    if keep:
        h_centred = torch.empty_like(h, dtype=h_centred.dtype)
        h_scale = m.new_empty(B, H, v.shape[3] // config.output.block_v, T)
    C_end, n_end, m_end = (x.new_empty(x.shape) for x in (C0, n0, m0))
    states = States.empty(sizes, q.device, keep_states)
    kept = centre, v_max, C0_max, high, low, largest, h_centred, h_scale, den, m, *states
    return h, C_end, n_end, m_end, *kept


backward = torch.library.custom_op(
    "xlstm_kernels::mlstm_triton_backward", launch_backward, mutates_args=()
)


@backward.register_fake
def _(
    grads: list[Tensor],
    arguments: list[Tensor],
    runs: Tensor | None,
    kept: list[Tensor],
    settings: list[int],
    queries_and_keys: bool,
    values: bool,
    cut: int = 0,
    start: bool = True,
) -> list[Tensor]:
    wanted = (*[queries_and_keys] * 2, values, *[queries_and_keys] * 2, start, start)
    found = zip(arguments[:-1], wanted, strict=True)
    return [x.new_empty(x.shape if wants else (0,)) for x, wants in found]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *arguments, runs, settings, _, _, cut = inputs
    h, C, n, m_end, *kept = output
    ctx.mark_non_differentiable(m_end, *kept)
    # Else autograd would make a gradient of zeros for each of them.
    ctx.set_materialize_grads(False)
    ctx.results = [(x.shape, x.dtype, x.device) for x in (h, C, n)]
    ctx.save_for_backward(*arguments, runs, *kept)
    ctx.settings, ctx.cut = settings, cut


def _gradients(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    # Once: under activation checkpointing a second look is an error.
    saved = ctx.saved_tensors
    arguments, runs, kept = saved[:8], saved[8], saved[9:]
    needed = ctx.needs_input_grad
    parts = (needed[0] or needed[1] or needed[3] or needed[4], needed[2])
    grads = filled(given[:3], ctx.results)
    start = needed[5] or needed[6]
    found = backward(grads, list(arguments), runs, list(kept), ctx.settings, *parts, ctx.cut, start)
    wanted = [grad if needs else None for grad, needs in zip(found, needed, strict=False)]
    return (*wanted, *[None] * 6)  # m0, runs and the settings after them have no gradient


forward.register_autograd(_gradients, setup_context=_keep)
backward.register_autograd(functools.partial(refuse_second_derivative, "mlstm"))

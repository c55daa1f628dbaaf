"""Run a teacher over packed rows without waiting for the device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from xlstm_distill.models.attention.documents import Documents
from xlstm_distill.models.attention.teacher import NO_MASKS, attention_in_blocks
from xlstm_distill.models.families import CausalLM, family_of
from xlstm_kernels.segments import document_runs


def teacher_hidden(
    teacher: CausalLM,
    input_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    *,
    packed: bool,
) -> Tensor:
    """Return the last hidden states (B, T, d) of a teacher's body over rows of documents.

    The tensors are (B, T). `packed` says whether some row holds several documents. Equal to the
    body's own call with `position_ids`. That call looks for documents in the positions and so waits
    for the device, once per call.
    """
    body, family = teacher.model, family_of(teacher.config.model_type)
    if family.own_softmax:
        with attention_in_blocks(teacher):
            found = body(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=NO_MASKS,
                segment_ids=segment_ids if packed else None,
                use_cache=False,
            )
        return found.last_hidden_state
    if teacher.config._attn_implementation != "sdpa":
        # Other implementations take documents in forms of their own: transformers finds them.
        found = body(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return found.last_hidden_state
    masks: dict[int | None, Tensor | None] = {}
    documents = Documents(segment_ids) if packed and reads_documents(input_ids.device) else None

    def give_mask(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if documents is not None:
            return args, {**kwargs, "segment_ids": segment_ids, "documents": documents}
        # Layers of a hybrid (Olmo 3) differ in their reach; each mask is made once.
        reach = family.reach(attention)
        if reach not in masks:
            masks[reach] = _attention_mask(segment_ids, reach, packed=packed)
        return args, {**kwargs, "attention_mask": masks[reach]}

    handles = [
        layer.self_attn.register_forward_pre_hook(give_mask, with_kwargs=True)
        for layer in body.layers
    ]
    # transformers hands a four-dimensional mask through as it is, and looks for no documents.
    no_documents = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    blocks = attention_in_blocks(teacher) if documents else contextlib.nullcontext()
    try:
        with blocks:
            found = body(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=no_documents,
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    return found.last_hidden_state


def reads_documents(device: torch.device) -> bool:
    """Tell whether attention looks where documents begin; a GPU would have to be waited for."""
    return device.type == "cpu"


def _attention_mask(segment_ids: Tensor, reach: int | None, *, packed: bool) -> Tensor | None:
    """Return where attention looks, (B, 1, T, T) bool; None where causality says all."""
    batch, tokens = segment_ids.shape
    windowed = reach is not None and tokens >= reach
    if not packed and not windowed:
        # SDPA then takes its causal kernel, which reads no mask.
        return None
    index = torch.arange(tokens, device=segment_ids.device)
    visible = index <= index[:, None]
    if reach is not None and windowed:
        visible = visible & (index > index[:, None] - reach)
    if not packed:
        return visible.expand(batch, 1, tokens, tokens)
    runs = document_runs(segment_ids)
    return (visible & (runs[:, :, None] == runs[:, None, :]))[:, None]

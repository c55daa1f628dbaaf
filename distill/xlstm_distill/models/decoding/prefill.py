"""Reading a long prompt in chunks, so that memory does not grow with its length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_CPU, CHUNK_GPU = 2048, 8192
"""Tokens of all rows that a body reads at once. On a CPU, where more do not make it faster, their
activations are a small part of a model's; a GPU needs more to be busy."""


def read_in_chunks(model: Any, kwargs: dict[str, Any], cache: Any, chunk: int) -> dict[str, Any]:
    """Have a student's body read all but the end of a prompt, and return what is left to read.

    kwargs: the arguments of the student's forward pass, by name; those returned are of its last
    chunk, with the cache, which holds the rest.
    """
    given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    tokens, kept = given.shape[1], kwargs["logits_to_keep"]
    last = max(kept, (tokens - 1) % chunk + 1)
    kwargs = kwargs | {"past_key_values": cache, "use_cache": True}
    for start in range(0, tokens - last, chunk):
        part = _part(kwargs, tokens, start, min(start + chunk, tokens - last))
        for name in ("logits_to_keep", "labels"):  # of the head
            part.pop(name, None)
        model.model(**part)
    return _part(kwargs, tokens, tokens - last, tokens)


def chunk_size(given: Tensor, asked: int | None) -> int:
    """Return the tokens of each row that are read at once; `asked` or a default."""
    if asked is not None:
        return asked
    chunk = CHUNK_CPU if given.device.type == "cpu" else CHUNK_GPU
    return max(128, chunk // given.shape[0])


def can_be_read_in_chunks(model: Any, kwargs: dict[str, Any], chunk: int) -> bool:
    """Tell whether a forward pass wants no more than the logits of its last tokens."""
    kept = kwargs.get("logits_to_keep", 0)
    if not isinstance(kept, int) or not 0 < kept <= chunk:
        return False
    hidden = kwargs.get("output_hidden_states")
    hidden = model.config.output_hidden_states if hidden is None else hidden
    wants_all = hidden or kwargs.get("labels") is not None
    # A chunk's gradients would stop at the cache.
    return not wants_all and not torch.is_grad_enabled()


def _part(kwargs: dict[str, Any], tokens: int, start: int, end: int) -> dict[str, Any]:
    """Cut the arguments of a forward pass to the tokens from `start` on, before `end`."""
    found = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids", "segment_ids"):
        if found.get(name) is not None:
            found[name] = found[name][:, start:end]
    mask = found.get("attention_mask")
    if mask is not None:
        # It may cover what the cache held before.
        found["attention_mask"] = mask[:, : mask.shape[1] - tokens + end]
    return found

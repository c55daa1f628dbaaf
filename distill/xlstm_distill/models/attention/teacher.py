"""The attention of teachers where transformers' own would be slow.

Where PyTorch's fused attention does not compute a teacher's softmax, transformers would run it
eagerly, with scores of T x T in the model's own precision. And on a CPU, a mask of documents makes
the fused attention compute all that it hides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from xlstm_distill.models.attention.documents import Documents, attend_in_documents
from xlstm_distill.models.attention.full import full_attention
from xlstm_distill.models.families import CausalLM, family_of
from xlstm_kernels import sliding_window_attention

NAME = "xlstm_distill_blocks"
NO_MASKS = {"full_attention": None, "sliding_attention": None}
"""What a body takes in place of masks by the kind of layer: it makes none then."""


@contextlib.contextmanager
def attention_in_blocks(teacher: CausalLM) -> Iterator[None]:
    """Have a teacher attend by `attend`, which takes `segment_ids` instead of masks."""
    AttentionInterface.register(NAME, attend)
    config = teacher.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segment_ids: Tensor | None = None,
    documents: Documents | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as the teacher's layer does, inside documents: (B, T, H, D), and no weights.

    Arguments as transformers gives them: softcap bounds the scores, and s_aux (H,) are learned
    logits in the softmax's denominator. segment_ids (B, T): None for one document a row. documents:
    of these ids, so that not every layer looks for them again.
    """
    given: dict[str, Any] = {"softcap": softcap, "sink_logits": s_aux}
    reach = family_of(str(getattr(module, "config").model_type)).reach(module)  # noqa: B009
    fused = softcap is None and s_aux is None
    if fused and reach is None and segment_ids is not None and query.device.type == "cpu":
        documents = documents or Documents(segment_ids)
        return attend_in_documents(query, key, value, scaling, documents), None
    if reach is None:
        segments = None if segment_ids is None else (segment_ids, segment_ids)
        found = full_attention(query, key, value, scaling, segments, **given)
    else:
        settings: dict[str, Any] = {"window": reach, "sinks": 0, "segment_ids": segment_ids}
        found = sliding_window_attention(query, key, value, scale=scaling, **settings, **given)
    return found.transpose(1, 2).contiguous(), None

"""Reading a prompt of which only the last logits are wanted.

In chunks, so that memory does not grow with its length; and without what its outputs would cost:
the last layer takes the tokens in and computes nothing else of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from xlstm_distill.models.attention.heads import take
from xlstm_distill.models.cache import MixerCacheLayer, StudentCache
from xlstm_distill.models.decoding.arrival import Arrival
from xlstm_distill.runtime.products import fast_linear_layers
from xlstm_kernels import mlstm_state
from xlstm_kernels.state import state_dtype

CHUNK_CPU, CHUNK_GPU = 2048, 8192
"""Tokens of all rows that a body reads at once. On a CPU, where more do not make it faster, their
activations are a small part of a model's; a GPU needs more to be busy."""
ROWS_CPU = 16
"""Rows that a CPU reads at once where they are long: chunks of 128 are as many tokens as above."""


# A call of its own for the last tokens reads all weights once more, P numbers; what the last of L
# layers leaves out is 2 P / L operations a token. A CPU reads a number in the time of 20 to 30
# operations. A GPU, which does hundreds, seldom gains.
TOKENS_PER_LAYER = 32


OF_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "segment_ids")
"""Arguments of a forward pass that have a column for each token."""


CAPTURES = "transformers.utils.output_capturing"


class PromptTaken(Exception):
    """No error: the last layer has taken in tokens whose outputs nobody reads."""


def read_prompt(model: Any, kwargs: dict[str, Any], cache: Any, chunk: int) -> dict[str, Any]:
    """Have a student's body read all but the end of a prompt, and return what is left to read.

    kwargs: the arguments of the student's forward pass, by name; those returned are of the prompt's
    last tokens, with the cache, which holds the rest.
    """
    given = _given(kwargs)
    (rows, tokens), kept = given.shape[:2], kwargs["logits_to_keep"]
    kwargs = kwargs | {"past_key_values": cache, "use_cache": True}
    alone = _ends_alone(model, given, rows * (tokens - kept))
    last = kept if alone else max(kept, (tokens - 1) % chunk + 1)
    at_once = max(ROWS_CPU, CHUNK_CPU // tokens)
    if alone and rows > at_once and _can_be_read_by_rows(model, kwargs, cache):
        _read_by_rows(model, kwargs, tokens, tokens - last, at_once)
    else:
        _read(model, kwargs, tokens, range(0, tokens - last, chunk))
    return _part(kwargs, tokens, tokens - last, tokens)


def _read(model: Any, kwargs: dict[str, Any], tokens: int, chunks: range) -> None:
    """Have a body take in tokens chunk by chunk, of a prompt of so many."""
    cache, device = kwargs["past_key_values"], _given(kwargs).device
    # Outputs are computed all the same where somebody may be listening.
    cache.outputs_unread = not _is_watched(model)
    try:
        for start in chunks:
            part = _part(kwargs, tokens, start, min(start + chunks.step, chunks.stop))
            for name in ("logits_to_keep", "labels"):  # of the head
                part.pop(name, None)
            with contextlib.suppress(PromptTaken), fast_linear_layers(device):
                model.model(**part)
    finally:
        cache.outputs_unread = False


def _can_be_read_by_rows(model: Any, kwargs: dict[str, Any], cache: StudentCache) -> bool:
    """Tell whether rows may be read apart: they are whole prompts, and no head keeps all keys."""
    mask = kwargs.get("attention_mask")
    return (
        mask is not None
        and model.prefill_chunk is None
        and cache.lengths is None
        and kwargs.get("segment_ids") is None
        and mask.shape == _given(kwargs).shape[:2]
        and not any(mixer.kept.kept for mixer in model.mixers())
    )


def _read_by_rows(model: Any, kwargs: dict[str, Any], tokens: int, read: int, at_once: int) -> None:
    """Have a body take in `read` tokens of each row, some rows at a time without their padding.

    Rows of similar length are neighbours in an evaluation, so that little padding is left.
    """
    cache, mask = kwargs["past_key_values"], kwargs["attention_mask"]
    parts: list[StudentCache] = []
    for rows in torch.arange(len(mask)).split(at_once):
        part, own = dict(kwargs), model.new_cache()
        for name in (*OF_TOKENS, "attention_mask"):
            given = kwargs.get(name)
            if given is not None and len(given) == len(mask):
                part[name] = given[rows]
        part["past_key_values"] = own
        if parts:  # what was computed of the weights
            for layer, first in zip(own.mixer_layers(), parts[0].mixer_layers(), strict=True):
                layer.folded = first.folded
        # The last token read is kept, also of a row that is shorter: it may be padding alone.
        padding = int((part["attention_mask"][:, : read - 1] == 0).all(dim=0).cumprod(0).sum())
        part = _part(part, tokens, padding, tokens, held=padding)
        _read(model, part, tokens - padding, range(0, read - padding, CHUNK_CPU // at_once))
        parts.append(own)
    cache.join_rows(parts, read)


def take_in(
    mixer: Any,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    arrival: Arrival,
    layer: MixerCacheLayer,
    segment_ids: Tensor | None,
) -> NoReturn:
    """Have a mixer's cache take in tokens x (B, T, d) as `mix` does, and end the pass.

    Raises:
        PromptTaken: always; the rest of the layer would compute what nobody reads.
    """
    k, v = _keys_and_values(mixer, x)
    if mixer.rotates:
        k, _ = mixer.apply_rotary(k, k[:, :1], *position_embeddings)
    k = k.to(v.dtype)
    heads = mixer.kept
    if heads.kept:
        layer.extend(take(k, heads.full_keys), take(v, heads.full_keys))
    if heads.mixed:
        k, v = take(k, heads.keys), take(v, heads.keys)
    if mixer.has_mlstm:
        features = mixer.feature_map_k(k)
        state = layer.state_for(features, v, state_dtype(features, v))
        if arrival.begins is not None:
            layer.restart_state(arrival.begins_on(v.device))
        given = (features, v, *mixer.scalar_gates(x))
        after = mlstm_state(*given, state=state, segment_ids=segment_ids, backend=mixer.backend)
        for held, new in zip(state, after, strict=True):
            held.copy_(new)
    if mixer.has_window:
        layer.update(k, v, arrival)
    layer.seen += x.shape[1]
    raise PromptTaken


def _keys_and_values(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Make keys and values (B, G, T, D) as `HybridMixer.project` does."""
    family = mixer.family
    if family.fused:
        _, k, v = mixer.qkv_proj(x).split(mixer.widths, dim=-1)
    else:
        k, v = mixer.k_proj(x), mixer.v_proj(x)
    if mixer.clip is not None:
        k, v = (y.clamp(-mixer.clip, mixer.clip) for y in (k, v))
    if family.norm == "projection":
        k = mixer.k_norm(k)
    k, v = (y.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for y in (k, v))
    return (mixer.k_norm(k) if family.norm == "head" else k), v


def _given(kwargs: dict[str, Any]) -> Tensor:
    ids = kwargs.get("input_ids")
    found: Tensor = kwargs["inputs_embeds"] if ids is None else ids
    return found


def _ends_alone(model: Any, given: Tensor, others: int) -> bool:
    """Tell whether it pays to read the last tokens in a call of their own, after `others`."""
    layers = len(model.model.layers)
    on_cpu = given.device.type == "cpu"
    return on_cpu and others >= TOKENS_PER_LAYER * layers and not _is_watched(model)


def _is_watched(model: Any) -> bool:
    """Tell whether somebody listens to the body or a part of it, or has replaced a part.

    Who listens to an earlier layer must hear a prompt in one piece too.
    """
    body = model.model
    parts = list(body.modules())
    # The body has a hook of the student's own before its pass.
    if any(len(part._forward_pre_hooks) > (part is body) for part in parts):
        return True
    return any(
        # transformers leaves its own behind, which listen in passes that ask for all outputs.
        (part._forward_hooks and _is_heard(part._forward_hooks.values()))
        or part._compiled_call_impl is not None
        # Libraries that move weights replace a module's forward.
        or "forward" in vars(part)
        for part in parts
    )


def _is_heard(hooks: Iterable[Any]) -> bool:
    return any(getattr(hook, "__module__", "") != CAPTURES for hook in hooks)


def chunk_size(given: Tensor, asked: int | None) -> int:
    """Return the tokens of each row that are read at once; `asked` or a default."""
    if asked is not None:
        return asked
    chunk = CHUNK_CPU if given.device.type == "cpu" else CHUNK_GPU
    return max(128, chunk // given.shape[0])


def can_be_read_apart(model: Any, kwargs: dict[str, Any], chunk: int) -> bool:
    """Tell whether a forward pass wants the logits of its last tokens alone, and it pays."""
    kept = kwargs.get("logits_to_keep", 0)
    if not isinstance(kept, int) or not 0 < kept <= chunk:
        return False
    given = _given(kwargs)
    rows, tokens = given.shape[:2]
    if tokens <= chunk and not _ends_alone(model, given, rows * (tokens - kept)):
        return False
    # Layers that checkpoint activations give their mixers no cache.
    if model.training and model.is_gradient_checkpointing:
        return False
    wants_all = kwargs.get("labels") is not None
    for name in ("output_hidden_states", "output_router_logits"):
        asked = kwargs.get(name)
        wants_all |= bool(getattr(model.config, name, False) if asked is None else asked)
    # A chunk's gradients would stop at the cache.
    return not wants_all and not torch.is_grad_enabled()


def _part(
    kwargs: dict[str, Any], tokens: int, start: int, end: int, held: int = 0
) -> dict[str, Any]:
    """Cut the arguments of a forward pass to the tokens from `start` on, before `end`.

    The mask covers what came before too, without its first `held` tokens.
    """
    found = dict(kwargs)
    for name in OF_TOKENS:
        if found.get(name) is not None:
            found[name] = found[name][:, start:end]
    mask = found.get("attention_mask")
    if mask is not None:
        # It may cover what the cache held before.
        found["attention_mask"] = mask[:, held : mask.shape[1] - tokens + end]
    return found

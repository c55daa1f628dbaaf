"""Load the pinned teacher and its tokenizer; refuse what cannot be distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from xlstm_distill.artifacts.hashing import digest, hash_path
from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM, family_of
from xlstm_distill.recipe import Teacher
from xlstm_kernels.segments import document_runs


def load_teacher(config: Teacher, device: torch.device | str = "cpu") -> CausalLM:
    """Load the teacher in its recipe's dtype, for inference.

    Raises:
        UserError: the path is missing, holds no model, or the architecture is not supported.
    """
    # Only the configuration is read for this: a wrong teacher is refused before weights are loaded.
    _check_architecture(config)
    model = _load(AutoModelForCausalLM, config, "a model", dtype=getattr(torch, config.dtype))
    return model.eval().to(device)


def load_tokenizer(config: Teacher) -> Any:
    """Load the teacher's tokenizer and check that it fits the teacher.

    Raises:
        UserError: the tokenizer is missing, has no end-of-text token, or has more tokens than the
            teacher's embedding.
    """
    _check_path(config)
    tokenizer = _load(AutoTokenizer, config, "a tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"teacher.path: the tokenizer of {config.path!r} has no end-of-text token;"
            " set its eos_token."
        )
    vocabulary = _load(AutoConfig, config, "a model").vocab_size
    tokens = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    if tokens > vocabulary:
        raise UserError(
            f"teacher.path: the tokenizer of {config.path!r} has {tokens} tokens, its model only"
            f" {vocabulary}; they do not belong together. Use the tokenizer the teacher was trained"
            " with."
        )
    return tokenizer


def teacher_hash(config: Teacher) -> str:
    """Hash the recipe's settings of the teacher and, where the teacher is local, its files.

    A teacher of the hub is identified by its name and revision.
    """
    settings = config.model_dump(mode="json")
    # By content: the same teacher in another place is the same teacher.
    if Path(config.path).exists():
        settings["path"] = hash_path(Path(config.path))
    return digest(settings)


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
    body = teacher.model
    if teacher.config._attn_implementation != "sdpa":
        # Other implementations take documents in forms of their own: transformers finds them.
        found = body(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return found.last_hidden_state
    masks: dict[int | None, Tensor | None] = {}

    def give_mask(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        # Layers of a hybrid (Olmo 3) differ in their reach; each mask is made once.
        reach = getattr(attention, "sliding_window", None)
        if reach not in masks:
            masks[reach] = _attention_mask(segment_ids, reach, packed=packed)
        return args, {**kwargs, "attention_mask": masks[reach]}

    handles = [
        layer.self_attn.register_forward_pre_hook(give_mask, with_kwargs=True)
        for layer in body.layers
    ]
    # transformers hands a four-dimensional mask through as it is, and looks for no documents.
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    try:
        found = body(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=placeholder,
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    return found.last_hidden_state


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


def _check_architecture(config: Teacher) -> None:
    _check_path(config)
    family_of(_load(AutoConfig, config, "a model").model_type)


def _check_path(config: Teacher) -> None:
    """Refuse an absolute path that does not exist."""
    path = Path(config.path)
    # transformers would take it for a name on the hub, and complain about that.
    if path.is_absolute() and not path.is_dir():
        raise UserError(
            f"teacher.path: {config.path} is no directory; give a local directory or a hub id"
            " owner/name."
        )


def _load(auto: Any, config: Teacher, what: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(
            config.path,
            revision=config.revision or "main",
            trust_remote_code=config.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        # transformers explains in many lines; the first one says what is wrong.
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise UserError(
            f"teacher.path: {config.path!r} holds no {what[2:]} that can be loaded: {reason}"
        ) from error

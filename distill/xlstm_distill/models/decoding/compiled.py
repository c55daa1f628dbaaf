"""Decoding as one compiled graph; prompts and training run as before."""

from __future__ import annotations

import functools
import inspect
import shutil
import types
from typing import Any

import torch

from xlstm_distill.errors import UserError
from xlstm_distill.models.cache import StudentCache
from xlstm_distill.models.families import CausalLM

TOKENS_SEEN = r".*\.seen"
"""What torch.compile calls the numbers of tokens that a cache's layers have seen."""


def compile_decoding(student: CausalLM, **options: Any) -> None:
    """Compile the student's step of one token with a cache, in place.

    `generate` then waits for torch.compile once, at the third token of its first answer, and
    decodes faster from there on. Another number of rows is another graph, and so are rows with
    padding. A cache's first step, a step of beams, whose rows move, and all that is no step run as
    before. options: of torch.compile, `mode` for example.

    Raises:
        UserError: the student is on a CPU, and there is no C++ compiler; or its forward is no
            longer its class's, because it was compiled before or a library replaced it.
    """
    if "forward" in vars(student):
        raise UserError(
            "compile: the student's forward was replaced already, by an earlier compile_decoding"
            " or by a library that spreads it over devices; load it anew, on one device."
        )
    if student.device.type == "cpu" and "backend" not in options and not _has_compiler():
        raise UserError(
            "compile: torch.compile needs a C++ compiler on a CPU; install g++, or leave it out."
        )
    plain = type(student).forward
    names = tuple(inspect.signature(plain).parameters)[1:]  # without self

    def one_step(model: CausalLM, **kwargs: Any) -> Any:
        return plain(model, **kwargs)

    # torch.compile counts graphs by code, and more than 8 are an error. So each student has its own
    # code, or those of one family would share the count.
    one_step.__code__ = one_step.__code__.replace()
    step = torch.compile(one_step, fullgraph=True, **options)
    # Else the first graph would be of one number of tokens, and the next step would make another.
    config: Any = torch.compiler.config
    free = config.patch(dynamic_sources=TOKENS_SEEN)

    @functools.wraps(plain)  # transformers reads the signature
    def forward(self: CausalLM, *args: Any, **kwargs: Any) -> Any:
        kwargs = dict(zip(names, args, strict=False)) | kwargs
        if not _is_step(kwargs):
            return plain(self, **kwargs)
        if (mask := kwargs.get("attention_mask")) is not None:
            # A step reads its own column; a mask that grows would be another graph.
            kwargs["attention_mask"] = mask[:, -1:].contiguous()
        for layer in kwargs["past_key_values"].mixer_layers():
            layer.make_room()
        with free:
            return step(self, **kwargs)

    # A method, so that a deep copy of the student calls itself.
    student.forward = types.MethodType(forward, student)


def _has_compiler() -> bool:
    from torch._inductor import config

    named = config.cpp.cxx
    names = [named] if isinstance(named, str) else [name for name in named if name]
    return any(shutil.which(name) for name in names)


def _is_step(kwargs: dict[str, Any]) -> bool:
    """Tell whether a call decodes one token with tensors that an earlier step has checked."""
    cache = kwargs.get("past_key_values")
    given = kwargs.get("input_ids")
    given = kwargs.get("inputs_embeds") if given is None else given
    if not isinstance(cache, StudentCache) or given is None or given.shape[1] != 1:
        return False
    # The first step folds weights, which a graph would do for every token.
    steady = all(layer.checked for layer in cache.mixer_layers())
    return steady and not torch.is_grad_enabled()

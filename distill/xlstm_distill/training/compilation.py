"""Compile the parts of an objective where its time goes: decoder layers, in stage I mixers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from xlstm_distill.models.mixer import HybridMixer
from xlstm_distill.training.objectives import Objective


def compile_parts(objective: Objective, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile an objective's parts in place; the first pass through them takes minutes.

    Call it after `prepare`: FSDP2 gives each layer a class of its own, and a method of the class
    before would skip activation checkpointing. A method is compiled, and not the module's call:
    FSDP2 gathers and cuts weights in hooks around the method, which must stay outside of the graph.
    """
    # Not above: it takes seconds.
    from torch._dynamo import config

    # Graphs of an earlier training in this process would count towards dynamo's limit.
    torch.compiler.reset()
    parts = objective.hot_methods()
    # Layers share code, and each kind has a graph of its own: those that keep other heads, say.
    # Dynamo refuses more than 8 of one code.
    config.recompile_limit = max(config.recompile_limit, len(parts))
    for module, method in parts:
        compiled = torch.compile(
            getattr(module, method),
            backend=backend,
            # A break would fall back to Python in silence; so would too many graphs.
            fullgraph=True,
            # One graph for each shape. Dynamo's own choice depends on the shapes seen before, so a
            # resumed training could get another graph than an uninterrupted one.
            dynamic=False,
        )
        setattr(module, method, compiled)


def kernels_of(objective: Objective) -> str:
    """Name the kernels of an objective's mixers; a stage has chosen what `auto` stands for."""
    asked = {m.backend for m in objective.modules() if isinstance(m, HybridMixer)}
    return " and ".join(sorted(asked))


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Run compiled parts as plain Python, so that hooks on modules inside of them act."""
    # Nothing was compiled before dynamo was imported, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

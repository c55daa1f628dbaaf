"""Which kernels a stage's mixers run: the same on all ranks, and the same after a restart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from xlstm_distill.artifacts.files import write_text
from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.mixer import HybridMixer
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import (
    from_rank_zero,
    gathered,
    is_first_of_node,
    is_main_process,
)
from xlstm_kernels import Backend, dispatch, verdicts
from xlstm_kernels.verdicts import Question, Runner

KEPT_FILE = "kernels.json"
"""In a stage's work directory: the kernels with which it began."""

COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What a mixer computes in under accelerate's mixed precision; else in its weights' dtype."""


class Opinion(NamedTuple):
    """What a rank would run, and why, where it is not Triton."""

    backend: Backend
    why: str = ""


def choose_kernels(
    student: CausalLM,
    recipe: Recipe,
    device: torch.device,
    work: Path,
    console: Console | None = None,
    *,
    precision: str = "no",
    decodes: bool = False,
    runner: Runner = verdicts.in_a_child,
) -> Backend:
    """Set every mixer's kernels and return them; all ranks must ask.

    With `student.backend: auto` they are Triton's where these pass their self-check on every
    machine of the job, else torch's. `work` keeps that choice, and a restart takes it again.
    precision: accelerate's. decodes: whether the stage generates text too. runner: who answers
    questions that nobody has asked on this machine.

    Raises:
        UserError: the kernels that the recipe names cannot run this student on this device.
    """
    asked = recipe.student.backend
    if asked == "auto":
        chosen = _automatic(student, device, work, console, precision, decodes, runner)
    else:
        chosen = asked
        objection = _objection(student, device, asked_for=True) if asked == "triton" else None
        if objection:
            raise UserError(f"student.backend: 'triton' {objection}.")
    for mixer in student.mixers():
        mixer.backend = chosen
    return chosen


def _automatic(
    student: CausalLM,
    device: torch.device,
    work: Path,
    console: Console | None,
    precision: str,
    decodes: bool,
    runner: Runner,
) -> Backend:
    """Decide for all ranks what `auto` means in this stage."""
    try:
        forced = dispatch.forced_backend()
    except ValueError as error:
        raise UserError(f"{error}.") from None
    kept = from_rank_zero(lambda: _kept(work))
    objection = _objection(student, device, asked_for=False)
    mine: Opinion | None
    if objection is not None:
        mine = Opinion("torch", objection)
    elif (fixed := forced or kept) is not None:
        mine = Opinion(fixed, "" if fixed == "triton" else "as it began")
    elif is_first_of_node():
        # One rank of a machine for all of them: the check takes time and memory of a GPU.
        mine = _checked(questions(student, precision, decodes), device, runner)
    else:
        mine = None
    opinions = [opinion for opinion in gathered(mine) if opinion is not None]
    against = [opinion for opinion in opinions if opinion.backend != "triton"]
    chosen: Backend = "torch" if against else "triton"
    if is_main_process() and chosen != kept:
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / KEPT_FILE, json.dumps({"backend": chosen}) + "\n")
    if console is not None and device.type == "cuda" and against and chosen != kept:
        console.line(f"kernels: plain torch, {against[0].why or 'as asked for'}")
    return chosen


def _checked(asked: Sequence[Question], device: torch.device, runner: Runner) -> Opinion:
    """Ask whether the kernels are right on this machine."""
    index = torch.cuda.current_device() if device.index is None else device.index
    facts = verdicts.machine(index)
    for each, verdict in zip(asked, verdicts.ask(asked, index, runner), strict=True):
        if not verdict.right:
            return Opinion("torch", verdicts.warning(each, verdict, facts))
    return Opinion("triton")


def questions(student: CausalLM, precision: str, decodes: bool) -> list[Question]:
    """List what has to be right: each operator of the mixers, at their dtype and head dims."""
    found: list[Question] = []
    for mixer in student.mixers():
        dtype = COMPUTE.get(precision) or next(mixer.o_proj.parameters()).dtype
        for operator, dims in _operators(mixer, decodes):
            asked = verdicts.question(operator, dtype, dims)
            if asked not in found:
                found.append(asked)
    return found


def _operators(mixer: HybridMixer, decodes: bool) -> list[tuple[str, dict[str, int]]]:
    """The operators that a mixer calls, with their head dims."""
    width = {"D": mixer.head_dim}
    memory = {"Dk": mixer.kernel_dims.get("Dk", min(dispatch.HEAD_DIMS)), "Dv": mixer.head_dim}
    # Kernels with another softmax are checked apart.
    logits = mixer.sinks if mixer.family.sink_logits else None
    extras = dispatch.score_extras(mixer.softcap, logits)
    step = (dispatch.variant("hybrid_step", extras), width | memory)
    found = []
    if mixer.has_mlstm:
        found.append(("mlstm", memory))
    if mixer.has_window:
        found.append((dispatch.variant("sliding_window_attention", extras), width))
    if decodes and found:
        found.append(step if mixer.has_window else ("mlstm_step", memory))
    return found


def _objection(student: CausalLM, device: torch.device, *, asked_for: bool) -> str | None:
    """Say why Triton cannot run a student on a device; None if it can.

    The interpreter, which runs the kernels on a CPU, is only for who asks for them by name.
    """
    if device.type != "cuda" and not asked_for:
        return "needs CUDA"
    for mixer in student.mixers():
        if not mixer.kept.mixed:
            continue
        objection = dispatch.triton_lacks(mixer.kernel_dims, mixer.sink_tokens)
        if objection is None and asked_for:
            probe = (torch.empty(0, device=device),)
            objection = dispatch.triton_refuses(probe, mixer.kernel_dims, mixer.sink_tokens)
        if objection:
            return objection
    return None


def kernels_of(recipe: Recipe, work: Path) -> Backend | None:
    """Return the kernels of a stage that has begun, perhaps in an earlier process."""
    asked = recipe.student.backend
    return _kept(work) if asked == "auto" else asked


def _kept(work: Path) -> Backend | None:
    """Read the kernels with which the stage began; None if it begins now."""
    try:
        known = json.loads((work / KEPT_FILE).read_text())
    except (OSError, ValueError):
        return None
    backend = known.get("backend") if isinstance(known, dict) else None
    return backend if backend in ("torch", "triton") else None

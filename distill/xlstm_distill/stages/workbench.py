"""What several stages do alike: open rows, load and save models, keep a training's outcome."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from xlstm_distill.artifacts import Artifact, Draft
from xlstm_distill.data.budget import held_out_span
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.errors import UserError
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.loading import WeightFiles, empty_student, load_shards
from xlstm_distill.models.teacher import teacher_config
from xlstm_distill.planning.architecture import (
    Architecture,
    check_kept_attention,
    read_architecture,
)
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console, Progress
from xlstm_distill.runtime.device import host_memory
from xlstm_distill.runtime.ranks import is_main_process
from xlstm_distill.training.log import LOG_FILE
from xlstm_distill.training.plan import TrainingPlan, TrainingResult
from xlstm_eval.answering.coordinator import Tally


def open_domains(
    recipe: Recipe, artifacts: Mapping[str, Artifact], limits: Mapping[str, int]
) -> dict[str, DomainRows]:
    """Open the first rows of each domain: as many as the use needs, so that more change nothing."""
    held = recipe.data.validation_rows
    return {
        name: DomainRows(name, artifact, held, held_out_span(recipe, name), limits[name])
        for name, artifact in artifacts.items()
    }


def architecture_of(model: CausalLM) -> Architecture:
    """The numbers of a model's architecture; a student counts as its teacher."""
    config = model.config.to_dict()
    config["model_type"] = config["model_type"].removeprefix("xlstm_")
    return read_architecture(config, "config")


def kept_line(student: CausalLM) -> str:
    """Say what a student keeps of the teacher's full attention; nothing where it keeps none."""
    whole = [m.layer_idx for m in student.mixers() if not m.kept.mixed]
    parts = [f"layers {', '.join(map(str, whole))}"] if whole else []
    for mixer in student.mixers():
        if mixer.kept.kept and mixer.kept.mixed:
            heads = ", ".join(map(str, mixer.kept.kept))
            parts.append(f"heads {heads} of layer {mixer.layer_idx}")
    return f"the student keeps full attention in {'; '.join(parts)}" if parts else ""


def check_kept(recipe: Recipe) -> None:
    """Refuse layers and heads to keep that the teacher has not, before any work.

    Raises:
        UserError: it has no such layers or heads, or the teacher cannot be found.
    """
    if recipe.student.mixer.attention is None:
        return
    config = teacher_config(recipe.teacher).to_dict()
    check_kept_attention(recipe.student.mixer, read_architecture(config, recipe.teacher.path))


def keep_training(draft: Draft, work: Path, plan: TrainingPlan, result: TrainingResult) -> None:
    """Note a training's result in its artifact, and keep its log."""
    draft.earlier_seconds = result.earlier_seconds
    draft.results |= {
        "steps": plan.steps,
        "last": result.last,
        "skipped_steps": result.skipped_steps,
        "compiled": result.compiled,
        "validation_before": result.before,
        "validation_after": result.after,
        "inexact_restarts": list(result.inexact),
    }
    if is_main_process():
        shutil.copy(work / LOG_FILE, draft.path / LOG_FILE)


SHARD_SIZE = "4GB"
"""Most bytes of a file of weights. Files are hashed and read in parallel; small models have one."""


def save_model(
    model: CausalLM,
    tokenizer: Any,
    directory: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a Hugging Face directory: safetensors, config and tokenizer.

    `weights` replaces the model's own, for example those gathered from several ranks.
    """
    # save_pretrained empties the dictionary that it is given.
    state = dict(weights) if weights else None
    model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(directory)


def start_student(artifact: Artifact, accelerator: Accelerator) -> tuple[CausalLM, Path | None]:
    """Make the student to train from, in fp32: on its device, or without weights under FSDP2.

    DeepSpeed takes it from the CPU. Returns also the folder from which the weights are still to be
    read (`load_shards`); None where they are there.

    Raises:
        RunError: a file of it is missing or changed.
        UserError: DeepSpeed's ranks on this machine would need more host memory than it has.
    """
    folder = artifact.model_path
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        refuse_whole_copies(WeightFiles(folder).count_numbers(), host_memory())
        return load_student(artifact, torch.float32), None
    if is_main_process():
        artifact.check_content("model")
    student = empty_student(folder, torch.float32)
    if accelerator.distributed_type == DistributedType.FSDP:
        return student, folder
    # Each tensor goes from the mapped file to the device, which holds the model whole.
    load_shards(student, folder, accelerator.device)
    return student, None


def refuse_whole_copies(numbers: int, memory: int) -> None:
    """Refuse a student of so many numbers that is whole in fp32 on every rank of this machine.

    Raises:
        UserError: they need more than `memory`, the bytes of the host.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = 4 * numbers * ranks
    if needed > memory:
        raise UserError(
            f"accelerate launch: DeepSpeed loads the student whole in fp32 on each rank: "
            f"{ranks} ranks need {needed / 1e9:.1f} GB of this machine's memory, and it has "
            f"{memory / 1e9:.1f}; launch with recipes/accelerate/fsdp2.yaml, whose ranks read "
            "their shards alone, or with fewer ranks on a machine."
        )


def load_student(
    artifact: Artifact, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> CausalLM:
    """Load the student an artifact holds; rank 0 compares its checksums first.

    Raises:
        RunError: a file of it is missing or changed.
    """
    # One rank for all: 64 of them would read 64 times 16 GB from the same disks.
    if is_main_process():
        artifact.check_content("model")
    student: CausalLM = AutoModelForCausalLM.from_pretrained(
        artifact.model_path, dtype=dtype, device_map={"": torch.device(device)}
    )
    return student


class Bar:
    """Shows a tally, which counts from the evaluation's beginning, on a bar, which counts on."""

    def __init__(self, progress: Progress) -> None:
        self._bar, self._started = progress, time.monotonic()
        self._done = self._kept = 0

    def __call__(self, tally: Tally) -> None:
        if tally.kept > self._kept:
            # Answered before this run of the program: no part of its speed.
            self._bar.skip(tally.kept - self._kept)
            self._kept = tally.kept
        done = tally.done - tally.kept
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = {"tokens/s": tally.tokens / seconds} if tally.tokens else {}
        self._bar.update(done - self._done, total=tally.total, **rate)
        self._done = done


@contextmanager
def bar(console: Console, label: str) -> Iterator[Bar]:
    """Show an evaluation's requests on a bar during the block."""
    with console.progress(label, None, unit="requests") as progress:
        yield Bar(progress)

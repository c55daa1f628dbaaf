"""What several stages do alike: find data, name what an artifact is made from, load and save models."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.data.budget import captured_rows, held_out_span, rows_to_align
from xlstm_distill.data.prepare import data_identity, prepare_domain, tokenizer_hash
from xlstm_distill.data.rows import DomainRows
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.teacher import load_tokenizer, teacher_hash
from xlstm_distill.planning.architecture import Architecture, read_architecture
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import is_main_process, wait_for_everyone
from xlstm_distill.targets.store import VERSION, Identity
from xlstm_distill.training.log import LOG_FILE
from xlstm_distill.training.plan import TrainingPlan, TrainingResult

STORE = "store"
"""Folder of a capture's shards inside its artifact."""
NO_PART = ("micro_batch", "non_finite")
"""Keys of a training that may be changed to go on from its checkpoint: what was skipped is noted in the manifest."""


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices off the terminal; errors still come through."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def part(model: Any, *exclude: str) -> dict[str, Any]:
    """A part of the recipe as JSON, for manifests and fingerprints."""
    return model.model_dump(mode="json", exclude=set(exclude) or None)


def prepare_domains(
    recipe: Recipe, run: Run, names: Iterable[str], console: Console
) -> dict[str, Artifact]:
    """Make (or find) the packed rows of the named domains, in the recipe's order, which all processes share."""
    wait_for_everyone()  # they meet here: later the main process may wait for another run's preparation for hours
    tokenizer, wanted = load_tokenizer(recipe.teacher), set(names)
    ordered = [name for name in recipe.data.domains if name in wanted]
    return {name: prepare_domain(recipe, run, name, tokenizer, console) for name in ordered}


def open_domains(
    recipe: Recipe, artifacts: Mapping[str, Artifact], limits: Mapping[str, int]
) -> dict[str, DomainRows]:
    """Open the first rows of domains for reading: as many as the use needs, so that more of them change nothing."""
    held = recipe.data.validation_rows
    return {
        name: DomainRows(name, artifact, held, held_out_span(recipe, name), limits[name])
        for name, artifact in artifacts.items()
    }


def data_inputs(recipe: Recipe, names: Iterable[str]) -> dict[str, str]:
    """Identities of packed rows, as inputs of a stage; the rows need not be there."""
    tokenizer = load_tokenizer(recipe.teacher)
    return {f"data/{name}": data_identity(recipe, name, tokenizer) for name in names}


def aligned_domains(recipe: Recipe) -> dict[str, float]:
    """Domains that alignment reads, and their weights."""
    return dict(recipe.align.domains or dict.fromkeys(recipe.data.domains, 1.0))


def align_rows(recipe: Recipe) -> dict[str, int]:
    """Rows of each domain that alignment sees."""
    return {name: rows_to_align(recipe, name) for name in aligned_domains(recipe)}


def align_request(recipe: Recipe) -> Request:
    """What the seed weights θ(0) of all experts are made from."""
    return Request(
        "align",
        parts={
            "align": part(recipe.align, *NO_PART),
            "mixer": part(recipe.student.mixer),
            "seed": recipe.seed,
        },
        inputs={
            "teacher": teacher_hash(recipe.teacher),
            **data_inputs(recipe, aligned_domains(recipe)),
        },
    )


def capture_request(recipe: Recipe, domain: str) -> Request:
    """What a domain's stored targets are made from."""
    request = _capture_request(recipe, domain, rows=captured_rows(recipe)[domain])
    return replace(request, identity=capture_identity(recipe, domain))


def capture_identity(recipe: Recipe, domain: str) -> str:
    """Hash of what a domain's targets are, for however many rows they were captured."""
    return _capture_request(recipe, domain).fingerprint


def _capture_request(recipe: Recipe, domain: str, **counts: int) -> Request:
    return Request(
        "capture",
        name=domain,
        parts={
            **part(recipe.capture, "batch", "targets", "shard_teacher"),
            "store": VERSION,
            **counts,
        },
        inputs={"teacher": teacher_hash(recipe.teacher), **data_inputs(recipe, [domain])},
    )


def architecture_of(model: CausalLM) -> Architecture:
    """The numbers of a model's architecture; a student counts as its teacher."""
    config = model.config.to_dict()
    return read_architecture(
        {**config, "model_type": config["model_type"].removeprefix("xlstm_")}, "config"
    )


def keep_training(draft: Draft, work: Path, plan: TrainingPlan, result: TrainingResult) -> None:
    """Note a training's result in its artifact, and keep its log."""
    draft.earlier_seconds = result.earlier_seconds
    draft.results |= {
        "steps": plan.steps,
        "last": result.last,
        "skipped_steps": result.skipped_steps,
        "validation_before": result.before,
        "validation_after": result.after,
    }
    if is_main_process():
        shutil.copy(work / LOG_FILE, draft.path / LOG_FILE)


def store_identity(recipe: Recipe, domain: str) -> Identity:
    """What every shard of a domain's targets says it was made from."""
    tokenizer = load_tokenizer(recipe.teacher)
    return Identity(
        domain=domain,
        data=data_identity(recipe, domain, tokenizer),
        tokenizer=tokenizer_hash(tokenizer),
        teacher=teacher_hash(recipe.teacher),
        revision=recipe.teacher.revision,
        dtype=recipe.teacher.dtype,
        top_k=recipe.capture.top_k,
        mass=recipe.capture.mass,
        min_k=recipe.capture.min_k,
    )


def save_model(
    model: CausalLM,
    tokenizer: Any,
    directory: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a Hugging Face directory: safetensors, config and tokenizer; of the model's own weights or of others."""
    model.save_pretrained(directory, state_dict=dict(weights) if weights else None)
    tokenizer.save_pretrained(directory)


def load_student(
    artifact: Artifact, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> CausalLM:
    """Load the student an artifact holds."""
    student: CausalLM = AutoModelForCausalLM.from_pretrained(artifact.model_path, dtype=dtype)
    return student.to(device)

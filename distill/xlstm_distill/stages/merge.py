"""Merge: combine the experts' weights into one student (stage III; paper, Eq. 14)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.merging.linear import merge_state_dicts
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.loading import WeightFiles, empty_student, fill
from xlstm_distill.runtime.console import Console
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.workbench import save_model


def merge(lineage: Lineage, run: Run, console: Console) -> Artifact:
    """Merge the experts; with one expert the result is that expert."""
    weights = lineage.merge_weights()
    # All of them, also those of weight 0: they are inputs of the merge's fingerprint.
    experts = {name: run.need(lineage.request(f"distill/{name}")) for name in weights}

    def build(draft: Draft) -> None:
        # Experts of weight 0 are not read.
        used = {name: weight for name, weight in weights.items() if weight > 0}
        for name in used:
            experts[name].check_content("model")
        places = {name: experts[name].model_path for name in used}
        merged = merged_student(places, used)
        save_model(merged, lineage.tokenizer, draft.path / "model")
        draft.results |= {"weights": weights}
        shown = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
        console.line(f"merge: {shown}")

    return run.make(lineage.request("merge"), build, console=console)


def merged_student(places: Mapping[str, Path], weights: Mapping[str, float]) -> CausalLM:
    """Merge the fp32 students saved in these folders, by expert.

    Host memory holds the merged student, and of the experts one tensor at a time.

    Raises:
        UserError: the experts differ in a tensor, or a weight is not allowed.
        RunError: the tensors are not those of the student.
    """
    first = next(iter(places.values()))
    merged = empty_student(first, torch.float32)
    files = {name: WeightFiles(place) for name, place in places.items()}
    with _all_cores():
        state = merge_state_dicts(files, weights)
    fill(merged, state, first)
    return merged


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Compute on all cores that this process may use.

    torchrun gives each rank one thread, and the other ranks only wait here.
    """
    before = torch.get_num_threads()
    # macOS has no affinity.
    affinity = getattr(os, "sched_getaffinity", None)
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

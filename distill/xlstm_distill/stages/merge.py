"""Merge: combine the experts' weights into one student (stage III; paper, Eq. 14)."""

from __future__ import annotations

import torch

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.merging.linear import merge_state_dicts
from xlstm_distill.runtime.console import Console
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.workbench import load_student, save_model


def merge(lineage: Lineage, run: Run, console: Console) -> Artifact:
    """Merge the experts; with one expert the result is that expert."""
    weights = lineage.merge_weights()
    # All of them, also those of weight 0: they are inputs of the merge's fingerprint.
    experts = {name: run.need(lineage.request(f"distill/{name}")) for name in weights}

    def build(draft: Draft) -> None:
        # Experts of weight 0 are not loaded: a student of 8B parameters takes 32 GB in float32.
        used = {name: weight for name, weight in weights.items() if weight > 0}
        students = {name: load_student(experts[name], torch.float32) for name in used}
        states = {name: student.state_dict() for name, student in students.items()}
        # Any of them will do: all have the same architecture, and every weight is replaced.
        merged = next(iter(students.values()))
        merged.load_state_dict(merge_state_dicts(states, used))
        save_model(merged, lineage.tokenizer, draft.path / "model")
        draft.results |= {"weights": weights}
        shown = ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
        console.line(f"merge: {shown}")

    return run.make(lineage.request("merge"), build, console=console)

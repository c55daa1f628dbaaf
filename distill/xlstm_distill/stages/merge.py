"""Merge: combine the experts' weights into one student (stage III; paper, Eq. 14)."""

from __future__ import annotations

import torch

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.merging.linear import merge_state_dicts
from xlstm_distill.models.teacher import load_tokenizer
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import Console
from xlstm_distill.stages.distill import find_experts
from xlstm_distill.stages.workbench import load_student, save_model


def merge_weights(recipe: Recipe) -> dict[str, float]:
    """The recipe's merge weights by expert; uniform ones are 1/K each."""
    experts = recipe.distill.experts
    if recipe.merge.weights == "uniform":
        return {name: 1 / len(experts) for name in experts}
    return dict(recipe.merge.weights)


def merge_request(recipe: Recipe, run: Run) -> tuple[Request, dict[str, Artifact]]:
    """What the merged student is made from, and the experts, which must be there and of this recipe."""
    weights = merge_weights(recipe)
    experts = find_experts(recipe, run)
    request = Request(
        "merge",
        parts={"method": recipe.merge.method, "weights": weights},
        inputs={f"distill/{name}": artifact.fingerprint for name, artifact in experts.items()},
    )
    return request, experts


def run(recipe: Recipe, run: Run, console: Console) -> Artifact:
    """Merge the experts; with one expert the result is that expert."""
    request, experts = merge_request(recipe, run)
    weights = merge_weights(recipe)

    def build(draft: Draft) -> None:
        students = {
            name: load_student(experts[name], torch.float32) for name, w in weights.items() if w > 0
        }
        used = {name: weights[name] for name in students}
        merged = merge_state_dicts({name: s.state_dict() for name, s in students.items()}, used)
        student = next(iter(students.values()))
        student.load_state_dict(merged)
        save_model(student, load_tokenizer(recipe.teacher), draft.path / "model")
        draft.results |= {"weights": weights}
        console.line(
            "merge: " + ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
        )

    return run.make(request, build)

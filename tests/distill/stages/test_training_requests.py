"""What a training's fingerprint must not depend on."""

from __future__ import annotations

from xlstm_distill.recipe import load_recipe
from xlstm_distill.stages.distill import expert_request
from xlstm_distill.stages.workbench import align_request


def test_skipping_bad_steps_keeps_the_checkpoints_of_a_training(root):
    """The error's advice, `non_finite: skip`, must not start the training over."""
    fingerprints = {}
    for value in ("stop", "skip"):
        sets = [f"align.non_finite={value}", f"distill.non_finite={value}"]
        recipe = load_recipe(root / "recipes" / "quickstart.yaml", sets)
        expert = next(iter(recipe.distill.experts))
        requests = align_request(recipe), expert_request(recipe, expert)
        fingerprints[value] = [request.fingerprint for request in requests]
    assert fingerprints["stop"] == fingerprints["skip"]

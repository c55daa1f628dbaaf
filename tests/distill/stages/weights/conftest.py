"""A run whose experts are there: the embedded teacher as a student, and disturbed copies of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from xlstm_distill.artifacts import Run
from xlstm_distill.models.student import convert
from xlstm_distill.models.teacher import load_teacher
from xlstm_distill.recipe import load_recipe
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.workbench import save_model

# As wide as a row, so that the student is the teacher where its prompts are shorter.
MIXER = {"branches": ["window"], "window": 96, "sinks": 4}
NOISE = {"good": 0.0, "broken": 0.3}
"""Disturbance of each expert's weights, relative to their size."""


@pytest.fixture(scope="session")
def found_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Make a run of these experts and merge settings; the experts are published in it."""
    quickstart = root / "recipes" / "quickstart"

    # The evaluation's task: its file of items is missing, so whoever reads it fails.
    tasks = tmp_path_factory.mktemp("tasks")
    shutil.copy(quickstart / "tasks" / "qs_math_add.yaml", tasks)

    def make(
        merge: dict[str, Any],
        experts: tuple[str, ...] = ("good", "broken"),
        include: Path = tasks,
    ):
        folder = tmp_path_factory.mktemp("found")
        domain = {"sources": [{"generator": "math", "documents": 60}]}
        phases = [{"domain": "math", "tokens": 512}]
        training = {"batch": 1, "lr": 1e-3, "warmup_steps": 0}
        content = {
            "name": "found",
            "seed": 3,
            "teacher": {"path": str(quickstart / "teacher"), "dtype": "float32"},
            "student": {"mixer": MIXER},
            "data": {
                "workers": 1,
                "context": 128,
                "validation_rows": 2,
                "domains": {"math": domain},
            },
            "align": {"tokens": 512, **training},
            "distill": {**training, "experts": {name: {"phases": phases} for name in experts}},
            "merge": merge,
            "evaluate": {
                "include": str(include),
                "apply_chat_template": True,
                "batch": 64,
                "tasks": [{"name": "qs_math_add", "domain": "math"}],
            },
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        recipe = load_recipe(path)
        lineage, run = Lineage(recipe), Run.open(folder / "run", recipe)
        for name in experts:
            student = disturbed(recipe, NOISE[name])

            def build(draft, student=student):
                save_model(student, lineage.tokenizer, draft.path / "model")

            run.make(lineage.request(f"distill/{name}"), build)
        return lineage, run

    return make


def disturbed(recipe: Any, noise: float) -> Any:
    """The teacher as a student, with noise on its matrices."""
    student = convert(load_teacher(recipe.teacher), recipe.student.mixer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in student.named_parameters():
            if weight.ndim == 2:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.add_(drawn * weight.std() * noise)
    return student

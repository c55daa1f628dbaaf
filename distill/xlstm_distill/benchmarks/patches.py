"""Measure what patches of a run's experts keep: size, the expert's difference, and its recovery.

`python -m xlstm_distill.benchmarks.patches RECIPE RUN` reads a finished run. For each density it
makes a patch of every expert, applies it to the aligned student and scores it on the tasks of its
own domain. Recovery is the mean of student's score over teacher's. docs/merging.md has the results.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from xlstm_distill.artifacts import Run
from xlstm_distill.merging.patches import make_patch
from xlstm_distill.merging.stack import load_patched
from xlstm_distill.recipe import EvalTask, Recipe, load_recipe
from xlstm_distill.runtime.console import byte_size
from xlstm_distill.stages.evaluate import scores
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.outline import TEACHER

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Point:
    """One expert at one density: bytes, share of the model's, retained difference, recovery."""

    bytes: int
    share: float
    retained: float
    recovery: float


class Measurement:
    """A finished run, whose experts have the names of their tasks' domains."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self.recipe, self.run = recipe, Run(run, recipe)
        self.experts = [name for name in recipe.distill.experts if self.tasks(name)]
        self.base = self.model("align")
        self.teacher = self._teacher()

    def tasks(self, domain: str) -> list[EvalTask]:
        """The recipe's tasks of a domain."""
        return [task for task in self.recipe.evaluate.tasks if task.domain == domain]

    def model(self, label: str) -> Path:
        """Folder of the model of an artifact."""
        artifact = self.run.load(label)
        if artifact is None:
            raise SystemExit(f"{self.run.path(label)}: is not there; finish the run first.")
        return artifact.model_path

    def _teacher(self) -> dict[str, float]:
        artifact = self.run.load(f"evaluate/{TEACHER}")
        if artifact is None:
            raise SystemExit("the teacher is not evaluated yet; finish the run first.")
        return {task["task"]: task["score"] for task in artifact.read_json("results.json")}

    def recovery(self, domain: str, student: Any) -> float:
        """Mean of student's score over teacher's, on the tasks of a domain."""
        tasks = tuple(self.tasks(domain))
        evaluate = self.recipe.evaluate.model_copy(update={"tasks": tasks})
        asked = Lineage(self.recipe.model_copy(update={"evaluate": evaluate}))
        found = scores(student, asked)
        return statistics.fmean(found[name] / self.teacher[name] for name in found)

    def saved(self, domain: str, label: str) -> float:
        """Recovery of a model of the run."""
        student = AutoModelForCausalLM.from_pretrained(self.model(label))
        return self.recovery(domain, student)

    def point(self, domain: str, density: float, folder: Path) -> Point:
        """Make, apply and score a patch."""
        patch = folder / f"{domain}-{density:g}.safetensors"
        facts = make_patch(self.base, self.model(f"distill/{domain}"), patch, density, domain)
        size = patch.stat().st_size
        student = load_patched(self.base, [(patch, 1.0)])
        found = self.recovery(domain, student)
        return Point(size, size / facts.model_bytes, facts.retained, found)


def row(name: str, points: Mapping[str, Point] | None, recoveries: Sequence[float]) -> str:
    """One line of the table; sizes and retained differences are means over the experts."""
    cells = [name, "", "", ""]
    if points:
        found = list(points.values())
        cells[1] = byte_size(statistics.fmean(point.bytes for point in found))
        cells[2] = f"{statistics.fmean(point.share for point in found):.1%}"
        cells[3] = f"{statistics.fmean(point.retained for point in found):.1%}"
    shown = [f"{value:.3f}" for value in (*recoveries, statistics.fmean(recoveries))]
    return f"| {' | '.join([*cells, *shown])} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.patches", description=__doc__
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path, help="a finished run of this recipe")
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--limit", type=int, help="items of each task; all by default")
    options = parser.parse_args(arguments)
    overrides = [f"evaluate.limit={options.limit}"] if options.limit else []
    measured = Measurement(load_recipe(options.recipe, overrides), options.run)
    experts = measured.experts
    head = ["", "bytes", "of the model", "retained", *experts, "mean recovery"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    aligned = [measured.saved(name, "align") for name in experts]
    print(row("aligned student", None, aligned), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for density in options.density:
            points = {name: measured.point(name, density, Path(folder)) for name in experts}
            recoveries = [point.recovery for point in points.values()]
            print(row(f"density {density:g}", points, recoveries), flush=True)
    whole = [measured.saved(name, f"distill/{name}") for name in experts]
    print(row("expert", None, whole))


if __name__ == "__main__":
    main()

"""Measure what patches of a run's experts keep: size, the expert's difference, and its recovery.

`python -m xlstm_distill.benchmarks.patches RECIPE RUN` reads a finished run. For each density it
makes a patch of every expert, applies it to the aligned student and asks it the tasks of its own
domain. Recovery is the mean of student's score over teacher's. Intervals (95 %) know the noise of
items alone: it is one training. docs/merging.md has the results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from xlstm_distill.artifacts import Artifact, Run
from xlstm_distill.errors import UserError
from xlstm_distill.merging.patches import PatchFacts, make_patch
from xlstm_distill.merging.stack import load_patched
from xlstm_distill.recipe import EvalTask, Recipe, load_recipe
from xlstm_distill.runtime.console import byte_size
from xlstm_distill.stages.evaluate import ask
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.measuring.merges import one_student, percent, points
from xlstm_distill.stages.outline import TEACHER
from xlstm_distill.stages.report import read_results

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Size:
    """A patch: bytes, their share of the model's, and the share of the difference that it keeps."""

    bytes: int
    share: float
    retained: float

    @classmethod
    def of(cls, patch: Path, facts: PatchFacts) -> Size:
        """Take them from a patch and what making it has told."""
        size = patch.stat().st_size
        return cls(size, size / facts.model_bytes, facts.retained)


class Measurement:
    """A finished run, whose experts have the names of their tasks' domains."""

    def __init__(self, recipe: Recipe, run: Path) -> None:
        self.recipe, self.run = recipe, Run(run, recipe)
        self.experts = [name for name in recipe.distill.experts if self.tasks(name)]
        if not self.experts:
            raise UserError(f"{run}: no expert has the name of a domain with tasks.")
        self.base = self.artifact("align").model_path
        self.teacher = read_results(recipe, self.artifact(f"evaluate/{TEACHER}"))

    def tasks(self, domain: str) -> list[EvalTask]:
        """The recipe's tasks of a domain."""
        return [task for task in self.recipe.evaluate.tasks if task.domain == domain]

    def artifact(self, label: str) -> Artifact:
        """An artifact of the run."""
        artifact = self.run.load(label)
        if artifact is None:
            raise UserError(f"{self.run.path(label)}: is not there; finish the run first.")
        return artifact

    def answers(self, student: Callable[[str], Any]) -> Any:
        """Ask each domain's tasks the student that `student` gives for it."""
        found: list[Any] = []
        for domain in self.experts:
            tasks = tuple(self.tasks(domain))
            evaluate = self.recipe.evaluate.model_copy(update={"tasks": tasks})
            found += ask(
                student(domain), Lineage(self.recipe.model_copy(update={"evaluate": evaluate}))
            )
        return self.against_teacher(found)

    def against_teacher(self, results: Sequence[Any]) -> Any:
        """Set the results of some tasks beside the teacher's."""
        asked = {result.task: result for result in results}
        teacher = [result for result in self.teacher if result.task in asked]
        return one_student(teacher, [asked[result.task] for result in teacher])

    def aligned(self) -> Any:
        """Ask the aligned student."""
        student = AutoModelForCausalLM.from_pretrained(self.base)
        return self.answers(lambda domain: student)

    def whole(self) -> Any:
        """Take what the experts have answered in the run's evaluation."""
        found = []
        for domain in self.experts:
            results = read_results(self.recipe, self.artifact(f"evaluate/{domain}"))
            found += [result for result in results if result.domain == domain]
        return self.against_teacher(found)

    def patched(self, density: float, folder: Path) -> tuple[list[Size], Any]:
        """Make a patch of every expert, and ask the aligned student with each applied."""
        sizes = []

        def student(domain: str) -> Any:
            patch = folder / f"{domain}-{density:g}.safetensors"
            expert = self.artifact(f"distill/{domain}").model_path
            facts = make_patch(self.base, expert, patch, density, domain)
            sizes.append(Size.of(patch, facts))
            return load_patched(self.base, [(patch, 1.0)])

        return sizes, self.answers(student)

    def row(self, name: str, sizes: Sequence[Size], found: Any, whole: Any) -> str:
        """One line of the table; sizes and what is kept are means over the experts."""
        cells = [name, "", "", ""]
        if sizes:
            cells[1] = byte_size(statistics.fmean(size.bytes for size in sizes))
            cells[2] = f"{statistics.fmean(size.share for size in sizes):.1%}"
            cells[3] = f"{statistics.fmean(size.retained for size in sizes):.1%}"
        for domain in self.experts:
            asked = [task.name for task in self.tasks(domain) if task.name in found.items]
            cells.append(f"{100 * found.recovery(asked).value:.1f}" if asked else "-")
        # Without those on which the teacher has nothing to lose.
        every = list(found.items)
        cells.append(percent(found.recovery(every)))
        cells.append("" if found is whole else points(found.gain(whole, every)))
        return f"| {' | '.join(cells)} |"


def print_table(measured: Measurement, densities: Sequence[float]) -> None:
    """Print a table in Markdown, line by line: asking takes a while."""
    head = ["", "bytes", "of the model", "retained", *measured.experts, "mean", "against experts"]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    whole = measured.whole()
    print(measured.row("aligned student", (), measured.aligned(), whole), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for density in densities:
            sizes, found = measured.patched(density, Path(folder))
            print(measured.row(f"density {density:g}", sizes, found, whole), flush=True)
    print(measured.row("expert", (), whole, whole))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.patches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("run", type=Path, help="a finished run of this recipe")
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES)
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="a setting that the run was made with",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        print_table(
            Measurement(load_recipe(options.recipe, options.overrides), options.run),
            options.density,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

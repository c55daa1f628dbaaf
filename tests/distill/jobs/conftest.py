"""A recipe of four experts, its run directory, and a cluster that only keeps a list."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from xlstm_distill.artifacts import Run
from xlstm_distill.jobs.folder import Folder
from xlstm_distill.jobs.queue import Queued
from xlstm_distill.jobs.scripts import job_name
from xlstm_distill.recipe import Recipe, load_recipe
from xlstm_distill.stages.lineage import Lineage


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return load_recipe(Path(__file__).parents[3] / "recipes" / "quickstart.yaml")


@pytest.fixture
def folder(tmp_path: Path, recipe: Recipe) -> Folder:
    """The jobs' folder of a run directory whose name has a space and a percent sign."""
    run = tmp_path / "my run 5%"
    Run.open(run, recipe).keep_recipe()
    return Folder(run)


@pytest.fixture(scope="session")
def lineage(recipe: Recipe) -> Lineage:
    """Hashes of teacher and tokenizer are computed once for all tests."""
    return Lineage(recipe)


@pytest.fixture
def publish(folder: Folder, recipe: Recipe, lineage: Lineage) -> Callable[..., None]:
    """Publish artifacts without content, as the stages would."""

    def make(*labels: str) -> None:
        run = Run.open(folder.run, recipe)
        for label in labels:
            run.make(lineage.request(label), lambda draft: None)

    return make


@dataclass
class FakeCluster:
    """What was submitted and what is in the queue; tests change the queue as a cluster would."""

    folder: Folder
    recipe: Recipe
    entries: list[Queued] = field(default_factory=list)
    calls: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    largest: int | None = 1000
    asked: list[str] = field(default_factory=list)

    def queue(self, names: Sequence[str]) -> list[Queued]:
        self.asked = list(names)
        return [entry for entry in self.entries if entry.name in names]

    def submit(self, script: Path, array: str | None, dependency: str | None) -> int:
        self.calls.append((script.stem, array, dependency))
        number = 100 + len(self.calls)
        name = job_name(self.recipe, self.folder, script.stem)
        for index in indices_of(array):
            reason = "Dependency" if dependency else "Priority"
            self.entries.append(Queued(number, index, "PENDING", reason, "", name))
        return number

    def cancel(self, words: Sequence[str]) -> None:
        self.cancelled += words
        self.entries = [entry for entry in self.entries if entry.words not in words]

    def largest_index(self) -> int | None:
        return self.largest

    def find(self, job: str, index: int | None = None) -> Queued:
        name = job_name(self.recipe, self.folder, job)
        return next(e for e in self.entries if (e.name, e.index) == (name, index))

    def start(self, job: str, index: int | None = None) -> None:
        """Run an index."""
        entry = self.find(job, index)
        self.entries[self.entries.index(entry)] = replace(entry, state="RUNNING", nodes="n1")
        self.mark(job, index, entry.id, "started n1")

    def end(self, job: str, index: int | None = None, code: int = 0, log: str = "") -> None:
        """End an index that runs, with a line in its log."""
        entry = self.find(job, index)
        self.entries.remove(entry)
        self.mark(job, index, entry.id, f"ended {code}")
        with self.folder.log(job, index).open("a") as file:
            file.write(f"{log}\n[slurm] ended\n")

    def mark(self, job: str, index: int | None, number: int, words: str) -> None:
        word, text = words.split()
        with self.folder.mark(job, index).open("a") as file:
            file.write(f"{word} {number} 1700000000 {text}\n")


def indices_of(array: str | None) -> list[int | None]:
    if array is None:
        return [None]
    found: list[int | None] = []
    for part in array.partition("%")[0].split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


@pytest.fixture
def cluster(folder: Folder, recipe: Recipe) -> FakeCluster:
    return FakeCluster(folder, recipe)


@pytest.fixture
def written(folder: Folder) -> Callable[[], list[dict]]:
    return lambda: json.loads((folder.path / "jobs.json").read_text())

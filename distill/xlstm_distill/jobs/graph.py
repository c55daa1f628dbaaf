"""The jobs of a run and what each waits for, made from the lineage of its recipe."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from xlstm_distill.data.budget import rows_needed
from xlstm_distill.jobs.site import CAPTURE_TASKS, Site
from xlstm_distill.stages.choices import deal
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.outline import stage_of

ARRAYS = ("prepare", "capture", "distill", "refine", "evaluate")
TITLES = {
    "prepare": "tokenise and pack the text, on CPUs",
    "capture": "store the teacher's targets",
    "align": "stage I: align each mixer with its teacher layer",
    "distill": "stage II: train the experts, one index per expert",
    "refine": "refine experts on their own text, one index per expert",
    "merge": "stage III: merge the experts",
    "evaluate": "score the models, one index per model",
    "report": "write the report",
}


@dataclass(frozen=True)
class Task:
    """A task of a job: its array index (None where the job is no array), what it makes."""

    index: int | None
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A job of a run; it has the name of the command that it runs."""

    name: str
    tasks: tuple[Task, ...]
    depends_on: tuple[str, ...]

    @property
    def is_array(self) -> bool:
        """Whether its tasks have indices, also where there is one alone."""
        return self.name in ARRAYS


def job_graph(lineage: Lineage, site: Site) -> list[Job]:
    """Return the jobs of a recipe, each after those that it waits for."""
    jobs: list[Job] = []
    for name, tasks in _tasks(lineage, site).items():
        jobs.append(Job(name, tasks, tuple(_direct(lineage, tasks, jobs))))
    return jobs


def _tasks(lineage: Lineage, site: Site) -> dict[str, tuple[Task, ...]]:
    """The tasks of every job, in the order of the stages."""
    recipe = lineage.recipe
    rows = {name: rows_needed(recipe, name, lineage.captured) for name in recipe.data.domains}
    shares = site.settings("prepare").tasks or len(rows)
    prepare: list[Task] = []
    for index, names in enumerate(deal(rows, shares)):
        labels = tuple(f"data/{name}" for name in names)
        prepare.append(Task(index, ", ".join(names), labels))
    found = {"prepare": tuple(prepare)}
    by_stage: dict[str, list[str]] = {}
    for label in lineage.labels():
        by_stage.setdefault(stage_of(label), []).append(label)
    if captured := tuple(by_stage.get("capture", ())):
        count = site.settings("capture").tasks or CAPTURE_TASKS
        # Every share has a part of every domain, so each makes all of them with the others.
        found["capture"] = tuple(Task(n, f"{n}/{count}", captured) for n in range(count))
    for stage in ("align", "distill"):
        found[stage] = tuple(_one_each(stage, by_stage[stage]))
    if refined := by_stage.get("refine"):
        found["refine"] = tuple(_one_each("refine", refined))
    # The command makes the recipe's variants too.
    merges = (*by_stage["merge"], *by_stage.get("variant", ()))
    found["merge"] = (Task(None, "", merges),)
    for stage in ("evaluate", "report"):
        found[stage] = tuple(_one_each(stage, by_stage[stage]))
    return found


def _one_each(stage: str, labels: Sequence[str]) -> Iterator[Task]:
    for index, label in enumerate(labels):
        name = label.partition("/")[2]
        yield Task(index if stage in ARRAYS else None, name, (label,))


def _direct(lineage: Lineage, tasks: Iterable[Task], earlier: Sequence[Job]) -> list[str]:
    """Names of the jobs that tasks wait for, without those that these wait for anyway."""
    needs: set[str] = set()
    for task in tasks:
        for label in task.labels:
            needs.update(lineage.needs(label))
    makers = [job.name for job in earlier if needs & labels_of(job)]
    implied: set[str] = set()
    for name in makers:
        implied |= ancestors(name, earlier)
    return [name for name in makers if name not in implied]


def labels_of(job: Job) -> set[str]:
    """Labels of all artifacts that a job makes."""
    found: set[str] = set()
    for task in job.tasks:
        found.update(task.labels)
    return found


def ancestors(name: str, jobs: Sequence[Job]) -> set[str]:
    """Names of all jobs that one waits for, directly or not."""
    by_name = {job.name: job for job in jobs}
    found: set[str] = set()
    for above in by_name[name].depends_on:
        found |= {above} | ancestors(above, jobs)
    return found


def wanted_labels(lineage: Lineage, done: Collection[str]) -> set[str]:
    """Labels that are still to be made for the report; what nothing needs any more is left out.

    Rows may have been deleted once all is trained on them: they are not made again for nothing.
    """
    wanted: set[str] = set()
    needed = {"report"}
    # Each label comes after what it is built on, so that its users have been looked at before it.
    for label in reversed(lineage.labels()):
        if label in needed and label not in done:
            wanted.add(label)
            needed.update(lineage.needs(label))
    return wanted


def array_words(indices: Sequence[int], at_once: int | None) -> str:
    """Write the indices of an array as sbatch wants them: `0-3,7%2`."""
    parts: list[str] = []
    first = last = None
    for index in sorted(indices):
        if last is not None and index == last + 1:
            last = index
            continue
        if first is not None:
            parts.append(_range(first, last))
        first = last = index
    if first is not None:
        parts.append(_range(first, last))
    throttle = f"%{at_once}" if at_once is not None else ""
    return ",".join(parts) + throttle


def _range(first: int, last: int | None) -> str:
    return str(first) if first == last else f"{first}-{last}"

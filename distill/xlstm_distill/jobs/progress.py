"""Where each array index of a run's jobs stands: waiting, running, requeued, done or failed.

Three witnesses are asked: the run's artifacts, Slurm's queue, and the marks that the scripts write.
Slurm's accounting (sacct) is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xlstm_distill.errors import RunError
from xlstm_distill.jobs.folder import Folder, Mark, Submission
from xlstm_distill.jobs.graph import Job, Task, job_graph
from xlstm_distill.jobs.queue import Queued, Scheduler
from xlstm_distill.jobs.scripts import edition, job_name
from xlstm_distill.jobs.site import Site
from xlstm_distill.recipe import Recipe
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.status.reading import read_status
from xlstm_distill.stages.status.records import StageStatus

QUEUED = ("waiting", "running", "requeued")
"""States of an index that is in Slurm's queue."""
KILLED = "ended without a word: killed (memory? node?)"


@dataclass(frozen=True)
class TaskStatus:
    """Where an array index stands; `index` is None for a job without an array. Seconds.

    `state` is `waiting` (in the queue; `why` is Slurm's reason), `running`, `requeued` (in the
    queue again), `done`, `failed` (`why` is the last line of its log), `cancelled` (it left the
    queue before it began) or `missing` (to be submitted).
    """

    job: str
    index: int | None
    name: str
    state: str
    id: int | None = None
    nodes: str | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    requeues: int = 0
    why: str | None = None
    log: str | None = None

    @property
    def is_queued(self) -> bool:
        """Whether Slurm has it, so that it must not be submitted again."""
        return self.state in QUEUED


@dataclass(frozen=True)
class JobBook:
    """All that is known of a run's jobs at one moment. `queue` is None if Slurm cannot be asked."""

    folder: Folder
    recipe: Recipe
    jobs: Sequence[Job]
    stages: Mapping[str, StageStatus]
    submissions: Sequence[Submission]
    queue: Sequence[Queued] | None

    def tasks(self) -> list[TaskStatus]:
        """Where every index of every job stands, in the order of the graph."""
        found: list[TaskStatus] = []
        for job in self.jobs:
            for task in job.tasks:
                found.append(self._status(job, task))
        return found

    def queued(self, job: str, index: int | None) -> Queued | None:
        """An index in Slurm's queue."""
        name = job_name(self.recipe, self.folder, job)
        for entry in self.queue or ():
            if (entry.name, entry.index) == (name, index):
                return entry
        return None

    def submission(self, job: str, index: int | None) -> Submission | None:
        """The newest submission of an index."""
        for submission in reversed(self.submissions):
            if submission.job == job and submission.has(index):
                return submission
        return None

    def done_labels(self) -> set[str]:
        """Labels of the artifacts that are there, made from the recipe."""
        return {label for label, stage in self.stages.items() if stage.state == "done"}

    def _status(self, job: Job, task: Task) -> TaskStatus:
        submission = self.submission(job.name, task.index)
        queued = self.queued(job.name, task.index)
        known = queued.id if queued is not None else submission.id if submission else None
        marks = [m for m in self.folder.marks(job.name, task.index) if m.id == known]
        state, why = self._state(job, task, submission, queued, marks)
        stage = self.stages.get(task.labels[0]) if len(task.labels) == 1 else None
        at_work = stage if state == "running" and stage is not None else None
        log = self.folder.log(job.name, task.index)
        return TaskStatus(
            job=job.name,
            index=task.index,
            name=task.name,
            state=state,
            id=known,
            nodes=(queued.nodes or None) if queued is not None else None,
            tokens_per_second=at_work.tokens_per_second if at_work else None,
            seconds_left=at_work.seconds_left if at_work else None,
            requeues=max(0, sum(mark.word == "started" for mark in marks) - 1),
            why=why,
            log=str(log.relative_to(self.folder.run)) if log.is_file() else None,
        )

    def _state(
        self,
        job: Job,
        task: Task,
        submission: Submission | None,
        queued: Queued | None,
        marks: Sequence[Mark],
    ) -> tuple[str, str | None]:
        """The state of an index, and why."""
        began = any(mark.word == "started" for mark in marks)
        if queued is not None and not queued.is_pending:
            return "running", None
        if queued is not None:
            return ("requeued" if began else "waiting"), queued.reason
        if all(self._is_done(label) for label in task.labels):
            return "done", None
        if submission is None:
            return "missing", None
        last = marks[-1] if marks else None
        if last is not None and last.word == "ended":
            return self._ended(job, task, submission, last)
        if self.queue is None:
            # A machine without Slurm's commands: the marks are all there is.
            return ("running" if began else "waiting"), "Slurm cannot be asked here"
        if began:
            line = self.folder.last_line(job.name, task.index)
            return "failed", f"{KILLED}; last line: {line}" if line else KILLED
        return "cancelled", "it left the queue before it began"

    def _ended(
        self, job: Job, task: Task, submission: Submission, last: Mark
    ) -> tuple[str, str | None]:
        """The state of an index whose script has ended."""
        if last.text != "0":
            line = self.folder.last_line(job.name, task.index)
            return "failed", line or f"exit code {last.text}"
        # A share is done although the others' parts of its artifacts are still to come.
        others = job.name == "capture" and submission.edition == edition(self.recipe, job)
        return ("done", None) if others else ("missing", "it ended, and what it made is not there")

    def _is_done(self, label: str) -> bool:
        stage = self.stages.get(label)
        return stage is not None and stage.state == "done"


def read_book(folder: Folder, recipe: Recipe, site: Site, scheduler: Scheduler | None) -> JobBook:
    """Read where the jobs of a run stand; without a scheduler, from the run directory alone.

    Raises:
        RunError: Slurm does not answer.
    """
    lineage = Lineage(recipe)
    jobs = job_graph(lineage, site)
    names = [job_name(recipe, folder, job.name) for job in jobs]
    # The queue before the artifacts: a job that ends in between has left its artifact.
    queue = scheduler.queue(names) if scheduler is not None else None
    stages = {stage.label: stage for stage in read_status(folder.run, lineage)}
    return JobBook(folder, recipe, jobs, stages, folder.submissions(), queue)


def read_jobs(run: Path, scheduler: Scheduler | None) -> list[TaskStatus]:
    """Where the jobs of a run stand, as its folder `slurm` says; none if it has no jobs.

    Raises:
        UserError: that folder is damaged.
    """
    folder = Folder(run)
    recipe, site = folder.saved_recipe(), folder.saved_site()
    if recipe is None or site is None:
        return []
    try:
        return read_book(folder, recipe, site, scheduler).tasks()
    except RunError:
        # The cluster does not answer. What the run directory knows is better than nothing.
        return read_book(folder, recipe, site, None).tasks()


def missing_tasks(book: JobBook, wanted: Iterable[str]) -> dict[str, list[Task]]:
    """Tasks by job that are to be submitted: wanted, and not in the queue.

    A share that has ended well is not wanted again, unless all have and something is still missing.
    """
    labels = set(wanted)
    states = {(status.job, status.index): status for status in book.tasks()}
    found: dict[str, list[Task]] = {}
    for job in book.jobs:
        open_tasks = [task for task in job.tasks if labels & set(task.labels)]
        idle = [task for task in open_tasks if not states[job.name, task.index].is_queued]
        missing = [task for task in idle if states[job.name, task.index].state != "done"]
        if not missing and len(idle) == len(open_tasks):
            missing = idle
        found[job.name] = missing
    return found

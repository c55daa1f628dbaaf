"""Submit what is missing of a run: never an index twice, each after the jobs that it needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from xlstm_distill.artifacts.locks import exclusive
from xlstm_distill.errors import UserError
from xlstm_distill.jobs.folder import Folder, Submission
from xlstm_distill.jobs.graph import Job, Task, array_words, wanted_labels
from xlstm_distill.jobs.progress import JobBook, missing_tasks, read_book
from xlstm_distill.jobs.queue import NEVER, Queued, Scheduler
from xlstm_distill.jobs.scripts import Writer, edition
from xlstm_distill.jobs.site import SHARED, Site
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.load import recipe_to_yaml
from xlstm_distill.stages.lineage import Lineage


@dataclass(frozen=True)
class Plan:
    """What a call finds to do: jobs in order, their missing tasks, and entries to cancel first."""

    book: JobBook
    missing: Mapping[str, Sequence[Task]]
    stale: Sequence[Queued]


@dataclass
class Submitted:
    """What was done: the jobs that were submitted and what was cancelled."""

    jobs: list[Submission] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)


def prepare_jobs(folder: Folder, recipe: Recipe, site: Site, scheduler: Scheduler | None) -> Plan:
    """Write the scripts of a run, and find what is missing of it.

    Raises:
        UserError: jobs of another recipe are in the queue, or cannot be asked for.
        RunError: Slurm does not answer.
    """
    book = read_book(folder, recipe, site, scheduler)
    _refuse_other_editions(book)
    Writer(folder, recipe, site).write(book.jobs)
    return make_plan(book)


def make_plan(book: JobBook) -> Plan:
    """Find the tasks to submit, and the queued ones that wait for something that has failed."""
    wanted = wanted_labels(Lineage(book.recipe), book.done_labels())
    missing = missing_tasks(book, wanted)
    stale: list[Queued] = []
    # Jobs come after those that they wait for, so that these are decided already.
    changed: set[str] = set()
    for job in book.jobs:
        waits_anew = bool(changed & set(job.depends_on))
        pending = [_waiting(book, job, task) for task in job.tasks]
        old = [entry for entry in pending if entry and (waits_anew or entry.reason == NEVER)]
        if old:
            stale += old
            indices = {entry.index for entry in old}
            again = [task for task in job.tasks if task.index in indices]
            missing[job.name] = _wanted_again(job, missing[job.name], again, wanted)
        if missing[job.name] or waits_anew:
            changed.add(job.name)
    return Plan(book, missing, stale)


def _waiting(book: JobBook, job: Job, task: Task) -> Queued | None:
    """The queue's entry of a task that has never run."""
    entry = book.queued(job.name, task.index)
    if entry is None or not entry.is_pending:
        return None
    marks = book.folder.marks(job.name, task.index)
    return None if any(mark.id == entry.id for mark in marks) else entry


def _wanted_again(
    job: Job, missing: Sequence[Task], again: Sequence[Task], wanted: set[str]
) -> list[Task]:
    """The missing tasks of a job with those that are cancelled and still wanted, in its order."""
    chosen = [*missing, *(task for task in again if wanted & set(task.labels))]
    return [task for task in job.tasks if task in chosen]


def _refuse_other_editions(book: JobBook) -> None:
    """Refuse to change what indices stand for while Slurm has some of them.

    Raises:
        UserError: names the jobs to cancel or to wait for.
    """
    folder = book.folder
    same = not folder.recipe.is_file() or _text(folder) == recipe_to_yaml(book.recipe)
    if book.queue is None:
        if book.submissions and not same:
            raise UserError(
                f"RECIPE: it is not the one that jobs were submitted for ({folder.recipe}), and "
                "Slurm cannot be asked here whether they are over; call this on a login node."
            )
        return
    others: list[str] = []
    by_name = {job.name: job for job in book.jobs}
    for entry in book.queue:
        # The name is RECIPE.JOB.DIGEST, and a recipe's name may have dots.
        job = by_name[entry.name.split(".")[-2]]
        submission = book.submission(job.name, entry.index)
        known = submission is not None and submission.id == entry.id
        if (submission.edition != edition(book.recipe, job)) if known and submission else not same:
            others.append(entry.words)
    if others:
        raise UserError(
            "RECIPE: jobs of another recipe, or of another number of tasks, are in the queue; wait "
            f"for them, or cancel them: scancel {' '.join(others)}"
        )


def _text(folder: Folder) -> str:
    return folder.recipe.read_text(encoding="utf-8", errors="replace")


def submit(plan: Plan, site: Site, scheduler: Scheduler, say: Callable[[str], None]) -> Submitted:
    """Submit the missing tasks of a plan; each submission is recorded before the next.

    Raises:
        UserError: an array is larger than the cluster allows.
        RunError: Slurm refuses; what was submitted before stays, and the next call does the rest.
    """
    _check_sizes(plan, scheduler)
    done = Submitted(cancelled=[entry.words for entry in plan.stale])
    scheduler.cancel(done.cancelled)
    book, folder = plan.book, plan.book.folder
    record = list(book.submissions)
    for job in book.jobs:
        tasks = plan.missing[job.name]
        if not tasks:
            continue
        indices = tuple(task.index for task in tasks if task.index is not None)
        array = array_words(indices, site.settings(job.name).at_once) if job.is_array else None
        dependency = _dependency(job, plan, done)
        number = scheduler.submit(folder.script(job.name), array, dependency)
        made = Submission(job.name, number, indices, edition(book.recipe, job))
        record.append(made)
        folder.keep_submissions(record)
        done.jobs.append(made)
        after = f" after {dependency.removeprefix('afterok:')}" if dependency else ""
        say(f"{job.name}: job {number}{f' [{array}]' if array else ''}{after}")
    return done


def _check_sizes(plan: Plan, scheduler: Scheduler) -> None:
    largest = scheduler.largest_index()
    if largest is None:
        return
    for name, tasks in plan.missing.items():
        top = max((task.index for task in tasks if task.index is not None), default=0)
        if top > largest:
            fix = f"give stages.{name}.tasks a smaller number" if name in SHARED else "ask for more"
            raise UserError(
                f"{name}: its array goes up to index {top}, and the cluster allows {largest} "
                f"(MaxArraySize); {fix}."
            )


def _dependency(job: Job, plan: Plan, done: Submitted) -> str | None:
    """What a job waits for: `afterok:12:7_3`; None where all that it needs is there."""
    by_name = {other.name: other for other in plan.book.jobs}
    words: list[str] = []
    left = list(job.depends_on)
    while left:
        above = by_name[left.pop(0)]
        found = _in_queue(above, plan, done)
        words += found
        if not found:
            # It has nothing in the queue; what it waited for may have, and is needed as well.
            left += above.depends_on
    return f"afterok:{':'.join(dict.fromkeys(words))}" if words else None


def _in_queue(job: Job, plan: Plan, done: Submitted) -> list[str]:
    """Ids of a job that are in the queue: new submissions whole, earlier ones index by index."""
    found = [str(made.id) for made in done.jobs if made.job == job.name]
    for task in job.tasks:
        entry = plan.book.queued(job.name, task.index)
        if entry is not None and entry not in plan.stale:
            found.append(entry.words)
    return found


def locked(folder: Folder, say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """Hold the right to submit a run's jobs; two callers would submit everything twice.

    Raises:
        RunError: another process holds it.
    """
    return exclusive(folder.run / ".locks" / "slurm", "slurm", say)

"""`RUN/slurm/`: scripts, logs, marks of the jobs, and the record of what was submitted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xlstm_distill.artifacts.files import write_text
from xlstm_distill.errors import UserError
from xlstm_distill.jobs.site import Site, check_site
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.load import parse_yaml, read_file
from xlstm_distill.recipe.problems import problem_lines

PREFIX = "[slurm] "
"""What the scripts' own lines in a log begin with."""
LOG_TAIL = 2**14
"""Bytes at the end of a log in which its last line is looked for."""
LONGEST_LINE = 200


@dataclass(frozen=True)
class Submission:
    """Array indices that were submitted together; `indices` is empty for a job without an array.

    `edition` tells what the indices stand for: another recipe, or another number of shares, is
    another edition.
    """

    job: str
    id: int
    indices: tuple[int, ...]
    edition: str

    def has(self, index: int | None) -> bool:
        """Whether it holds an index; None stands for a job without an array."""
        return not self.indices if index is None else index in self.indices


@dataclass(frozen=True)
class Mark:
    """A line that a script wrote: `started`, `requeued` or `ended`, with a host or an exit code."""

    word: str
    id: int
    seconds: float
    text: str


class Folder:
    """The folder of a run's jobs."""

    def __init__(self, run: Path) -> None:
        self.run = run.resolve()
        self.path = self.run / "slurm"

    @property
    def recipe(self) -> Path:
        """The recipe as it was when the jobs were written: they read it, whatever is edited."""
        return self.path / "recipe.yaml"

    @property
    def site(self) -> Path:
        """The site file of the last call."""
        return self.path / "site.yaml"

    def script(self, job: str) -> Path:
        """The batch script of a job."""
        return self.path / f"{job}.sbatch"

    def log(self, job: str, index: int | None) -> Path:
        """The log of an array index; None stands for a job without an array."""
        return self.path / "logs" / f"{_stem(job, index)}.log"

    def mark(self, job: str, index: int | None) -> Path:
        """The file into which the script of an array index writes its marks."""
        return self.path / "marks" / _stem(job, index)

    def make(self) -> None:
        """Make the folder and those inside."""
        for name in ("logs", "marks"):
            (self.path / name).mkdir(parents=True, exist_ok=True)

    def saved_recipe(self) -> Recipe | None:
        """The recipe of the last call; None if there was none.

        Raises:
            UserError: it cannot be read.
        """
        if not self.recipe.is_file():
            return None
        data = parse_yaml(read_file(self.recipe), str(self.recipe))
        try:
            # Without the context of a folder, validation leaves paths alone: a teacher may have
            # moved.
            return Recipe.model_validate(data)
        except ValidationError as error:
            lines = problem_lines(error)
            raise UserError(*(f"{self.recipe}: {line}" for line in lines)) from None

    def saved_site(self) -> Site | None:
        """The site file of the last call; None if there was none.

        Raises:
            UserError: it cannot be read.
        """
        if not self.site.is_file():
            return None
        data = parse_yaml(read_file(self.site, "site file"), str(self.site)) or {}
        return check_site(data, None, self.site)

    def submissions(self) -> list[Submission]:
        """What was submitted, oldest first.

        Raises:
            UserError: the record is damaged; without it jobs could be submitted twice.
        """
        path = self.path / "submitted.json"
        if not path.exists():
            return []
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return [Submission(**{**e, "indices": tuple(e["indices"])}) for e in entries]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: the record of submitted jobs cannot be read ({error}); cancel the run's "
                "jobs and remove it."
            ) from None

    def keep_submissions(self, submissions: Iterable[Submission]) -> None:
        """Write the record of what was submitted."""
        entries = [asdict(submission) for submission in submissions]
        write_text(self.path / "submitted.json", json.dumps(entries, indent=1) + "\n")

    def marks(self, job: str, index: int | None) -> list[Mark]:
        """What the script of an array index wrote, oldest first; damaged lines do not count."""
        try:
            text = self.mark(job, index).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return list(_parse_marks(text))

    def last_line(self, job: str, index: int | None) -> str | None:
        """The last line of a log that the program wrote, not the script; None without one."""
        try:
            with self.log(job, index).open("rb") as file:
                file.seek(0, 2)
                file.seek(max(0, file.tell() - LOG_TAIL))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return None
        for line in reversed(lines):
            text = "".join(sign for sign in line if sign.isprintable()).strip()
            if text and not text.startswith(PREFIX.strip()):
                return text[:LONGEST_LINE]
        return None

    def write_jobs(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Write `jobs.json`: name, script, array and depends_on of every job."""
        write_text(self.path / "jobs.json", json.dumps(list(jobs), indent=1) + "\n")


def _stem(job: str, index: int | None) -> str:
    return job if index is None else f"{job}-{index}"


def _parse_marks(text: str) -> Iterator[Mark]:
    for line in text.splitlines():
        # word, job id, seconds since 1970, text
        parts = line.split(maxsplit=3)
        if len(parts) == 4 and parts[1].isdigit() and parts[2].isdigit():
            yield Mark(parts[0], int(parts[1]), float(parts[2]), parts[3])

"""Slurm's commands: squeue, sbatch, scancel. No accounting is needed (sacct)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xlstm_distill.errors import RunError

TIMEOUT = 60.0
"""Seconds that a command of Slurm's may take; a busy controller needs many."""
COLUMNS = "%F|%K|%T|%r|%N|%j"
"""Job (of an array: the array's), index, state, reason, nodes and name."""
NEVER = "DependencyNeverSatisfied"
"""Reason of a pending job that waits for one that has failed."""


@dataclass(frozen=True)
class Queued:
    """An array index in Slurm's queue; None stands for a job without an array."""

    id: int
    index: int | None
    state: str
    reason: str
    nodes: str
    name: str

    @property
    def is_pending(self) -> bool:
        """Whether it waits to be started, perhaps not for the first time."""
        return self.state == "PENDING"

    @property
    def words(self) -> str:
        """Its id as scancel and dependencies want it."""
        return str(self.id) if self.index is None else f"{self.id}_{self.index}"


class Scheduler(Protocol):
    """What the jobs of a run need of a cluster; tests have one of their own."""

    def queue(self, names: Sequence[str]) -> list[Queued]:
        """Array indices in the queue whose jobs have one of these names."""

    def submit(self, script: Path, array: str | None, dependency: str | None) -> int:
        """Submit a script; returns the job's id."""

    def cancel(self, words: Sequence[str]) -> None:
        """Take jobs or array indices (`12_3`) out of the queue."""

    def largest_index(self) -> int | None:
        """The largest index that an array may have; None if it is not known."""


class Slurm:
    """The cluster that this machine's commands of Slurm's speak to."""

    def queue(self, names: Sequence[str]) -> list[Queued]:
        """Ask squeue; raises RunError if it does not answer."""
        # By name and not by id: a job whose id could not be recorded is found too.
        words = ["squeue", "--noheader", "--array", f"--name={','.join(names)}", "-o", COLUMNS]
        found: list[Queued] = []
        for line in _call(words).splitlines():
            parts = line.strip().split("|")
            if len(parts) == 6 and parts[0].isdigit():
                index = int(parts[1]) if parts[1].isdigit() else None
                found.append(Queued(int(parts[0]), index, *parts[2:]))
        return found

    def submit(self, script: Path, array: str | None, dependency: str | None) -> int:
        """Call sbatch; raises RunError with its words if it refuses."""
        words = ["sbatch", "--parsable"]
        if array is not None:
            words.append(f"--array={array}")
        if dependency is not None:
            words.append(f"--dependency={dependency}")
        answer = _call([*words, str(script)])
        # `id` or `id;cluster`, after lines that a site's plugin may print.
        match = re.search(r"^(\d+)(;.*)?$", answer, re.MULTILINE)
        if match is None:
            raise RunError(f"sbatch {script}: no job id in its answer: {answer.strip()!r}.")
        return int(match[1])

    def cancel(self, words: Sequence[str]) -> None:
        """Call scancel; raises RunError if it refuses."""
        if words:
            _call(["scancel", *words])

    def largest_index(self) -> int | None:
        """Ask for MaxArraySize, which is one more than the largest index."""
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call(["scontrol", "show", "config"]), re.M)
        return int(match[1]) - 1 if match else None


def has_slurm() -> bool:
    """Whether this machine has the commands that a submission needs."""
    return all(shutil.which(name) for name in ("squeue", "sbatch", "scancel", "scontrol"))


def _call(words: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=TIMEOUT, errors="replace"
        )
    except FileNotFoundError:
        raise RunError(
            f"{words[0]}: not found; this machine has no Slurm commands. Submit on a login node."
        ) from None
    except subprocess.TimeoutExpired:
        raise RunError(
            f"{words[0]}: no answer after {TIMEOUT:.0f} s; run the command again later."
        ) from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise RunError(f"{words[0]}: {said}")
    return done.stdout

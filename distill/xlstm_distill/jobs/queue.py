"""Slurm's commands: squeue, sbatch, scancel. No accounting is needed (sacct)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xlstm_distill.errors import RunError

TIMEOUT = 60.0
"""Seconds that a command of Slurm's may take; a busy controller needs many."""
COLUMNS = "%F|%K|%T|%r|%N|%j"
"""Job (of an array: the array's), index, state, reason, nodes and name."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables that say which cluster is meant."""
OVERRIDES = {
    "ACCOUNT": "account",
    "ARRAY_INX": "array",
    "CPUS_PER_TASK": "cpus-per-task",
    "GRES": "gres",
    "JOB_NAME": "job-name",
    "MEM_PER_NODE": "mem",
    "NO_REQUEUE": "requeue",
    "OPEN_MODE": "open-mode",
    "OUTPUT": "output",
    "PARTITION": "partition",
    "QOS": "qos",
    "REQUEUE": "requeue",
    "SIGNAL": "signal",
    "TIMELIMIT": "time",
}
"""Variables (SBATCH_...) that count more than a script's options, and these options."""
PENDING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
"""States of a job that is to be started, for the first time or again."""
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
        return self.state in PENDING

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
        # SQUEUE_STATES and the like would hide jobs, and they would be submitted twice.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
        found: list[Queued] = []
        for line in _call(words, environment).splitlines():
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
        answer = _call([*words, str(script)], submission_environment(script.read_text()))
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


def submission_environment(
    script: str, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment to submit a script in: variables override none of the script's options.

    Variables of a job are left out, for whoever submits from inside of one.
    """
    given = set(re.findall(r'^#SBATCH "?--([a-z-]+)', script, re.MULTILINE))
    kept: dict[str, str] = {}
    for name, value in environment.items():
        option = OVERRIDES.get(name.removeprefix("SBATCH_")) if name.startswith("SBATCH_") else None
        of_a_job = name.startswith("SLURM_") and name not in KEPT
        if option not in given and not of_a_job:
            kept[name] = value
    return kept


def _call(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
            errors="replace",
            env=environment,
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

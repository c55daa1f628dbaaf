"""Which faults meet which operations: every publishing step, and others drawn at random."""

from __future__ import annotations

import errno
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STAGES = {
    "prepare": 0.6, "capture": 1.2, "align": 1.3, "distill": 2.2, "merge": 0.9, "evaluate": 2.2,
    "report": 2.6,
}  # fmt: skip
"""The stages, and about how many seconds of processor time an injection into each takes."""
FAULTS: dict[str, tuple[str, int]] = {
    "ENOSPC": ("full", errno.ENOSPC),
    "EDQUOT": ("full", errno.EDQUOT),
    "EIO": ("fail", errno.EIO),
    "ESTALE": ("fail", errno.ESTALE),
    "SIGKILL": ("kill", 0),
    "SIGKILL in a write": ("tear", 0),
    "clock set back": ("clock", 0),
    "watched": ("stop", 0),
}
"""What happens at an operation: `full` lasts to the end of the process, the others happen once."""
CORE = ("ENOSPC", "EIO", "SIGKILL")
"""Faults that meet every publishing step of every stage."""
AFTERWARDS = ("same", "clock", "moved", "teacher")


@dataclass(frozen=True)
class Injection:
    """A fault at an operation of a stage, and under what the next run goes on.

    `remade`: an artifact of other settings is there already. `afterwards`: `same`; `clock`, a day
    back; `moved`, the run directory; `teacher`, the teacher's folder.
    """

    stage: str
    fault: str
    at: int
    operation: str
    remade: bool = False
    afterwards: str = "same"


def is_publishing(operations: Sequence[str], index: int) -> bool:
    """Whether an operation belongs to an artifact's publishing: its manifest, renames, flushes."""
    what, _, path = operations[index].partition(" ")
    place = Path(path)
    if place.name == "manifest.json":
        return what in ("open", "write", "rename")
    visible = not any(part.startswith(".") for part in place.parts)
    if what == "rename" and path.startswith("/artifacts") and visible:
        return True
    before = operations[index - 1].partition(" ") if index else ("", "", "")
    return what == "fsync" and before[0] == "rename" and "/artifacts" in before[2]


def chosen(
    operations: Mapping[tuple[str, bool], Sequence[str]], count: int, seed: int
) -> list[Injection]:
    """Every publishing step with each of CORE, and others drawn at random, `count` in all.

    `operations` are those of an undisturbed run, by stage and whether an older artifact was there.
    """
    draw = random.Random(seed)
    steps: dict[tuple[str, str, str, str], Injection] = {}
    for (stage, remade), lines in operations.items():
        for index, operation in enumerate(lines):
            if not is_publishing(lines, index):
                continue
            what, _, path = operation.partition(" ")
            for fault in CORE:
                # One of those that differ by the artifact's name alone.
                key = (stage, fault, what, "manifest" if "manifest" in path else "folder")
                injection = Injection(stage, fault, index, operation, remade)
                if key not in steps or draw.random() < 0.5:
                    steps[key] = injection
    injections = list(steps.values())
    draw.shuffle(injections)
    injections = injections[:count]
    cases = list(operations)
    # Cheap stages are disturbed more often.
    weights = [1 / STAGES[stage] for stage, _ in cases]
    while len(injections) < count:
        stage, remade = draw.choices(cases, weights)[0]
        lines = operations[stage, remade]
        fault, at = draw.choice(list(FAULTS)), draw.randrange(len(lines))
        afterwards = draw.choice(AFTERWARDS) if draw.random() < 0.5 else "same"
        if stage == "report" and afterwards == "teacher":
            afterwards = "moved"  # the report shows the teacher's place, so it would be another
        injections.append(Injection(stage, fault, at, lines[at], remade, afterwards))
    return injections

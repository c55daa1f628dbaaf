"""Whether the Triton kernels are right on this machine: ask once, then remember.

A question is answered by a process of its own (`python -m xlstm_kernels.selfcheck`): a kernel that
accesses memory which is not its own would take the caller's CUDA context with it. Answers are kept
in a folder, one file each, named after everything that can change them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xlstm_kernels import toolchain

LONGEST_CHECK = 300  # seconds; it takes about 30
BEGUN = "begun"  # what the child prints before it answers a question
FOLDER_VARIABLE = "XLSTM_KERNELS_CACHE"
OPTIONS = "XLSTM_KERNELS_"  # how the names of this package's environment variables begin


class Question(NamedTuple):
    """An operator, the dtype of its dot operands, and its head dims by letter, in one order."""

    operator: str
    dtype: str
    dims: tuple[tuple[str, int], ...]

    def words(self) -> str:
        """Name it as messages do: mlstm bfloat16 Dk=128 Dv=128."""
        sizes = " ".join(f"{letter}={size}" for letter, size in self.dims)
        return f"{self.operator} {self.dtype} {sizes}"


class Verdict(NamedTuple):
    """The answer to a question.

    right: within the bound. reason: in words, if not. final: False if the check could not run (no
    memory left, say), so that it is asked again next time. ratios: RMS ratios to float64 by result.
    milliseconds: forward + backward by backend. seconds: that the check took.
    """

    right: bool
    reason: str = ""
    final: bool = True
    ratios: Mapping[str, float] = {}
    bound: float = 0.0
    milliseconds: Mapping[str, float] = {}
    seconds: float = 0.0


Runner = Callable[[Sequence[Question], int], list[Verdict]]


def question(operator: str, dtype: torch.dtype, dims: Mapping[str, int]) -> Question:
    """Make the question of a call."""
    return Question(operator, str(dtype).removeprefix("torch."), tuple(sorted(dims.items())))


def folder() -> Path:
    """Return the folder of the answers; XLSTM_KERNELS_CACHE names another one."""
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xlstm_kernels"


@functools.cache
def source_hash() -> str:
    """Hash the kernels' source files."""
    hashed = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "triton").glob("*.py")):
        hashed.update(path.name.encode())
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


@functools.cache
def machine(index: int) -> dict[str, str]:
    """Return what an answer depends on besides the question: device, versions, kernel source."""
    major, minor = torch.cuda.get_device_capability(index)
    tool = toolchain.assembler(10 * major + minor)
    return {
        "device": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": toolchain.triton_version() or "none",
        "ptxas": tool.version if tool else "none",
        "source": source_hash(),
    }


def file_of(asked: Question, facts: Mapping[str, str]) -> Path:
    """Return the file of an answer."""
    key = json.dumps([asked, sorted(facts.items())])
    return folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def read(asked: Question, facts: Mapping[str, str]) -> Verdict | None:
    """Read an answer; None if there is none, or none that can be read."""
    try:
        known = json.loads(file_of(asked, facts).read_text())
        return Verdict(**known["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(asked: Question, facts: Mapping[str, str], verdict: Verdict) -> None:
    """Keep an answer; a folder that cannot be written costs the next process a check."""
    path = file_of(asked, facts)
    text = json.dumps(
        {"question": asked.words(), "machine": dict(facts), "verdict": verdict._asdict()}, indent=1
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: several ranks may write the same answer.
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        Path(partial).replace(path)
    except OSError:
        pass


def clear() -> None:
    """Remove the answers that are kept, so that all is asked again."""
    forget()
    for path in folder().glob("*.json"):
        path.unlink(missing_ok=True)


def in_a_child(asked: Sequence[Question], index: int) -> list[Verdict]:
    """Answer questions in processes of their own, which a wrong kernel may end.

    The child says which question it begins. So one that ends it is wrong, and those after it are
    put to the next child; one that it never began (no memory left on the device, say) stays open.
    """
    found: list[Verdict] = []
    while len(found) < len(asked):
        answers, begun, last = _one_child(asked[len(found) :], index)
        found += answers
        if len(found) == len(asked):
            break
        if not begun:
            open_ones = Verdict(False, f"the check could not begin: {last}", final=False)
            return found + [open_ones] * (len(asked) - len(found))
        found.append(Verdict(False, f"the check ended without an answer: {last}"))
    return found


def _one_child(asked: Sequence[Question], index: int) -> tuple[list[Verdict], bool, str]:
    """Run one child: its answers, whether it had begun another, and its last words."""
    command = [sys.executable, "-m", "xlstm_kernels.selfcheck", "--device", str(index)]
    command += ["--questions", json.dumps(asked)]
    # An answer is kept for every later process, so no option of this one may change it.
    options = {name: x for name, x in os.environ.items() if not name.startswith(OPTIONS)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LONGEST_CHECK, env=options
        )
        said, last = done.stdout, _last_line(done.stderr) or f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        last = f"it took more than {LONGEST_CHECK} s"
    answers, begun = [], False
    for line in said.splitlines():
        if line == BEGUN:
            begun = True
        elif line.startswith("{"):
            answers.append(Verdict(**json.loads(line)))
            begun = False
    return answers, begun, last


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def ask(asked: Sequence[Question], index: int, runner: Runner = in_a_child) -> list[Verdict]:
    """Answer questions for a CUDA device: from the folder, the others by one check."""
    facts = machine(index)
    found = {each: read(each, facts) for each in asked}
    missing = [each for each, verdict in found.items() if verdict is None]
    if missing:
        for each, answer in zip(missing, runner(missing, index), strict=True):
            found[each] = answer
            if answer.final:
                write(each, facts, answer)
    return [verdict for each in asked if (verdict := found[each]) is not None]


def warning(asked: Question, verdict: Verdict, facts: Mapping[str, str]) -> str:
    """Word the warning of an operator that will run on torch: device, versions, figures."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "ptxas"))
    capability = int(facts["capability"].replace(".", ""))
    faults = toolchain.known_faults(capability, facts["triton"], facts["ptxas"])
    advice = f" Known: {faults[0]}." if faults else ""
    return (
        f"{asked.words()} runs on torch, not on Triton: {verdict.reason} ({facts['device']}, "
        f"{versions}).{advice} `xlstm-distill doctor` says more."
    )


_answered: dict[tuple[Question, int], bool] = {}


def is_right(asked: Question, index: int, runner: Runner = in_a_child) -> bool:
    """Say whether an operator may run on Triton; asks, and warns, once in this process."""
    key = (asked, index)
    if key not in _answered:
        verdict = ask([asked], index, runner)[0]
        if not verdict.right:
            warnings.warn(warning(asked, verdict, machine(index)), stacklevel=2)
        _answered[key] = verdict.right
    return _answered[key]


def forget() -> None:
    """Forget what this process knows; the folder stays."""
    _answered.clear()


def facts_in_words(verdict: Verdict) -> str:
    """Write a verdict's figures: the worst ratio, the bound, and the times."""
    if not verdict.ratios:
        return verdict.reason
    worst = max(verdict.ratios, key=lambda name: _order(verdict.ratios[name]))
    said = f"{worst} {verdict.ratios[worst]:.1e} of {verdict.bound:.0e} allowed"
    times = ", ".join(f"{name} {taken:.3g} ms" for name, taken in verdict.milliseconds.items())
    return f"{said}; {times}" if times else said


def _order(ratio: Any) -> float:
    return float("inf") if ratio != ratio else float(ratio)  # a NaN is the worst

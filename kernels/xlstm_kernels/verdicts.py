"""Whether the Triton kernels are right on this machine: ask once, then remember.

Questions are answered by another process (`python -m xlstm_kernels.selfcheck`): a kernel that
accesses memory which is not its own would take the caller's CUDA context with it. A process that
such a kernel has broken ends, and a new one answers the questions that are left. Answers are kept
in a folder, one file each, named after everything that can change them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from xlstm_kernels import toolchain

LONGEST_CHECK = 300  # seconds of a question, and of the start of its process
LATEST_END = 30  # seconds that a process may take to end after its last word
OUTSIDE = (1, 2, 9, 15)  # signals with which somebody else ends a process, no kernel does
NAMES = re.compile(r"[0-9a-f]{32}\.json")  # of the answers' files
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

    right: within the bound. reason: in words, if not. final: False if the check could not run, or
    did not end in time, so that it is asked again next time. ratios: RMS ratios to float64 by
    result. milliseconds: forward + backward by backend. seconds: that the check took.
    """

    right: bool
    reason: str = ""
    final: bool = True
    ratios: Mapping[str, float] = {}
    bound: float = 0.0
    milliseconds: Mapping[str, float] = {}
    seconds: float = 0.0


Runner = Callable[[Sequence[Question], int], Iterable[Verdict]]
Listener = Callable[[Question, Verdict], None]


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
        if NAMES.fullmatch(path.name):  # the folder may hold files of others
            path.unlink(missing_ok=True)


def in_a_child(asked: Sequence[Question], index: int) -> Iterator[Verdict]:
    """Answer questions in other processes, each as it comes.

    The child says which question it begins, and ends after one that broke its device. So a question
    at which it ends without an answer is wrong, and those after it are put to the next child.
    """
    left = list(asked)
    while left:
        for verdict in _one_child(left, index):
            left.pop(0)
            yield verdict


def _one_child(asked: Sequence[Question], index: int) -> Iterator[Verdict]:
    """Yield what one child answers, at least one verdict.

    A question that it began and did not answer gets one too: a final one if it was the kernel that
    ended the child. If it began none (the device is taken, say), all stay open.
    """
    begun, answered = False, 0
    try:
        with _child(asked, index) as child:
            for line in child.lines():
                if line.startswith("{"):
                    yield Verdict(**json.loads(line))
                    begun, answered = False, answered + 1
                elif line.strip() == BEGUN:
                    begun = True
            final, why = child.ended()
    except queue.Empty:
        final, why = False, f"it took more than {LONGEST_CHECK} s"
    except OSError as error:
        final, why = False, str(error)
    if begun:
        yield Verdict(False, f"the check ended without an answer: {why}", final)
    elif not answered:
        yield from [Verdict(False, f"the check could not begin: {why}", final=False)] * len(asked)


@contextlib.contextmanager
def _child(asked: Sequence[Question], index: int) -> Iterator[_Child]:
    """Start a process that answers questions; it ends with the block at the latest."""
    command = [sys.executable, "-m", "xlstm_kernels.selfcheck", "--device", str(index)]
    command += ["--questions", json.dumps(asked)]
    # An answer is kept for every later process, so no option of this one may change it.
    options = {name: x for name, x in os.environ.items() if not name.startswith(OPTIONS)}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            text=True, env=options,
        )  # fmt: skip
        try:
            yield _Child(process, errors)
        finally:
            process.kill()
            process.wait()


class _Child:
    """A process that answers questions, and the file of its errors."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[bytes]) -> None:
        self.process, self.errors = process, errors
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        # A pipe can be read with a time limit only by another thread.
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.said.put(line)
        self.said.put("")

    def lines(self) -> Iterator[str]:
        """Yield what it says. Raises queue.Empty where it says nothing for too long."""
        while line := self.said.get(timeout=LONGEST_CHECK):
            yield line

    def ended(self) -> tuple[bool, str]:
        """Wait for its end; return whether that was its own, and its last words."""
        try:
            status = self.process.wait(LATEST_END)
        except subprocess.TimeoutExpired:
            return False, "it did not end"
        if -status in OUTSIDE:
            return False, f"signal {-status} ended it"
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return True, lines[-1] if lines else f"exit status {status}"


def ask(
    asked: Sequence[Question],
    index: int,
    runner: Runner = in_a_child,
    listener: Listener | None = None,
) -> list[Verdict]:
    """Answer questions for a CUDA device: from the folder, the others by one check.

    Each answer is kept, and told to the listener, as soon as it is there.
    """
    facts = machine(index)
    found = {each: read(each, facts) for each in asked}
    missing = [each for each, verdict in found.items() if verdict is None]
    fresh = iter(runner(missing, index) if missing else ())
    verdicts = []
    for each in asked:
        verdict = found[each]
        if verdict is None:
            verdict = found[each] = next(fresh)
            if verdict.final:
                write(each, facts, verdict)
        if listener is not None:
            listener(each, verdict)
        verdicts.append(verdict)
    return verdicts


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

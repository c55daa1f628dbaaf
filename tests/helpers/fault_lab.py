"""Disturb every stage at its file operations and compare with undisturbed runs.

test_faults.py does that, and fault_report.py, which writes a page.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_plan import FAULTS, STAGES, Injection, chosen
from processes import ROOT, process_environment

from xlstm_distill.cli.app import app

HELPERS = Path(__file__).parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
SETS = (
    "data.context=64", "data.validation_rows=2", "data.workers=0", "student.mixer.window=8",
    "data.domains={math: {sources: [{generator: math, documents: 100}]},"
    " chat: {sources: [{generator: chat, documents: 100}]}}",
    "align.tokens=768", "align.batch=4", "align.warmup_steps=1", "training.checkpoint_steps=2",
    "training.validate_steps=null",
    "distill.batch=4", "distill.warmup_steps=1",
    "distill.experts={math: {phases: [{domain: math, tokens: 768}]},"
    " chat: {phases: [{domain: chat, tokens: 512}]}}",
    "evaluate.limit=2", "evaluate.tasks=[{name: qs_math_add, domain: math}]",
    "evaluate.speed.seconds=0",
)  # fmt: skip
CHANGED = {
    "prepare": "seed=1", "capture": "capture.top_k=32", "align": "align.lr=0.01",
    "distill": "distill.lr=0.0001", "merge": "merge.weights={math: 0.25, chat: 0.75}",
    "evaluate": "evaluate.limit=1", "report": "report.title=Another",
}  # fmt: skip
"""A setting of each stage: an artifact made with it is there when the stage runs again."""
DAY = 86400
COMMANDS = {command.callback.__name__ for command in app.registered_commands if command.callback}
LOOKS = [name for name in ("status", "verify") if name in COMMANDS]
"""Commands that must work on whatever a fault leaves."""


@dataclass
class Outcome:
    """What an injection left, and what is wrong with that; `state` is `whole` or `absent`."""

    injection: Injection
    state: str = "absent"
    same: bool = False
    reached: bool = True
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Lab:
    """A tiny run, stage by stage, and a server that disturbs copies of it."""

    def __init__(self, base: Path) -> None:
        self.base, self.numbered = base, 0
        library = base / "faults.so"
        source = HELPERS / "faults.c"
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"]
        subprocess.run([*map(str, command)], check=True)
        self.server = subprocess.Popen(
            [sys.executable, str(HELPERS / "fault_server.py")],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=process_environment(LD_PRELOAD=str(library)),
            cwd=ROOT,
        )
        self.seconds = 0.0
        self.teachers = [base / "teacher", base / "moved-teacher"]
        for place in self.teachers:
            shutil.copytree(RECIPE.parent / "quickstart" / "teacher", place)
        self.reference: dict[str, str] = {}
        self.operations: dict[tuple[str, bool], list[str]] = {}
        self._make_references()

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def ask(self, run: Path, words: Sequence[str | Path], **request: Any) -> dict[str, Any]:
        """Run a command line with a fault below `run`."""
        request |= {"words": [str(word) for word in words], "folder": str(run)}
        return self._send(request)

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        self.seconds += answer.get("seconds", 0.0)
        return answer

    def words(self, stage: str, run: Path, *sets: str, teacher: int = 0) -> list[str | Path]:
        """The command line of a stage."""
        chosen = [*SETS, f"teacher.path={self.teachers[teacher]}", *sets]
        overrides = [word for value in chosen for word in ("--set", value)]
        return [stage, RECIPE, "--run", run, *overrides]

    def _make_references(self) -> None:
        """Run every stage undisturbed; keep the run before each, also with an older artifact."""
        run = self.base / "run"
        for stage in STAGES:
            if run.exists():
                shutil.copytree(run, self._before(stage, False))
            else:
                self._before(stage, False).mkdir()
            for remade in (True, False):
                before = self._before(stage, remade)
                if remade:
                    shutil.copytree(self._before(stage, False), before)
                    # It also teaches the server what to load before it forks the next ones.
                    self._succeed(before, self.words(stage, before, CHANGED[stage]), learn=True)
                work = self.base / f"clean-{stage}-{remade}"
                shutil.copytree(before, work)
                journal = self.base / f"{stage}-{remade}.journal"
                self._succeed(work, self.words(stage, work), journal=str(journal))
                self.operations[stage, remade] = journal.read_text().splitlines()
            shutil.rmtree(run, ignore_errors=True)
            work.rename(run)
            self.reference |= contents(run)

    def _succeed(self, run: Path, words: Sequence[str | Path], **more: Any) -> None:
        answer = self.ask(run, words, **more)
        assert answer["code"] == 0, (words, answer)

    def _before(self, stage: str, remade: bool) -> Path:
        return self.base / f"before-{stage}-{'remade' if remade else 'first'}"

    def inject(self, injection: Injection) -> Outcome:
        """Disturb a stage, look at what is left, run it again and compare."""
        started = self.seconds
        outcome = Outcome(injection)
        self.numbered += 1
        run = self.base / f"injection-{self.numbered}"
        before = self._before(injection.stage, injection.remade)
        shutil.copytree(before, run)
        earlier = contents(run)
        words = self.words(injection.stage, run)
        kind, number = FAULTS[injection.fault]
        answer = self.ask(run, words, kind=kind, at=injection.at, error=number)
        if answer["code"] is None:
            self._watch(run, words, outcome)
            answer = self._send({"go_on": answer["pid"]})
        outcome.wrong += wrong_ending(injection.fault, answer)
        outcome.reached = not (kind in ("kill", "tear") and answer["code"] == 0)
        self._compare(run, earlier, outcome)
        self._look(run, outcome)
        self._go_on(run, earlier, outcome)
        outcome.seconds = self.seconds - started
        if not outcome.wrong:
            shutil.rmtree(self.base / f"injection-{self.numbered}", ignore_errors=True)
            shutil.rmtree(self.base / f"moved-{self.numbered}", ignore_errors=True)
        return outcome

    def _look(self, run: Path, outcome: Outcome) -> None:
        """What `status` and `verify` say of what is left."""
        # A run that ended before it made its directory is none yet.
        for command in LOOKS if (run / "artifacts").is_dir() else ():
            answer = self.ask(run, [command, run])
            if answer["code"] != 0 or "unreadable" in answer["out"]:
                outcome.wrong.append(f"{command}: {answer['out'][-400:]}{answer['err'][-400:]}")

    def _watch(self, run: Path, words: Sequence[str | Path], outcome: Outcome) -> None:
        """Look at a run that a process is at, and try to start the same once more."""
        self._look(run, outcome)
        if outcome.injection.stage in ("align", "distill"):
            answer = self.ask(run, words)
            # Before the training holds its lock, and when all is published, it may go through.
            if answer["code"] not in (0, 1) or "Traceback" in answer["err"]:
                outcome.wrong.append(f"a second run: {answer}")

    def _compare(self, run: Path, earlier: dict[str, str], outcome: Outcome) -> None:
        """Every artifact is the earlier one, whole and new, or absent; no earlier one is lost."""
        found = contents(run)
        own = stage_labels(self.reference, outcome.injection.stage)
        if all(found.get(label) == self.reference[label] for label in own):
            outcome.state = "whole"
        for label, content in found.items():
            known = {self.reference.get(label), earlier.get(label), earlier.get(kept_of(label))}
            if content not in known:
                outcome.wrong.append(f"{label}: neither the earlier artifact nor the new one")
        outcome.wrong += [f"{label}: lost" for label in lost(earlier, found)]

    def _go_on(self, run: Path, earlier: dict[str, str], outcome: Outcome) -> None:
        """Run the same command again, and compare with the undisturbed run."""
        injection, more, teacher = outcome.injection, {}, 0
        if injection.afterwards == "moved":
            run = run.rename(self.base / f"moved-{self.numbered}")
        elif injection.afterwards == "clock":
            more["clock"] = -DAY
        elif injection.afterwards == "teacher":
            teacher = 1
        answer = self.ask(run, self.words(injection.stage, run, teacher=teacher), **more)
        if answer["code"] != 0:
            outcome.wrong.append(f"the next run: {answer['code']} {answer['err'][-600:]}")
            return
        found = contents(run)
        published = {label for label in found if kept_of(label) == label}
        labels = sorted({*published, *stage_labels(self.reference, injection.stage)})
        other = [label for label in labels if found.get(label) != self.reference[label]]
        outcome.same = not other
        outcome.wrong += [f"{label}: other content after the next run" for label in other]
        outcome.wrong += [f"{label}: lost by the next run" for label in lost(earlier, found)]
        outcome.wrong += [f"litter: {name}" for name in litter(run)]
        if injection.stage == "report":
            made, shown = run / "artifacts" / "report" / "report", run / "report"
            if [p.read_bytes() for p in sorted(made.iterdir())] != [
                p.read_bytes() for p in sorted(shown.iterdir())
            ]:
                outcome.wrong.append("the report that is shown is not the one that was made")


def stage_labels(labels: Sequence[str] | dict[str, str], stage: str) -> list[str]:
    """The artifacts that a stage makes."""
    folder = "data" if stage == "prepare" else stage
    return [label for label in labels if label.split("/")[0] == folder]


def kept_of(label: str) -> str:
    """The label of an artifact that was kept when another took its place; its own otherwise."""
    return label.partition(".kept-")[0]


def lost(earlier: dict[str, str], found: dict[str, str]) -> list[str]:
    """The labels whose earlier artifact is neither in its place nor kept beside it."""
    there = {(kept_of(label), content) for label, content in found.items()}
    return [label for label, content in earlier.items() if (label, content) not in there]


def contents(run: Path) -> dict[str, str]:
    """A hash of every published artifact's content; the manifest counts by its fingerprint."""
    found = {}
    for manifest in sorted((run / "artifacts").glob("**/manifest.json")):
        folder = manifest.parent.relative_to(run / "artifacts")
        if not any(part.startswith(".") for part in folder.parts):
            found[folder.as_posix()] = hash_of(manifest.parent)
    return found


def hash_of(artifact: Path) -> str:
    """Hash the files that an artifact's manifest names, without those that tell times."""
    total = hashlib.sha256()
    try:
        facts = json.loads((artifact / "manifest.json").read_text())
        total.update(f"{facts['fingerprint']} {facts['identity']}".encode())
        for name in sorted(facts["files"]):
            total.update(f"{name}\0".encode())
            # The report shows how long the stages took; its fingerprint names the scores.
            if name != "log.jsonl" and kept_of(artifact.name) != "report":
                total.update((artifact / name).read_bytes())
    except (OSError, ValueError, KeyError) as error:
        return f"damaged: {error}"
    return total.hexdigest()[:16]


def litter(run: Path) -> Iterator[str]:
    """Names that no finished run leaves."""
    for path in run.rglob("*"):
        inside = path.relative_to(run)
        # The mark of a killed process is an empty file, which the next process at that label takes.
        if inside.parts[0] == ".locks":
            continue
        if path.name.endswith((".partial", ".old", ".shards")) or path.name.startswith(
            (".tmp", "tmp")
        ):
            yield str(inside)
    for manifest in run.glob("artifacts/**/manifest.json"):
        named = {"manifest.json", *json.loads(manifest.read_text())["files"]}
        for path in manifest.parent.rglob("*"):
            inside = path.relative_to(manifest.parent)
            if path.is_file() and inside.as_posix() not in named:
                yield str(path.relative_to(run))
    for path in (run / "training").glob("*"):
        if path.suffix != ".lock":
            yield str(path.relative_to(run))


def wrong_ending(fault: str, answer: dict[str, Any]) -> list[str]:
    """What is wrong with how a disturbed command ended."""
    code, err = answer["code"], answer["err"]
    lines = [line for line in err.splitlines() if line.strip()]
    if code == -9:
        return [] if FAULTS[fault][0] in ("kill", "tear") else [f"killed: {err[-300:]}"]
    if code == 0:
        return []
    wrong = []
    if code != 1:
        wrong.append(f"exit code {code}: {err[-600:]}")
    elif len(lines) != 1 or not lines[0].startswith("error: "):
        wrong.append(f"not one line: {err[-600:]}")
    elif FAULTS[fault][0] == "full" and "disk full" not in lines[0]:
        wrong.append(f"does not say that the disk is full: {lines[0]}")
    elif "(--debug shows where)" in lines[0]:
        wrong.append(f"not in plain words: {lines[0]}")
    return wrong


def run_injections(base: Path, count: int = 200, seed: int = 0) -> tuple[list[Outcome], float]:
    """Disturb `count` times; returns also the seconds of processor time."""
    lab = Lab(base)
    outcomes = []
    try:
        for injection in chosen(lab.operations, count, seed):
            outcomes.append(lab.inject(injection))
            # At once: all of them take minutes.
            if outcomes[-1].wrong:
                print(outcomes[-1], flush=True)
    finally:
        lab.close()
    return outcomes, lab.seconds

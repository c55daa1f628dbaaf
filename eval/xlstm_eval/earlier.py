"""An earlier evaluation whose judged task is judged anew.

The judge grades answers and makes none. So where nothing but the judge differs, an earlier
evaluation keeps its answers: the judged task alone is asked, if need be, and judged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xlstm_eval.beside import SKIPPED, mt_bench, open_judge, skipped
from xlstm_eval.loading import LoadedSuite
from xlstm_eval.records import TaskResult
from xlstm_eval.results import EvaluationResult, hash_requests, read_items, settings_hash
from xlstm_eval.samples import Row, read_lines
from xlstm_eval.tasks.mt_bench import MT_BENCH, MTBench

SUMMED = ("halved", "answer_seconds", "tokens")
"""What a protocol counts over all answers."""


@dataclass(frozen=True)
class Earlier:
    """An evaluation of the same model under the same settings, but for the judged task.

    ``folder`` holds its files, ``manifest`` what was recorded of it: ``protocol`` and ``warnings``.
    ``tasks`` are its scores as they were written, without items.
    """

    folder: Path
    manifest: Mapping[str, Any]
    tasks: tuple[TaskResult, ...]

    def results(self) -> dict[str, TaskResult]:
        """Return the results of all other tasks, with their items."""
        others = [task for task in self.tasks if task.task != MT_BENCH]
        return {task.task: task for task in read_items(self.folder, others)}

    def samples(self, loaded: LoadedSuite) -> dict[str, list[Row]]:
        """Return the rows of all other tasks, in the suite's order."""
        names = [leaf.task_name for _, leaf in loaded.leaves()]
        return {name: list(read_lines(self._file(name))) for name in names}

    def answers(self, talk: MTBench) -> list[tuple[str, str]] | None:
        """Return the model's answers to exactly these questions; None where it was not asked."""
        before = self.manifest["protocol"]["tasks"].get(MT_BENCH, {})
        if any(before.get(key) != value for key, value in talk.asked().items()):
            return None
        rows = read_lines(self._file(MT_BENCH))
        return [(row["filtered_resps"][0], row["filtered_resps"][1]) for row in rows]

    def protocol(self, judged: Mapping[str, Any]) -> dict[str, Any]:
        """Return its protocol with what was asked, answered and judged anew."""
        before = self.manifest["protocol"]
        tasks = {name: own for name, own in before["tasks"].items() if name != MT_BENCH}
        found = {**before, "tasks": tasks | judged["tasks"]}
        if "batch" in judged:
            found["batch"] = before["batch"] | judged["batch"]
            found |= {name: before[name] + judged[name] for name in SUMMED}
        return found

    def warnings(self) -> list[str]:
        """Return its warnings, but for that of a judge that was missing."""
        return [said for said in self.manifest["warnings"] if not said.startswith(SKIPPED)]

    def _file(self, task: str) -> Path:
        return self.folder / "samples" / f"{task}.jsonl"


def judge_anew(
    earlier: Earlier,
    loaded: LoadedSuite,
    *,
    seed: int = 0,
    folder: Path | None = None,
    judged: EvaluationResult | None = None,
) -> EvaluationResult:
    """Return an earlier evaluation of a model with its judged task judged now (rank 0).

    The other tasks stay as they are. ``judged`` is the judged task's own result where the model had
    to be asked for it; else the earlier answers are judged, and the judgements kept in ``folder``.
    Raises EvalError: the judge cannot be reached.
    """
    started = time.perf_counter()
    results, samples = earlier.results(), earlier.samples(loaded)
    protocol: dict[str, Any] = {"tasks": {}}
    talk = mt_bench(loaded)
    if judged is not None:
        results |= {task.task: task for task in judged.tasks}
        samples |= judged.samples
        protocol = dict(judged.protocol)
    elif talk is not None and (answers := earlier.answers(talk)) is not None:
        judge = open_judge(loaded, seed, folder)
        assert judge is not None  # there are questions
        results[MT_BENCH], samples[MT_BENCH] = talk.judged(answers, judge)
        protocol["tasks"] = {MT_BENCH: talk.protocol(judge.settings)}
    said = [*earlier.warnings(), *(judged.warnings if judged else ()), *skipped(loaded)]
    return EvaluationResult(
        tasks=tuple(results[task.name] for task in loaded.suite.tasks if task.name in results),
        samples=samples,
        seconds=time.perf_counter() - started,
        requests_hash=hash_requests(samples),
        settings_hash=settings_hash(loaded.suite, seed),
        warnings=tuple(dict.fromkeys(said)),
        groups=loaded.groups(),
        protocol=earlier.protocol(protocol),
    )


def judged_alone(loaded: LoadedSuite) -> LoadedSuite:
    """Return the suite with its judged task alone."""
    tasks = tuple(task for task in loaded.suite.tasks if task.name == MT_BENCH)
    return replace(loaded, suite=loaded.suite.model_copy(update={"tasks": tasks}), tasks={})

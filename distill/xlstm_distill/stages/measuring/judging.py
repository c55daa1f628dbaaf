"""Evaluations of which the judge alone has changed: the answers of an earlier one stay."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts import Artifact, Draft, Request, Run
from xlstm_distill.artifacts.hashing import digest
from xlstm_distill.artifacts.manifest import FORMAT, MANIFEST, read_manifest
from xlstm_distill.runtime.ranks import from_rank_zero
from xlstm_eval.beside import mt_bench
from xlstm_eval.earlier import Earlier
from xlstm_eval.loading import LoadedSuite
from xlstm_eval.records import TaskResult
from xlstm_eval.results import ITEMS_FILE
from xlstm_eval.tasks.mt_bench import MT_BENCH

RESULTS_FILE = "results.json"
SAMPLES_FOLDER = "samples"
WRITTEN = (MANIFEST, RESULTS_FILE, ITEMS_FILE, SAMPLES_FOLDER)
"""What an evaluation writes anew in any case; its other files hold no judgement."""


@dataclass(frozen=True)
class Unjudged:
    """An earlier evaluation of a model that differs in the judged task alone."""

    folder: Path

    @functools.cached_property
    def artifact(self) -> Artifact:
        """What was published (rank 0: other ranks may not see it yet)."""
        return Artifact(self.folder, read_manifest(self.folder) or {}, reused=True)

    @property
    def earlier(self) -> Earlier:
        """Its answers and scores."""
        tasks = [TaskResult.model_validate(own) for own in self.artifact.read_json(RESULTS_FILE)]
        return Earlier(self.artifact.path, self.artifact.manifest["results"], tuple(tasks))

    def has_answers(self, suite: LoadedSuite) -> bool:
        """Tell whether the model needs to be asked nothing."""
        talk = mt_bench(suite)
        return talk is None or self.earlier.answers(talk) is not None

    def take_over(self, draft: Draft) -> None:
        """Copy what no judge changes: gates, speed, long context."""
        # As long as it took to answer; the judge's time comes on top.
        draft.earlier_seconds = self.artifact.manifest["wall_seconds"]
        if "backend" in self.artifact.manifest["results"]:
            draft.results["backend"] = self.artifact.manifest["results"]["backend"]
        for path in self.artifact.path.iterdir():
            if path.name not in WRITTEN:
                shutil.copy2(path, draft.path / path.name)


def find_unjudged(run: Run, request: Request) -> Unjudged | None:
    """Return an evaluation that differs from the requested one in the judged task alone.

    All ranks must ask, and get rank 0's answer. The published one goes first, then those that were
    kept. Raises RunError: a file of it is missing or has another size.
    """

    def find() -> str | None:
        wanted = _without_judge(request.parts, request.inputs)
        published = run.load(request.label)
        for artifact in [*([published] if published else []), *run.kept(request.label)]:
            manifest = artifact.manifest
            # An older one may lack what is taken from it.
            usable = manifest["format"] == FORMAT and "protocol" in manifest["results"]
            if usable and _without_judge(manifest["recipe"], manifest["inputs"]) == wanted:
                artifact.check_sizes()
                return str(artifact.path)
        return None

    folder = from_rank_zero(find)
    return None if folder is None else Unjudged(Path(folder))


def _without_judge(parts: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash what an evaluation is made from, without the judged task and its judge."""
    evaluate = {key: value for key, value in parts["evaluate"].items() if key != "judge"}
    evaluate["tasks"] = [task for task in evaluate["tasks"] if task["name"] != MT_BENCH]
    rest = {name: value for name, value in inputs.items() if name != "questions"}
    return digest([{**parts, "evaluate": evaluate}, rest])

"""Tune merge weights: score merges on validation items, and keep the best."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from xlstm_distill.artifacts import Draft
from xlstm_distill.merging.groups import GroupedWeights, check_groups
from xlstm_distill.merging.merge import LoadedWeights, Sources, merge_files, plan_for
from xlstm_distill.merging.search import Score, Trial, Weights, best_of, search
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.teacher import load_teacher
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import from_rank_zero, is_main_process
from xlstm_distill.stages.kernels import choose_kernels
from xlstm_distill.stages.weights.material import Material
from xlstm_distill.stages.weights.validation import Validator, judge
from xlstm_distill.stages.workbench import load_student
from xlstm_distill.training.accelerator import make_accelerator

JOURNAL, TRIALS = "trials.jsonl", "trials.json"
TEACHER = "teacher"


def tune(
    material: Material, fixed: dict[str, Any], draft: Draft, console: Console
) -> GroupedWeights:
    """Find weights; all ranks call it, and all answer validation items.

    `fixed` are the plan's settings besides the weights. Every score is kept in the work directory,
    so a search that was cut short goes on where it stopped. The draft gets all trials.

    Raises:
        UserError: optuna is not installed, or the validation tasks do not serve.
    """
    merge, recipe = material.merge, material.lineage.recipe
    check_groups(merge.layer_groups, material.layers, material.key)
    material.work.mkdir(parents=True, exist_ok=True)
    judge_merge = _Judge(material, fixed, console)
    trials: list[Trial] = []
    total = merge.tuning.trials
    proposed = search(
        len(material.experts), merge.layer_groups, total, recipe.seed, judge_merge.score
    )
    with console.progress(f"{material.label} (tuning)", total, unit="merges") as progress:
        for trial in proposed:
            trials.append(trial)
            if is_main_process():
                material.keep_progress(len(trials), total)
            lead = best_of(trials).score
            progress.update(1, worst_drop=lead.worst_tolerance, recovery=-lead.negative_recovery)
    best = best_of(trials)
    if is_main_process():
        draft.write_json(TRIALS, [asdict(trial) for trial in trials])
    draft.results["tuning"] = {
        "trials": len(trials),
        "evaluated": len({trial.weights for trial in trials}),
        "seed": recipe.seed,
        "worst_tolerance": best.score.worst_tolerance,
        "worst_tolerance_error": best.score.error,
        "mean_recovery": -best.score.negative_recovery,
        "uniform": asdict(trials[0].score),
    }
    return material.grouped(best.weights)


class _Judge:
    """Scores merges, each once: scores are kept on disk by the merge's weights."""

    def __init__(self, material: Material, fixed: dict[str, Any], console: Console) -> None:
        self.material, self.fixed, self.console = material, fixed, console
        self.kept = Journal(material.work / JOURNAL)

    def score(self, weights: Weights) -> Score:
        """Score a merge on all ranks."""
        teacher = self._results(TEACHER, self._teacher)
        student = self._results(json.dumps(weights), functools.partial(self._student, weights))
        return judge(teacher, student)

    def _results(
        self, what: str, compute: Callable[[], list[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        # Rank 0 alone writes, so it alone knows what there is.
        known = from_rank_zero(lambda: self.kept.found.get(what))
        if known is not None:
            return known
        results = compute()
        if is_main_process():
            self.kept.add(what, results)
        return results

    @functools.cached_property
    def _device(self) -> torch.device:
        return make_accelerator(self.material.lineage.recipe).device

    @functools.cached_property
    def _validator(self) -> Validator:
        lineage = self.material.lineage
        return Validator(
            lineage.recipe,
            self.material.merge.tuning,
            lineage.tokenizer,
            self.material.work,
            self.material.key,
        )

    def _teacher(self) -> list[dict[str, Any]]:
        # Freed before the student is loaded.
        teacher = load_teacher(self.material.lineage.recipe.teacher, self._device)
        return self._validator.ask(teacher)

    @functools.cached_property
    def _model(self) -> CausalLM:
        """One student, into which every merge is written: in the dtype of the evaluation."""
        recipe = self.material.lineage.recipe
        first = next(iter(self.material.experts.values()))
        student = load_student(first, getattr(torch, recipe.teacher.dtype), self._device)
        choose_kernels(
            student, recipe, self._device, self.material.work, self.console, decodes=True
        )
        return student

    def _student(self, weights: Weights) -> list[dict[str, Any]]:
        named = self.material.grouped(weights)
        plan = plan_for(named, **self.fixed)
        experts = {name: self.material.sources.experts[name] for name in plan.weights}
        model = self._model
        merge_files(plan, Sources(experts, self.material.sources.base), LoadedWeights(model))
        return self._validator.ask(model)


class Journal:
    """Results by what was scored, one line of JSON each; a torn last line does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list[dict[str, Any]]] = {}
        whole = b""
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):
                break
            entry = json.loads(line)
            self.found[entry["what"]] = entry["results"]
            whole += line
        if is_main_process() and path.exists() and len(whole) < path.stat().st_size:
            os.truncate(path, len(whole))

    def add(self, what: str, results: list[dict[str, Any]]) -> None:
        """Keep results; they outlive a kill from here on."""
        self.found[what] = results
        line = json.dumps({"what": what, "results": results}) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

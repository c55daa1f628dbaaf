"""Tune merge weights: score merges on validation items, and keep the best."""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xlstm_distill.artifacts import Draft
from xlstm_distill.artifacts.files import write_text
from xlstm_distill.merging.groups import GroupedWeights, check_groups
from xlstm_distill.merging.merge import LoadedWeights, Sources, merge_files, plan_for
from xlstm_distill.merging.search import Score, Trial, Weights, best_of, search
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.teacher import load_teacher
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import from_rank_zero, is_main_process
from xlstm_distill.stages.kernels import choose_kernels, kernels_of
from xlstm_distill.stages.weights.material import Material
from xlstm_distill.stages.weights.validation import Validator, judge
from xlstm_distill.stages.workbench import load_student
from xlstm_distill.training.accelerator import make_accelerator
from xlstm_eval.records import TaskResult

JOURNAL, TRIALS = "trials.jsonl", "trials.json"
VERSION = 2
"""Of the journal. 2: with the scores of items, and a line of what it is made from."""
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
    draft.results["backend"] = kernels_of(recipe, material.work)
    if is_main_process():
        draft.write_json(TRIALS, [trial.facts() for trial in trials])
    draft.results["tuning"] = {
        "trials": len(trials),
        "evaluated": len({trial.weights for trial in trials}),
        "seed": recipe.seed,
        "worst_tolerance": best.score.worst_tolerance,
        "worst_tolerance_error": best.score.error,
        "mean_recovery": -best.score.negative_recovery,
        "uniform": trials[0].score.facts(),
    }
    return material.grouped(best.weights)


class _Judge:
    """Scores merges, each once: scores are kept on disk by the merge's weights."""

    def __init__(self, material: Material, fixed: dict[str, Any], console: Console) -> None:
        self.material, self.fixed, self.console = material, fixed, console
        self.kept = Journal(
            material.work / JOURNAL,
            material.made_from,
            lambda text: console.line(f"{material.label}: {text}"),
        )

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
    """Results by what was scored, one line of JSON each, after a line of what they are made from.

    Rank 0 reads and writes it. Lines that cannot be read do not count. A journal of other settings,
    or of another version, is laid aside.
    """

    def __init__(self, path: Path, made_from: str, say: Callable[[str], None]) -> None:
        self.path = path
        self.found: dict[str, list[dict[str, Any]]] = {}
        if not is_main_process():
            return
        head = json.dumps({"version": VERSION, "made_from": made_from}) + "\n"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and lines[0] != head.encode():
            aside = path.with_name(f"{path.stem}-{uuid.uuid4().hex[:8]}.old")
            path.rename(aside)
            say(
                f"{path} was made from other settings, or by another version of the program; the "
                f"search begins anew, and the file is laid aside as {aside.name}"
            )
            lines = []
        whole = [line for line in lines[1:] if self._read(line)]
        damaged = len(lines[1:]) - len(whole)
        if damaged:
            say(f"{path}: {damaged} of its lines cannot be read; those merges are scored again")
        if not lines or damaged:
            write_text(path, head + b"".join(whole).decode())
        if merges := len(self.found.keys() - {TEACHER}):
            say(f"goes on with {merges} merges that were scored before")

    def _read(self, line: bytes) -> bool:
        """Take in a line; False if it is torn or damaged."""
        try:
            entry = json.loads(line)
            for task in entry["results"]:
                TaskResult(**task)
            # A kill may leave a whole line without its end.
            if line.endswith(b"\n") and isinstance(entry["what"], str):
                self.found[entry["what"]] = entry["results"]
                return True
        except (ValueError, KeyError, TypeError):
            pass
        return False

    def add(self, what: str, results: list[dict[str, Any]]) -> None:
        """Keep results; they outlive a kill from here on."""
        self.found[what] = results
        line = json.dumps({"what": what, "results": results}) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

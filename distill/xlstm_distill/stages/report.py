"""Report: scores, Win-and-Tie rates, gates, losses, times and provenance in one document."""

from __future__ import annotations

import filecmp
import json
import math
import os
import platform
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from xlstm_distill.artifacts import Artifact, Draft, Run
from xlstm_distill.artifacts.files import replace_directory
from xlstm_distill.artifacts.locks import remove_leftovers
from xlstm_distill.artifacts.manifest import MANIFEST
from xlstm_distill.artifacts.run import versions
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.shown import shown_recipe, teacher_name
from xlstm_distill.runtime.console import Console
from xlstm_distill.runtime.ranks import is_main_process
from xlstm_distill.stages.evaluate import find_evaluations
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.outline import MERGED, STAGES, TEACHER, stage_of
from xlstm_distill.training.log import LOG_FILE
from xlstm_eval.protocol import flat, require_same_protocol
from xlstm_eval.records import LongContext, TaskResult
from xlstm_eval.report.data import Curve, ReportData, ReportModel
from xlstm_eval.report.items import ItemSet, read_item_set
from xlstm_eval.report.page import write_report
from xlstm_eval.report.speed import SPEED_FILE, Speed
from xlstm_eval.results import read_items, require_same_requests
from xlstm_eval.samples import folder_rows

CURVE_POINTS = 200
UNITS = {
    "relative_error": "squared error / teacher's power",
    "ce": "nats per token",
    "kl": "nats per token",
}
FOLDER = "report"
LONG_CONTEXT_FILE = "long_context.json"
Record = TypeVar("Record", bound=BaseModel)


def report(lineage: Lineage, run: Run, console: Console) -> Artifact:
    """Publish the report and put report.{html,md,json} into RUN/report."""
    evaluated = find_evaluations(lineage, run)
    # Before anything is drawn: scores of other prompts cannot be compared.
    check_measured_alike(evaluated)

    def build(draft: Draft) -> None:
        write_report(report_data(lineage.recipe, run, evaluated), draft.path / FOLDER)

    artifact = run.make(lineage.request("report"), build, console=console)
    target = run.directory / FOLDER
    if is_main_process():
        with run.lock(lineage.request("report")):
            show(artifact.path / FOLDER, target, run.locks)
    return artifact


def check_measured_alike(evaluated: Mapping[str, Artifact]) -> None:
    """Raise EvalError unless all models were asked the same, under one protocol."""
    hashes = {}
    for name, artifact in evaluated.items():
        hashes[name] = artifact.manifest["results"]["requests_hash"]
    require_same_requests(hashes)
    require_same_protocol({name: _protocol(artifact) for name, artifact in evaluated.items()})


def show(made: Path, target: Path, marks: Path) -> None:
    """Copy a report to where users look for it, unless it is there; the lock must be held."""
    remove_leftovers(target, marks)
    # Compared and not remembered: a process may have died before it could copy.
    names = sorted(path.name for path in made.iterdir())
    same, _, _ = filecmp.cmpfiles(made, target, names, shallow=False)
    if sorted(same) == names:
        return
    copy = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        shutil.copytree(made, copy)
        replace_directory(copy, target)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _protocol(artifact: Artifact) -> dict[str, Any]:
    """How a model was measured; older evaluations recorded less of it, or nothing."""
    found: dict[str, Any] = artifact.manifest["results"].get("protocol", {})
    return found


def report_data(recipe: Recipe, run: Run, evaluated: Mapping[str, Artifact]) -> ReportData:
    """Collect what the report shows; no path of this machine is among it."""
    students = {name: artifact for name, artifact in evaluated.items() if name != TEACHER}
    sources = ancestry(run, evaluated)
    results = {name: read_results(recipe, artifact) for name, artifact in evaluated.items()}
    return ReportData(
        title=recipe.report.title or f"{recipe.name}: student against teacher",
        teacher=teacher_name(recipe.teacher),
        teacher_results=results[TEACHER],
        models=tuple(
            ReportModel(
                name=name,
                role=role_of(recipe, name),
                results=results[name],
                domains=_domains(recipe, name),
            )
            for name in students
        ),
        items=_items(recipe, evaluated, results),
        speed=_measured(evaluated, SPEED_FILE, Speed),
        long_context=_measured(evaluated, LONG_CONTEXT_FILE, LongContext),
        finished=max(artifact.manifest.get("finished", "") for artifact in evaluated.values()),
        gates=_gates(students),
        losses=_losses(recipe, sources),
        timings=_timings(sources),
        provenance=_provenance(recipe, run, evaluated) | _kept_attention(sources),
        recipe=shown_recipe(recipe),
        alphas=recipe.report.alphas,
        margin=recipe.report.margin,
    )


def role_of(recipe: Recipe, model: str) -> str:
    """Return what a student is: merged, variant (a further merge) or expert."""
    if model == MERGED:
        return "merged"
    return "variant" if model in recipe.merge.variants else "expert"


def _domains(recipe: Recipe, model: str) -> tuple[str, ...]:
    """Domains that an expert was trained on; none for a merge."""
    expert = recipe.distill.experts.get(model)
    phases = expert.phases if expert and role_of(recipe, model) == "expert" else ()
    return tuple(dict.fromkeys(domain for phase in phases for domain in phase.domains))


def _items(
    recipe: Recipe,
    evaluated: Mapping[str, Artifact],
    results: Mapping[str, tuple[TaskResult, ...]],
) -> ItemSet | None:
    """Answers of the teacher and of the merged student, item by item."""
    teacher, merged = (folder_rows(evaluated[name].path / "samples") for name in (TEACHER, MERGED))
    pairs = list(zip(results[TEACHER], results[MERGED], strict=True))
    return read_item_set(teacher, merged, pairs, recipe.report.items)


def _measured(
    evaluated: Mapping[str, Artifact], file: str, record: type[Record]
) -> dict[str, Record]:
    """What some evaluations left beside their scores; not all have it."""
    found = {}
    for name, artifact in evaluated.items():
        path = artifact.path / file
        if path.is_file():
            found[name] = record.model_validate_json(path.read_text(encoding="utf-8"))
    return found


def read_results(recipe: Recipe, artifact: Artifact) -> tuple[TaskResult, ...]:
    """An evaluation's scores and items, with the levels of chance that the recipe names."""
    found = read_items(
        artifact.path, [TaskResult(**task) for task in artifact.read_json("results.json")]
    )
    named = {task.name: task.chance for task in recipe.evaluate.tasks if task.chance is not None}
    return tuple(
        task.model_copy(update={"chance": named[task.task]}) if task.task in named else task
        for task in found
    )


def _gates(students: Mapping[str, Artifact]) -> dict[str, Any] | None:
    gates = {name: artifact.read_json("gates.json") for name, artifact in students.items()}
    # Mixers with one branch have no output gate, and their file holds an empty list.
    return {name: rows for name, rows in gates.items() if rows} or None


def ancestry(run: Run, evaluated: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The evaluations and all that they were made from, in the stages' order and then by time.

    Nothing else that lies in the run counts, and neither does an artifact that has since been made
    again from other settings.
    """
    found = {f"evaluate/{name}": artifact for name, artifact in evaluated.items()}
    waiting = list(found.values())
    while waiting:
        for name, identity in waiting.pop().manifest["inputs"].items():
            # An evaluation names its model: "merge/merged" is the artifact "merge".
            label = "merge" if name == f"merge/{MERGED}" else name
            if stage_of(label) not in STAGES or label in found:
                continue
            artifact = run.load(label)
            # The label may have been made again since, from other settings: then its times and
            # losses are not those of the model that was scored.
            if artifact is not None and artifact.identity == identity:
                found[label] = artifact
                waiting.append(artifact)

    def place(label: str) -> tuple[int, int]:
        return STAGES.index(stage_of(label)), _finished(found[label])

    return {label: found[label] for label in sorted(found, key=place)}


def _finished(artifact: Artifact) -> int:
    # The manifest is written last, so that its time is the artifact's.
    return (artifact.path / MANIFEST).stat().st_mtime_ns


def _losses(recipe: Recipe, sources: Mapping[str, Artifact]) -> dict[str, dict[str, Curve]]:
    """Training curves of alignment, and of every expert and its refinement."""
    series: dict[str, tuple[str, ...]] = {"align": ("relative_error",)}
    for name in recipe.distill.experts:
        series[f"distill/{name}"] = series[f"refine/{name}"] = ("ce", "kl")
    curves: dict[str, dict[str, Curve]] = {}
    for label, names in series.items():
        # An ablation without new parameters has an `align` artifact and no log.
        lines = _logged_steps(sources[label]) if label in sources else []
        if lines:
            own = sources[label].manifest["results"]
            curves[label] = {name: _curve(lines, name, own) for name in names}
    return curves


def _logged_steps(artifact: Artifact) -> list[dict[str, Any]]:
    """The lines of a training's log, without skipped steps: those have no loss."""
    file = artifact.path / LOG_FILE
    if not file.is_file():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if not line.get("skipped")]


def _curve(lines: list[dict[str, Any]], name: str, results: Mapping[str, Any]) -> Curve:
    """At most `CURVE_POINTS` points, each the mean of its stretch of steps; all held-out figures.

    Held-out figures are those before and after the training, and in between as often as the recipe
    has it (`training.validate_steps`).
    """
    width = max(1, math.ceil(len(lines) / CURVE_POINTS))
    steps: list[int] = []
    means: list[float] = []
    for start in range(0, len(lines), width):
        stretch = lines[start : start + width]
        # Means and not samples: one step's loss depends on its rows more than on its place.
        steps.append(stretch[-1]["step"])
        means.append(sum(line[name] for line in stretch) / len(stretch))
    # Steps count from 0, and a line's held-out figures follow its step.
    held = {
        line["step"] + 1: line[f"held_out_{name}"] for line in lines if f"held_out_{name}" in line
    }
    for step, part in ((0, "validation_before"), (lines[-1]["step"] + 1, "validation_after")):
        if name in (results.get(part) or {}):
            held[step] = results[part][name]
    return Curve(
        step=tuple(steps),
        value=tuple(means),
        unit=UNITS[name],
        held_out_step=tuple(sorted(held)),
        held_out=tuple(held[step] for step in sorted(held)),
    )


def _timings(sources: Mapping[str, Artifact]) -> dict[str, float]:
    """Seconds each artifact that the report rests on took to make."""
    return {label: artifact.manifest["wall_seconds"] for label, artifact in sources.items()}


def _shown_protocol(protocol: Mapping[str, Any]) -> dict[str, str]:
    """The protocol of all models in lines; each task's settings are in the recipe."""
    settings = flat({key: value for key, value in protocol.items() if key != "tasks"})
    return {f"evaluation: {key}": str(value) for key, value in settings.items()}


def _kept_attention(sources: Mapping[str, Artifact]) -> dict[str, str]:
    """What the students keep of the teacher's attention, and its cost, where they keep any."""
    results = sources["align"].manifest["results"] if "align" in sources else {}
    return {"kept attention": results["kept_attention"]} if "kept_attention" in results else {}


def _provenance(recipe: Recipe, run: Run, evaluated: Mapping[str, Artifact]) -> dict[str, str]:
    """Where the figures come from: recipe, seed, versions, machine, fingerprints."""
    name, revision = teacher_name(recipe.teacher), recipe.teacher.revision
    found = {
        "recipe": recipe.name,
        "evaluated": ", ".join(
            f"{model} {artifact.manifest.get('finished', 'at an unknown time')}"
            for model, artifact in evaluated.items()
        ),
        "seed": str(recipe.seed),
        "teacher": f"{name}@{revision}" if revision else name,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, {platform.system()}",
        **_shown_protocol(_protocol(evaluated[TEACHER])),
        "requests hash": evaluated[TEACHER].manifest["results"]["requests_hash"],
        **{f"version of {package}": version for package, version in versions().items()},
    }
    for model, artifact in evaluated.items():
        found[f"fingerprint of evaluate/{model}"] = artifact.fingerprint
    return found

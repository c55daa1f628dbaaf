"""Students of several runs, read from their directories for one page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts import Artifact
from xlstm_distill.artifacts.manifest import MANIFEST
from xlstm_distill.artifacts.run import RECIPE_FILE
from xlstm_distill.errors import UserError
from xlstm_distill.planning.architecture import read_architecture
from xlstm_distill.planning.inputs import DTYPE_BYTES
from xlstm_distill.planning.memory import kept_bytes_per_token, student_cache
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.shown import teacher_name
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.outline import TEACHER
from xlstm_distill.stages.report import check_measured_alike, read_results, role_of
from xlstm_distill.stages.status.comparison import saved_lineage
from xlstm_eval.metrics import ALPHAS, compare, pair_results
from xlstm_eval.records import EvalError
from xlstm_eval.report.entries import Entry
from xlstm_eval.statistics.measure import measure


def read_entries(directories: Sequence[Path], margin: float | None = None) -> list[Entry]:
    """Return the evaluated students of runs, each against its run's teacher.

    Raises:
        UserError: no run, no evaluations, or two runs of one name.
    """
    names = [directory.resolve().name for directory in directories]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"report: two runs are named {', '.join(sorted(twice))}; rename one.")
    entries: list[Entry] = []
    for directory, name in zip(directories, names, strict=True):
        entries += _entries_of(directory, name, margin)
    return entries


def _entries_of(directory: Path, run: str, margin: float | None) -> Iterator[Entry]:
    lineage = saved_lineage(directory)
    if lineage is None:
        raise UserError(f"{directory}: no {RECIPE_FILE} there. Give the directory of a run.")
    recipe = lineage.recipe
    evaluated = read_evaluations(directory, lineage)
    if TEACHER not in evaluated or len(evaluated) < 2:
        raise UserError(
            f"{directory}: evaluations of the teacher and of a student are not there yet; "
            "run 'evaluate'."
        )
    try:
        check_measured_alike(evaluated)
    except EvalError as error:
        raise UserError(f"{directory}: {error}") from None
    teacher = read_results(recipe, evaluated[TEACHER])
    for name, artifact in evaluated.items():
        if name == TEACHER:
            continue
        pairs = pair_results(teacher, read_results(recipe, artifact))
        compared = compare(f"{run}/{name}", pairs, ALPHAS)
        chosen = recipe.report.margin if margin is None else margin
        yield Entry(
            name=f"{run}/{name}",
            role=role_of(recipe, name),
            teacher=teacher_name(recipe.teacher),
            comparison=measure(compared, ALPHAS, chosen),
            state_bytes=_state_bytes(directory, lineage, name),
            tokens=trained_tokens(recipe, name),
            asked=artifact.manifest["results"]["requests_hash"],
        )


def read_evaluations(directory: Path, lineage: Lineage) -> dict[str, Artifact]:
    """Return the published evaluations of a run's models, the teacher's first."""
    found = {}
    for name in lineage.evaluated_models():
        path = directory / "artifacts" / "evaluate" / name
        if (path / MANIFEST).is_file():
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            found[name] = Artifact(path, manifest)
    return found


def trained_tokens(recipe: Recipe, model: str) -> int:
    """Tokens of text that a student was trained on: alignment, and its expert or all of them."""
    experts, refine = recipe.distill.experts, recipe.refine
    chosen = [model] if model in experts else list(experts)  # every merge has all of them
    found = recipe.align.tokens + sum(experts[name].tokens for name in chosen)
    if refine is not None:
        refined = refine.refined(recipe.distill)
        found += refine.tokens * sum(name in refined for name in chosen)
    return found


def _state_bytes(directory: Path, lineage: Lineage, model: str) -> int | None:
    """Bytes that decoding holds for one sequence; None where the student's files are gone.

    Where heads keep full attention, of a sequence as long as the recipe's context.
    """
    file = directory / "artifacts" / lineage.model_label(model) / "model" / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # A student's shapes are its teacher's, and so is its type but for the prefix.
    config["model_type"] = str(config["model_type"]).removeprefix("xlstm_")
    recipe = lineage.recipe
    number = DTYPE_BYTES[recipe.teacher.dtype]
    a, mixer = read_architecture(config, str(file)), recipe.student.mixer
    kept = recipe.data.context * kept_bytes_per_token(a, mixer, number)
    return int(student_cache(a, mixer, number)) + kept

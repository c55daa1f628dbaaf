"""Score merges on validation items, which the evaluation never asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xlstm_distill.artifacts.files import write_text
from xlstm_distill.embedded.tasks import TASKS
from xlstm_distill.embedded.validation import validation_files, validation_name
from xlstm_distill.errors import UserError
from xlstm_distill.merging.search import Score, require_optuna
from xlstm_distill.models.families import CausalLM
from xlstm_distill.models.teacher import load_tokenizer
from xlstm_distill.recipe import Recipe
from xlstm_distill.recipe.merging import Tuning, embedded_domains
from xlstm_distill.runtime.ranks import from_rank_zero, is_main_process
from xlstm_distill.stages.evaluate import AllRanks, suite_of
from xlstm_distill.stages.weights.material import recipe_key
from xlstm_eval.harness import Session, evaluate_model, help_to_evaluate
from xlstm_eval.loading import LoadedSuite, load_suite, shared_data
from xlstm_eval.metrics import mean_recovery, no_evidence, pair_results, required_tolerance
from xlstm_eval.records import TaskPair, TaskResult
from xlstm_eval.suites import Suite

FOLDER = "validation"


class Validator:
    """Asks models the validation items; all ranks must call each method.

    The suite is read on rank 0, once. `work` holds generated items and the batch size that fits.
    `key` is the merge's recipe key, for messages.

    Raises:
        UserError: a task is held out.
        EvalError: a task cannot be loaded.
    """

    def __init__(
        self, recipe: Recipe, tuning: Tuning, tokenizer: Any, work: Path, key: str
    ) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        batch = recipe.evaluate.batch
        self.session = Session(
            batch_size=None if batch == "auto" else batch,
            sizes=work / "batch",
            ranks=AllRanks(),
        )
        self._suite: LoadedSuite | None = None

        def load() -> None:
            check_held_out(recipe, tuning, key)
            self._suite = load_suite(validation_suite(recipe, tuning, work / FOLDER), tokenizer)

        from_rank_zero(load)

    def ask(self, model: CausalLM) -> list[dict[str, Any]]:
        """Score a model; the tasks' results as plain values, on every rank."""
        # The step of `evaluate_model` that rank 0 alone takes comes after all answers.
        found: list[dict[str, Any]] = []
        if is_main_process():
            assert self._suite is not None
            result = evaluate_model(
                model.eval(),
                self.tokenizer,
                self._suite,
                replace(self.session),
                seed=self.recipe.seed,
            )
            found = [task.model_dump(mode="json") for task in result.tasks]
        else:
            help_to_evaluate(model.eval(), self.tokenizer, self.session)
        return from_rank_zero(lambda: found)


def judge(teacher: Sequence[dict[str, Any]], student: Sequence[dict[str, Any]]) -> Score:
    """Score a merge: its worst required tolerance, then its mean recovery.

    Raises:
        UserError: the teacher shows nothing on any of the tasks.
    """
    pairs = pair_results(
        [TaskResult(**task) for task in teacher], [TaskResult(**task) for task in student]
    )
    counted = [pair for pair in pairs if no_evidence(pair) is None]
    if not counted:
        raise UserError(
            "merge.tuning.tasks: the teacher is at chance or at 0 on all of them; name others."
        )
    worst = max(counted, key=required_tolerance)
    return Score(
        float(required_tolerance(worst)),
        -(mean_recovery(counted) or 0.0),
        tolerance_error(worst),
        worst.task,
        item_losses(worst),
    )


def tolerance_error(pair: TaskPair) -> float:
    """The standard error of a required tolerance, over the items, given the teacher's score.

    All merges have the same teacher, so its noise does not tell them apart.
    """
    error = pair.student_stderr or 0.0
    if pair.samples is not None:
        # No right answer at all has an error too: that of one item.
        error = max(error, 1 / pair.samples)
    if pair.higher_is_better:
        return error / pair.teacher
    return error * pair.teacher / pair.student**2 if pair.student else 0.0


def item_losses(pair: TaskPair) -> tuple[float, ...]:
    """What each item adds to a required tolerance, given the teacher's score.

    Of a score that is better when lower, to first order in the student's.
    """
    if pair.student_items is None:
        return ()
    if pair.higher_is_better:
        return tuple(1 - item / pair.teacher for item in pair.student_items)
    slope = pair.teacher / pair.student**2 if pair.student else 0.0
    return tuple(item * slope for item in pair.student_items)


def validation_suite(recipe: Recipe, tuning: Tuning, folder: Path) -> Suite:
    """The tasks that weights are tuned on; generated items are written into `folder`.

    They are asked as the evaluation asks: with its chat template.
    """
    if tuning.tasks is not None:
        tasks = [task.model_dump() for task in tuning.tasks]
        include = tuning.include
    else:
        tasks = _write_embedded(recipe, tuning.items, folder)
        include = str(folder)
    return suite_of(recipe, {"tasks": tasks, "include": include, "limit": tuning.items})


def _write_embedded(recipe: Recipe, count: int, folder: Path) -> list[dict[str, Any]]:
    domains = embedded_domains(recipe.data)
    generators = {name for names in domains.values() for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in validation_files(generators, count, recipe.seed).items():
        write_text(folder / name, content)
    chosen = [task for task in TASKS.values() if task.domain in generators]
    return [{"name": validation_name(task), "domain": task.domain} for task in chosen]


def check_tuning(recipe: Recipe, label: str, tuning: Tuning) -> None:
    """Check, before anything is trained, that weights can be tuned.

    Raises:
        UserError: optuna is not installed, or a task is held out.
        EvalError: a task cannot be loaded.
    """
    require_optuna()
    check_held_out(recipe, tuning, recipe_key(label))


def check_held_out(recipe: Recipe, tuning: Tuning, key: str) -> None:
    """Refuse validation tasks that read the same data as a task of the evaluation.

    Both are loaded; nothing is asked. Generated items are new problems and need no check.

    Raises:
        UserError: names the first such pair.
    """
    if tuning.tasks is None:
        return
    tokenizer = load_tokenizer(recipe.teacher)
    validation = load_suite(validation_suite(recipe, tuning, Path()), tokenizer)
    evaluation = load_suite(suite_of(recipe), tokenizer)
    for first, second in shared_data(validation, evaluation):
        raise UserError(
            f"{key}.tuning.tasks: {first!r} reads the same items as {second!r} of evaluate.tasks, "
            "which must stay held out; name a task of other data, or of another split."
        )

"""Merges of several runs side by side, over their seeds, each against one teacher."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xlstm_distill.artifacts import Artifact, Run
from xlstm_distill.errors import UserError
from xlstm_distill.recipe import Recipe
from xlstm_distill.stages.measuring.compare import read_evaluations
from xlstm_distill.stages.outline import MERGED, TEACHER
from xlstm_distill.stages.report import read_results
from xlstm_distill.stages.status.comparison import saved_lineage
from xlstm_distill.stages.status.reading import read_status
from xlstm_eval.metrics import ALPHAS, compare, pair_results
from xlstm_eval.protocol import require_same_protocol
from xlstm_eval.records import Comparison, EvalError, Interval, Statistics, TaskResult
from xlstm_eval.report.data import ReportModel
from xlstm_eval.report.merging import expert_of
from xlstm_eval.results import require_same_requests
from xlstm_eval.statistics.measure import measure
from xlstm_eval.statistics.seeds import Estimate, Students, mean_of, over_seeds

UNIFORM, BEST = "uniform", "best expert per domain"
SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class FinishedRun:
    """What is read of one run: its models' results, and the hashes of its aligned student."""

    name: str
    seed: int
    teacher: tuple[TaskResult, ...]
    students: dict[str, tuple[TaskResult, ...]]
    weights: dict[str, dict[str, float]]
    aligned: dict[str, str]
    asked: str
    protocol: dict[str, object]


@dataclass(frozen=True)
class Figure:
    """A figure of the paper's metric: its value, and its interval by items."""

    title: str
    value: Callable[[Comparison], float]
    interval: Callable[[Statistics], Interval | None]


FIGURES = (
    Figure("C_0", lambda c: c.win_and_tie["0.0"], lambda s: (s.win_and_tie or {}).get("0.0")),
    Figure("C_0.05", lambda c: c.win_and_tie["0.05"], lambda s: (s.win_and_tie or {}).get("0.05")),
    Figure("α*", lambda c: c.critical_tolerance, lambda s: s.critical_tolerance),
    Figure("α* at .75", lambda c: c.critical_tolerance_75, lambda s: s.critical_tolerance_75),
    Figure("worst drop", lambda c: c.worst_drop, lambda s: s.worst_drop),
)
COMPARED = (FIGURES[2], FIGURES[4])
"""Figures whose difference from the uniform merge is shown."""


def merge_tables(folders: Sequence[Path]) -> str:
    """Return tables in Markdown of finished runs: methods as rows, 95 % intervals.

    Recovery by domain, the paper's metric, differences from the uniform merge, weights that were
    found. A run with a single expert is a row of that expert's name. Raises UserError: a run is
    not finished, two of a seed have other aligned students or one method, or they were asked or
    answered otherwise.
    """
    try:
        return "\n".join(Table([read_run(folder) for folder in folders]).lines())
    except EvalError as error:
        raise UserError(str(error)) from None


def read_run(folder: Path) -> FinishedRun:
    """Read a finished run. Raises UserError: it is none, or is not finished."""
    lineage = saved_lineage(folder)
    if lineage is None:
        raise UserError(f"{folder}: no recipe there. Give the directory of a finished run.")
    # Evaluations of an earlier recipe would be taken for those of this one.
    for status in read_status(folder):
        if status.label.startswith("evaluate/") and status.state in ("outdated", "waiting"):
            why = f" ({status.why})" if status.why else ""
            raise UserError(f"{folder}: {status.label} is {status.state}{why}; finish the run.")
    recipe, evaluated = lineage.recipe, read_evaluations(folder, lineage)
    results = {name: read_results(recipe, artifact) for name, artifact in evaluated.items()}
    made = Run(folder, recipe)
    aligned = made.load("align")
    if TEACHER not in results or MERGED not in results or aligned is None:
        raise UserError(f"{folder}: teacher, merge or aligned student is missing; finish the run.")
    facts = evaluated[TEACHER].manifest["results"]
    require_same_requests(
        {name: own.manifest["results"]["requests_hash"] for name, own in evaluated.items()}
    )
    return FinishedRun(
        name=folder.name,
        seed=recipe.seed,
        teacher=results.pop(TEACHER),
        students=_students(recipe, results),
        weights=_weights(recipe, made),
        aligned=_hashes(aligned),
        asked=facts["requests_hash"],
        # Each seed answers under its own; greedy answers do not depend on it.
        protocol={key: own for key, own in facts.get("protocol", {}).items() if key != "seed"},
    )


def _hashes(artifact: Artifact) -> dict[str, str]:
    files = artifact.files
    return {name: files[name]["sha256"] for name in files if name.endswith(".safetensors")}


def _students(
    recipe: Recipe, results: dict[str, tuple[TaskResult, ...]]
) -> dict[str, tuple[TaskResult, ...]]:
    """Results by method: merges by name, then for each task those of its domain's own expert."""
    merge, experts = recipe.merge, recipe.distill.experts
    if len(experts) == 1:
        return {next(iter(experts)): results[MERGED]}
    is_uniform = merge.method == "linear" and merge.weights == UNIFORM
    found = {UNIFORM if is_uniform else MERGED: results[MERGED]}
    found |= {name: results[name] for name in merge.variants if name in results}
    models = []
    for name, expert in experts.items():
        if name in results:
            domains = tuple(itertools.chain.from_iterable(p.domains for p in expert.phases))
            models.append(
                ReportModel(name=name, role="expert", results=results[name], domains=domains)
            )
    own = []
    for index, task in enumerate(results[MERGED]):
        expert_model = expert_of(task.domain, models)
        if expert_model is not None:
            own.append(expert_model.results[index])
    return {BEST: tuple(own), **found} if len(own) == len(results[MERGED]) else found


def _weights(recipe: Recipe, run: Run) -> dict[str, dict[str, float]]:
    """Weights that a search or a training has found: by merge, means over layer groups."""
    found = {}
    for name, variant in recipe.merge.variants.items():
        artifact = run.load(f"variant/{name}") if variant.found else None
        if artifact is not None:
            groups = artifact.manifest["results"]["weights"]
            groups = groups if isinstance(groups, list) else [groups]
            found[name] = {
                expert: statistics.fmean(group[expert] for group in groups)
                for expert in recipe.distill.experts
            }
    return found


class Table:
    """The students of all runs by method and seed, each against the teacher."""

    def __init__(self, runs: Sequence[FinishedRun]) -> None:
        check(runs)
        self.runs = runs
        found: dict[str, dict[int, Comparison]] = {}
        for run in runs:
            for method, results in run.students.items():
                seeds = found.setdefault(method, {})
                if run.seed in seeds:
                    raise UserError(f"{run.name}: {method} of seed {run.seed} is there twice.")
                compared = compare(method, pair_results(run.teacher, results), ALPHAS)
                seeds[run.seed] = measure(compared)
        self.methods = {method: dict(sorted(seeds.items())) for method, seeds in found.items()}
        pairs = next(iter(runs[0].students.values()))
        first = compare("", pair_results(runs[0].teacher, pairs), ALPHAS)
        self.apart = first.apart
        self.domains: dict[str, list[str]] = {}
        for pair in first.counted():
            self.domains.setdefault(pair.domain or "other", []).append(pair.task)
        self.tasks = [pair.task for pair in first.counted()]
        if not self.tasks:
            raise UserError("merges: the teacher has nothing to lose on any task.")

    def columns(self) -> dict[str, list[str]]:
        """Tasks of each domain, then all of them."""
        return {**self.domains, "mean": self.tasks}

    def lines(self) -> Iterator[str]:
        """Yield the lines of all tables."""
        seeds = sorted({run.seed for run in self.runs})
        items = sorted({result.samples for result in self.runs[0].teacher})
        counts = " to ".join(str(n) for n in dict.fromkeys((items[0], items[-1])))
        yield (
            f"{len(self.tasks)} tasks of {counts} items, the same for all students; seeds "
            f"{', '.join(map(str, seeds))}. In brackets: 95 % intervals, with the noise of seeds "
            "and of items."
        )
        if self.apart:
            yield f"Left out: {'; '.join(f'{task}: {why}' for task, why in self.apart.items())}."
        yield from self._recoveries()
        yield from self._metric()
        if UNIFORM in self.methods:
            yield from self._differences()
        yield from self._found_weights()

    def _recoveries(self) -> Iterator[str]:
        yield from _head("Recovery, % of the teacher's score", ["", "seeds", *self.columns()])
        for method, seeds in self.methods.items():
            students = Students(list(seeds.values()))
            cells = [percent(students.recovery(own)) for own in self.columns().values()]
            yield _row(method, str(len(seeds)), *cells)

    def _metric(self) -> Iterator[str]:
        titles = [figure.title for figure in FIGURES]
        yield from _head("The paper's metric, means over seeds", ["", *titles])
        for method, seeds in self.methods.items():
            found = list(seeds.values())
            yield _row(method, *(_number(_estimate(found, figure)) for figure in FIGURES))

    def _differences(self) -> Iterator[str]:
        titles = [*self.columns(), *(figure.title for figure in COMPARED)]
        yield from _head("Difference from the uniform merge, points", ["", *titles])
        for method, seeds in self.methods.items():
            shared = [seed for seed in seeds if seed in self.methods[UNIFORM]]
            if method == UNIFORM or not shared:
                continue
            ours = [seeds[seed] for seed in shared]
            theirs = [self.methods[UNIFORM][seed] for seed in shared]
            students, others = Students(ours), Students(theirs)
            cells = [points(students.gain(others, own)) for own in self.columns().values()]
            for figure in COMPARED:
                pairs = zip(ours, theirs, strict=True)
                changes = [figure.value(after) - figure.value(before) for after, before in pairs]
                cells.append(points(over_seeds(changes)))
            yield _row(method, *cells)

    def _found_weights(self) -> Iterator[str]:
        names = sorted({name for run in self.runs for name in run.weights})
        if not names:
            return
        experts = next(iter(run.weights[names[0]] for run in self.runs if run.weights))
        yield from _head("Weights that were found", ["", "seed", *experts])
        for name, run in itertools.product(names, self.runs):
            if name in run.weights:
                own = run.weights[name]
                yield _row(name, str(run.seed), *(f"{own[expert]:.2f}" for expert in experts))


def check(runs: Sequence[FinishedRun]) -> None:
    """Raise UserError unless all answered the same, and runs of a seed have one aligned student."""
    first = runs[0]
    aligned = {run.seed: run for run in reversed(runs)}
    for run in runs:
        if run.aligned != aligned[run.seed].aligned:
            other = aligned[run.seed].name
            raise UserError(
                f"{run.name}: its aligned student is not that of {other}, of the same seed."
            )
        if [task.items for task in run.teacher] != [task.items for task in first.teacher]:
            raise UserError(
                f"{run.name}: its teacher answered otherwise than that of {first.name}."
            )
    # The first counts as the teacher of all.
    names = {TEACHER: first} | {run.name: run for run in runs}
    require_same_requests({name: run.asked for name, run in names.items()})
    require_same_protocol({name: run.protocol for name, run in names.items()})


def _estimate(seeds: Sequence[Comparison], figure: Figure) -> Estimate:
    intervals = []
    for seed in seeds:
        assert seed.statistics is not None
        intervals.append(figure.interval(seed.statistics))
    known = [interval for interval in intervals if interval is not None]
    items = mean_of(known) if len(known) == len(seeds) else None
    return over_seeds([figure.value(seed) for seed in seeds], items, SHARE)


def _head(title: str, cells: Sequence[str]) -> Iterator[str]:
    yield from ("", f"**{title}**", "", _row(*cells), "|---" * len(cells) + "|")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def one_student(teacher: Sequence[TaskResult], results: Sequence[TaskResult]) -> Students:
    """Return what one seed says, for recoveries and differences with intervals of items alone."""
    return Students([compare("student", pair_results(teacher, results), ALPHAS)])


def percent(found: Estimate) -> str:
    """Write a share in percent, with its interval."""
    return _cell(found, lambda value: f"{100 * value:.1f}")


def points(found: Estimate) -> str:
    """Write a difference of shares in points, with its interval."""
    return _cell(found, lambda value: f"{100 * value:+.1f}")


def _number(found: Estimate) -> str:
    return _cell(found, lambda value: f"{value:.2f}")


def _cell(found: Estimate, shown: Callable[[float], str]) -> str:
    if found.interval is None:
        return shown(found.value)
    low, high = (shown(end) for end in found.interval)
    return f"{shown(found.value)} [{low}, {high}]"

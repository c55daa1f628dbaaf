"""How often the 95 % intervals of the metric hold the truth, and how wide they are, by simulation.

``python tests/helpers/interval_coverage.py [REPETITIONS] [--results FILE]`` prints the table of
docs/metric.md: 1,000 evaluations a row take twelve minutes of a processor. With a file, finished
blocks of 250 evaluations are kept there. They are simulated again only if their row or the code has
changed, so a run may be stopped, continued and enlarged.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from xlstm_eval.records import Interval
from xlstm_eval.statistics import bootstrap, paired, pooled, ranks
from xlstm_eval.statistics.paired import PairedItems
from xlstm_eval.statistics.pooled import decide

COLUMNS = ("α*", "α* at .75", "worst drop", "C(.05)", "recovery", "mean recovery", "kept", "inside")
"""The last is C(.05) again: an end at the truth counts half, unless it is 0 or 1."""
WIDTHS = COLUMNS[:4]
BLOCK = 250
DRAWS = 1000
"""Draws of each task's loss. `score` takes 10,000, which only makes its ends less noisy."""

Ends = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scenario:
    """Known tasks: the teacher's true scores, the shares that the student truly loses, items.

    ``luck`` is the share of items that the student alone has right. ``scores`` says what an item's
    score is: "right or wrong"; "judge" (1 to 10, more or less) or "perplexity" (lower is better).
    """

    name: str
    teacher: Sequence[float]
    losses: Sequence[float]
    items: Sequence[int]
    luck: Sequence[float] | float = 0.03
    scores: str = "right or wrong"

    def cells(self) -> np.ndarray:
        """Return the probabilities of the four outcomes of each task: (J, 4)."""
        teacher, losses = np.array(self.teacher), np.array(self.losses)
        luck = np.broadcast_to(self.luck, teacher.shape)
        alone = teacher * losses + luck
        found = np.stack([teacher - alone, alone, luck, 1 - teacher - luck], 1)
        assert (found >= 0).all(), self.name
        return found.clip(0) / found.sum(1, keepdims=True)

    def kept(self) -> float:
        """Return the true share that the decision over all tasks is about."""
        if self.scores == "judge":
            return 1 - float(np.mean(self.losses))
        if self.scores == "perplexity":
            return float(np.mean(2 - 1 / (1 - np.array(self.losses))))
        cells = self.cells()
        return float((cells[:, 0] + cells[:, 2]).sum() / (cells[:, 0] + cells[:, 1]).sum())

    def evaluate(self, rng: np.random.Generator) -> list[PairedItems]:
        """Draw the answers of one evaluation."""
        if self.scores == "right or wrong":
            pairs = zip(self.items, self.cells(), strict=True)
            return [Counted.of_cells(rng.multinomial(n, own)) for n, own in pairs]
        return [self._scored(n, loss, rng) for n, loss in zip(self.items, self.losses, strict=True)]

    def _scored(self, count: int, loss: float, rng: np.random.Generator) -> PairedItems:
        """Draw real scores, skewed, with the student's mean at its share of the teacher's."""
        if self.scores == "judge":
            teacher = rng.gamma(6.0, 1.0, count)
            student = (1 - loss) * teacher + rng.normal(0, 1.2, count)
            return PairedItems("t", teacher, student, True)
        teacher = rng.lognormal(2.0, 0.5, count)
        student = teacher / (1 - loss) * rng.lognormal(-0.02, 0.2, count)
        return PairedItems("t", teacher, student, False)


@dataclass(frozen=True)
class Counted(PairedItems):
    """Zeros and ones of which only the counts are needed: thousands of evaluations take less."""

    outcomes: tuple[int, int, int, int] = (0, 0, 0, 0)

    @classmethod
    def of_cells(cls, outcomes: Sequence[int]) -> Counted:
        """Hold items with the given numbers of the four outcomes."""
        both, teacher_only, student_only, neither = (int(number) for number in outcomes)
        none = np.empty(0)
        return cls("t", none, none, True, (both, teacher_only, student_only, neither))

    @property
    def count(self) -> int:
        return sum(self.outcomes)

    @property
    def is_binary(self) -> bool:
        return True

    def cells(self) -> tuple[int, int, int, int]:
        return self.outcomes


def scenarios() -> list[Scenario]:
    """Return what a suite may look like, mild and hostile."""
    fifteen = np.linspace(0.6, 0.93, 15)[np.random.default_rng(0).permutation(15)]
    bell = np.sort(np.random.default_rng(11).standard_normal(15))
    sizes = np.geomspace(60, 5000, 15).astype(int)
    one_bad = np.append(np.full(14, 0.02), 0.4)
    sixty = np.random.default_rng(1).normal(0.04, 0.04, 60).clip(-0.03)
    alike = Scenario("15 tasks, all lose 3 %", fifteen, [0.03] * 15, [200] * 15)
    even = replace(alike, teacher=[0.8] * 15)
    small = 0.2 + 0.2 * bell.clip(-1.5, 1.5)
    ties = Scenario(
        "8 of 15 tasks tie on all items", [0.8] * 15, [0.0] * 8 + [0.08] * 7, [200] * 15
    )
    few = np.array([0.0] * 7 + [0.4] * 8)
    # As the quickstart's tasks, and as the paper's: some hard, some easy, of all sizes.
    wide = np.linspace(0.3, 0.95, 22)[np.random.default_rng(2).permutation(22)]
    graded = np.linspace(0.0, 0.12, 22)[np.random.default_rng(3).permutation(22)]
    quick = Scenario("22 tasks of 50 items, losses of 0 to 12 %", wide, graded, [50] * 22)
    groups = np.array([0.01] * 14 + [0.08] * 8)
    paper_sizes = np.geomspace(200, 5000, 15).astype(int)[np.random.default_rng(4).permutation(15)]
    paper = Scenario("15 tasks of 200 to 5,000 items", wide[:15], 0.05 + 0.04 * bell, paper_sizes)
    return [
        quick,
        replace(quick, name="22 tasks of 200 items, losses of 0 to 12 %", items=[200] * 22),
        replace(quick, name="22 tasks of 500 items, losses of 0 to 12 %", items=[500] * 22),
        replace(quick, name="14 lose 1 %, 8 lose 8 %", losses=groups, items=[500] * 22),
        replace(
            quick, name="22 tasks of 200 items, all lose 4 %", losses=[0.04] * 22, items=[200] * 22
        ),
        paper,
        replace(paper, name="200 to 5,000 items, one loses 40 %", losses=one_bad),
        alike,
        replace(alike, name="15 tasks, losses near 3 %", losses=0.03 + 0.012 * bell),
        replace(alike, name="15 tasks, losses of -3 to 9 %", losses=0.03 + 0.03 * bell),
        replace(alike, name="15 tasks, losses of 0 to 30 %", losses=np.linspace(0, 0.3, 15)),
        replace(alike, name="one of 15 tasks loses 40 %", losses=one_bad),
        Scenario("60 to 5,000 items, large tasks lose most", fifteen, 0.03 + 0.03 * bell, sizes),
        Scenario("60 to 5,000 items, small ones lose most", fifteen, 0.03 - 0.03 * bell, sizes),
        Scenario("15 tasks of 30 items", fifteen, 0.05 + 0.03 * bell, [30] * 15),
        Scenario("3 tasks", fifteen[:3], [0.0, 0.03, 0.1], [200] * 3),
        Scenario("5 tasks", fifteen[:5], [0.0, 0.02, 0.051, 0.08, 0.2], [200] * 5),
        Scenario("a teacher at 99 %", [0.99] * 15, 0.02 + 0.01 * bell.clip(-1), [100] * 15, 0.005),
        Scenario("a teacher at 6 %", [0.06] * 15, small, [400] * 15, 0.015),
        replace(ties, luck=[0.0] * 8 + [0.03] * 7),
        # Half of the tasks lose 2 %; the others about 2, 4 and 8 standard errors more.
        replace(even, name="7 lose 2 %, 8 lose 8 %", losses=[0.02] * 7 + [0.08] * 8),
        replace(even, name="7 lose 2 %, 8 lose 14 %", losses=[0.02] * 7 + [0.14] * 8),
        replace(even, name="8 lose 2 %, 7 lose 14 %", losses=[0.02] * 8 + [0.14] * 7),
        replace(even, name="7 lose 0 %, 8 lose 40 %, 30 items", losses=few, items=[30] * 15),
        replace(even, name="11 lose 2 %, 4 lose 26 %", losses=[0.02] * 11 + [0.26] * 4),
        Scenario("judge's scores, 60 items", [0.0] * 15, 0.04 + 0.04 * bell, [60] * 15, 0, "judge"),
        Scenario("perplexity", [0.0] * 15, 0.04 + 0.04 * bell, [60] * 15, 0, "perplexity"),
        Scenario("60 tasks of 500 items", np.resize(fifteen, 60), sixty, [500] * 60),
    ]


def simulate(
    case: Scenario,
    repetitions: int,
    draws: int = DRAWS,
    seed: int = 5,
    ranked: Callable[[np.ndarray, np.ndarray], Ends] = ranks.ranked_intervals,
) -> tuple[list[float], list[float]]:
    """Return how often the interval of each of COLUMNS holds the truth, and the mean WIDTHS."""
    truth = np.sort(np.asarray(case.losses, float))
    count = len(truth)
    places = (math.ceil(count / 2), math.ceil(3 * count / 4), count)
    true = [max(0.0, truth[rank - 1]) for rank in places]
    rate = float((truth <= 0.05).mean())
    true += [rate, case.losses[0], truth.mean(), case.kept()]
    held, widths = np.zeros(len(COLUMNS)), np.zeros(len(WIDTHS))
    rng = np.random.default_rng(seed)
    for _ in range(repetitions):
        tasks = case.evaluate(rng)
        drawn = np.stack([bootstrap.draw_losses(task, rng, draws) for task in tasks], axis=1)
        losses = np.array([estimate(task) for task in tasks])
        of_ranks = [bootstrap.draw_losses(task, rng, draws, bootstrap.RANKED) for task in tasks]
        low, high = ranked(losses, np.stack(of_ranks, axis=1))
        found = [ranks.tolerance_interval(low, high, rank) for rank in places]
        found.append(ranks.rate_intervals(low, high, [0.05])["0.05"])
        found.append(bootstrap.percentile_interval(drawn[:, 0]))
        found.append(bootstrap.mean_ratio_interval(drawn, float(losses.mean())))
        found.append(decide(tasks).kept_interval or (0.0, 9.0))
        # The true loss of a tie is 0 exactly, and rounding must not decide about it.
        ends = zip(found, true, strict=True)
        holds = [low - 1e-12 <= value <= high + 1e-12 for (low, high), value in ends]
        held += [*holds, inside(found[COLUMNS.index("C(.05)")], rate)]
        widths += [high - low for low, high in found[: len(WIDTHS)]]
    return list(held / repetitions), list(widths / repetitions)


def inside(interval: Interval, rate: float) -> float:
    """Tell how far an interval of C holds a rate: half where an end that could be worse is it."""
    low, high = interval
    if not low <= rate <= high:
        return 0.0
    return 0.5 ** sum(end == rate and end not in (0.0, 1.0) for end in (low, high))


def estimate(task: PairedItems) -> float:
    """Return the task's loss as `score` does."""
    if isinstance(task, Counted):
        both, teacher_only, student_only, _ = task.outcomes
        # Without a right answer of the teacher, a task would be listed apart.
        return (teacher_only - student_only) / max(both + teacher_only, 1)
    above, below = task.student.mean(), task.teacher.mean()
    return float(1 - (above / below if task.higher_is_better else below / above))


def coverage(case: Scenario, repetitions: int, draws: int = DRAWS, seed: int = 5) -> list[float]:
    """Return, for each of COLUMNS, how often its interval holds the truth."""
    return simulate(case, repetitions, draws, seed)[0]


def paired_items(counts: Sequence[int]) -> PairedItems:
    """Make items with the given numbers of the four outcomes."""
    teacher = np.repeat([1.0, 1.0, 0.0, 0.0], counts)
    student = np.repeat([1.0, 0.0, 1.0, 0.0], counts)
    return PairedItems("task", teacher, student, True)


def identity(case: Scenario, block: int) -> str:
    """Return a hash of all that the figures of a row's block depend on."""
    told = [repr(case), f"{block} of {BLOCK}", inspect.getsource(Scenario)]
    told += [inspect.getsource(simulate), *map(code_of, (bootstrap, paired, pooled, ranks))]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def code_of(module: ModuleType) -> str:
    """Return a module's code without comments and docstrings, which change no figure."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    return ast.dump(tree)


def read_results(path: Path | None) -> dict[str, list[list[float]]]:
    """Return the finished blocks, by identity."""
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["identity"]: row["found"] for row in rows}


def main() -> None:
    """Simulate block after block of all rows, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repetitions", nargs="?", type=int, default=1000)
    parser.add_argument("--results", type=Path, help="JSON lines, one for each finished block")
    options = parser.parse_args()
    blocks, known = math.ceil(options.repetitions / BLOCK), read_results(options.results)
    cases = scenarios()
    for block, case in itertools.product(range(blocks), cases):
        key = identity(case, block)
        if key in known:
            continue
        known[key] = [*simulate(case, BLOCK, seed=block)]
        if options.results:
            row = {"name": case.name, "block": block, "identity": key, "found": known[key]}
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"block {block + 1} of {blocks}: {case.name}", file=sys.stderr, flush=True)
    count = blocks * BLOCK
    error = 100 * math.sqrt(0.95 * 0.05 / count)
    print(f"Coverage in %, of {count} evaluations; in brackets mean widths.")
    print(f"Monte-Carlo standard error at 95 %: {error:.2f} points.")
    print("| known students |", " | ".join(COLUMNS), "|")
    print("|---|" + "---|" * len(COLUMNS))
    for case in cases:
        found = [known[identity(case, block)] for block in range(blocks)]
        shares, widths = (np.mean(part, axis=0) for part in zip(*found, strict=True))
        print(row_text(case.name, shares, widths))


def row_text(name: str, shares: Sequence[float], widths: Sequence[float]) -> str:
    """Write a row of the table."""
    cells = [f"{100 * share:.1f}" for share in shares]
    for place, width in enumerate(widths):
        cells[place] += f" ({width:.3f})"
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()

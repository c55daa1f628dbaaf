"""How often the 95 % intervals of the metric hold the truth, by simulation.

``python tests/helpers/interval_coverage.py [REPETITIONS]`` prints the table of docs/metric.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xlstm_eval.statistics import bootstrap, paired
from xlstm_eval.statistics.paired import PairedItems
from xlstm_eval.statistics.pooled import decide

COLUMNS = ("α*", "α* at .75", "worst drop", "C(.05)", "recovery", "mean recovery", "kept")


@dataclass(frozen=True)
class Scenario:
    """Known tasks: the teacher's true scores, the shares that the student truly loses, items.

    ``luck`` is the share of items that the student alone has right.
    """

    name: str
    teacher: Sequence[float]
    losses: Sequence[float]
    items: Sequence[int]
    luck: float = 0.03

    def cells(self) -> np.ndarray:
        """Return the probabilities of the four outcomes of each task: (J, 4)."""
        teacher, losses = np.array(self.teacher), np.array(self.losses)
        alone = teacher * losses + self.luck
        both = teacher - alone
        found = np.stack([both, alone, np.full_like(both, self.luck), 1 - teacher - self.luck], 1)
        assert (found >= 0).all(), self.name
        return found


def scenarios() -> list[Scenario]:
    """Return what a suite may look like, from a student that loses the same share everywhere."""
    fifteen = np.linspace(0.6, 0.93, 15)[np.random.default_rng(0).permutation(15)]
    bell = np.sort(np.random.default_rng(11).standard_normal(15))
    sizes = np.geomspace(60, 5000, 15).astype(int)
    one_bad = np.append(np.full(14, 0.02), 0.4)
    sixty = np.random.default_rng(1).normal(0.04, 0.04, 60).clip(-0.03)
    return [
        Scenario("15 tasks, all lose 3 %", fifteen, [0.03] * 15, [200] * 15),
        Scenario("15 tasks, losses near 3 %", fifteen, 0.03 + 0.012 * bell, [200] * 15),
        Scenario("15 tasks, losses of -3 to 9 %", fifteen, 0.03 + 0.03 * bell, [200] * 15),
        Scenario("15 tasks, losses of 0 to 30 %", fifteen, np.linspace(0, 0.3, 15), [200] * 15),
        Scenario("one of 15 tasks loses 40 %", fifteen, one_bad, [200] * 15),
        Scenario("60 to 5,000 items a task", fifteen, 0.03 + 0.03 * bell, sizes),
        Scenario("15 tasks of 30 items", fifteen, 0.05 + 0.03 * bell, [30] * 15),
        Scenario("5 tasks", fifteen[:5], [0.0, 0.02, 0.05, 0.08, 0.2], [200] * 5),
        Scenario("60 tasks", np.resize(fifteen, 60), sixty, [500] * 60),
        Scenario("a teacher at 99 %", [0.99] * 15, 0.02 + 0.01 * bell.clip(-1), [100] * 15, 0.005),
    ]


def paired_items(counts: Sequence[int]) -> PairedItems:
    """Make items with the given numbers of the four outcomes."""
    teacher = np.repeat([1.0, 1.0, 0.0, 0.0], counts)
    student = np.repeat([1.0, 0.0, 1.0, 0.0], counts)
    return PairedItems("task", teacher, student, True)


def coverage(case: Scenario, repetitions: int, draws: int = 1000, seed: int = 5) -> list[float]:
    """Return, for each of COLUMNS, how often its interval holds the truth."""
    rng = np.random.default_rng(seed)
    cells, truth = case.cells(), np.sort(np.asarray(case.losses, float))
    count = len(truth)
    ranks = (math.ceil(count / 2), math.ceil(3 * count / 4), count)
    kept = (cells[:, 0] + cells[:, 2]).sum() / (cells[:, 0] + cells[:, 1]).sum()
    held = np.zeros(len(COLUMNS))
    for _ in range(repetitions):
        outcomes = [rng.multinomial(n, own) for n, own in zip(case.items, cells, strict=True)]
        tasks = [paired_items(outcome) for outcome in outcomes]
        drawn = np.stack([bootstrap.draw_losses(task, rng, draws) for task in tasks], axis=1)
        losses = np.array([1 - task.student.sum() / task.teacher.sum() for task in tasks])
        low, high = bootstrap.ranked_intervals(losses, drawn)
        found = [bootstrap.tolerance_interval(low, high, rank) for rank in ranks]
        true = [max(0.0, truth[rank - 1]) for rank in ranks]
        found.append(bootstrap.rate_intervals(low, high, [0.05])["0.05"])
        true.append(float((truth <= 0.05).mean()))
        found.append(bootstrap.percentile_interval(drawn[:, 0]))
        true.append(float(case.losses[0]))
        found.append(bootstrap.percentile_interval(drawn.mean(axis=1)))
        true.append(float(truth.mean()))
        found.append(decide(tasks).kept_interval or (0.0, 9.0))
        true.append(float(kept))
        ends = zip(found, true, strict=True)
        held += [low <= value <= high for (low, high), value in ends]
    return [float(share) for share in held / repetitions]


def main(repetitions: int) -> None:
    """Print the table."""
    print("| tasks |", " | ".join(COLUMNS), "|")
    print("|---|" + "---|" * len(COLUMNS))
    for case in scenarios():
        shares = coverage(case, repetitions)
        print(f"| {case.name} |", " | ".join(f"{100 * share:.1f}" for share in shares), "|")
        sys.stdout.flush()


if __name__ == "__main__":
    assert paired.LEVEL == 0.95
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)

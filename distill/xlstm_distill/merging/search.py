"""Search merge weights: which weighted sums to score, and which of them is the best.

Weights are on the simplex, in steps of 1/100, a set for each group of layers. What is proposed next
depends on the seed and on the scores so far alone. So a search that is started again with the
scores that it has already goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from xlstm_distill.errors import UserError

STEPS = 100
"""Steps of a weight. Finer ones are within the noise of validation, and hit the cache less."""
RANDOM_TRIALS = 10
"""Trials that are drawn at random, those that are given included; from then on TPE proposes."""
LOWEST = 1e-3
"""Smallest variable; the weight is its negative logarithm, relative to those of the others."""

Weights = tuple[tuple[float, ...], ...]
"""Weights by group of layers and expert."""


@dataclass(frozen=True, order=True)
class Score:
    """How good a merge is; smaller is better: the worst tolerance first, then the mean recovery.

    `error` is the standard error of the worst tolerance. `task` is the worst task, and `losses` are
    what its items add to the tolerance, which is their mean where it is above 0; empty where the
    task has no scores of items.
    """

    worst_tolerance: float
    negative_recovery: float
    error: float = 0.0
    task: str = field(default="", compare=False)
    losses: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def number(self) -> float:
        """What proposals follow: both, so that the noise of one task does not lead them."""
        return self.worst_tolerance + self.negative_recovery

    def facts(self) -> dict[str, Any]:
        """The score as plain values, without those of the items."""
        found = asdict(self)
        del found["losses"]
        return found


@dataclass(frozen=True)
class Trial:
    """Weights that were scored."""

    weights: Weights
    score: Score

    def facts(self) -> dict[str, Any]:
        """Weights and score as plain values, without those of the items."""
        return {"weights": self.weights, "score": self.score.facts()}


def search(
    experts: int, groups: int, trials: int, seed: int, score: Callable[[Weights], Score]
) -> Iterator[Trial]:
    """Propose weights, have them scored, and yield each trial.

    The first trials are uniform weights and each expert alone, as far as the budget goes. `score`
    is called again for weights that are proposed again: the caller keeps its scores.

    Raises:
        UserError: optuna is not installed.
    """
    study = _study(seed)
    names = [f"{group} {expert}" for group in range(groups) for expert in range(experts)]
    for start in _starts(experts):
        study.enqueue_trial(dict(zip(names, start * groups, strict=True)))
    distributions = _distributions(names)
    for _ in range(trials):
        asked = study.ask(distributions)
        drawn = [asked.params[name] for name in names]
        sets = [on_simplex(drawn[g * experts : (g + 1) * experts]) for g in range(groups)]
        trial = Trial(tuple(sets), score(tuple(sets)))
        study.tell(asked, trial.score.number)
        yield trial


def best_of(trials: Sequence[Trial]) -> Trial:
    """Of the trials whose worst tolerance is near the least, the one with the largest recovery.

    Near is within one standard error of the difference. A worst tolerance hangs on a few items of
    one task; the least of many trials would be the luckiest one.
    """
    least = min(trial.score for trial in trials)

    def near(score: Score) -> bool:
        above = score.worst_tolerance - least.worst_tolerance
        # Where a single item differs, error and difference are equal, up to rounding.
        return above <= error_of_difference(score, least) * (1 + 1e-9)

    return min(
        (trial for trial in trials if near(trial.score)),
        key=lambda trial: (trial.score.negative_recovery, trial.score.worst_tolerance),
    )


def error_of_difference(one: Score, other: Score) -> float:
    """The standard error of the difference of two worst tolerances.

    All merges answer the same items. So where the worst task is the same the error is that of the
    items' differences, which is smaller than that of independent answers: two merges of the same
    experts fail on the same items. Different tasks have different items, and are independent.
    """
    paired = one.task == other.task and len(one.losses) == len(other.losses) > 1
    if not paired:
        return math.hypot(one.error, other.error)
    differences = [a - b for a, b in zip(one.losses, other.losses, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences))


def on_simplex(variables: Sequence[float]) -> tuple[float, ...]:
    """Turn variables in (0, 1] into weights that sum to 1, in steps of 1/100.

    Uniform variables become weights that are uniform on the simplex. Parts of a step go to the
    largest remainders, so that the sum is exact.
    """
    lengths = [-math.log(value) for value in variables]
    whole = math.fsum(lengths)
    if whole == 0:  # all variables are 1
        lengths, whole = [1.0] * len(lengths), float(len(lengths))
    parts = [STEPS * length / whole for length in lengths]
    counts = [math.floor(part) for part in parts]
    rest = sorted(range(len(parts)), key=lambda at: (counts[at] - parts[at], at))
    for at in rest[: STEPS - sum(counts)]:
        counts[at] += 1
    return tuple(count / STEPS for count in counts)


def _starts(experts: int) -> list[list[float]]:
    """Variables of uniform weights, and of each expert alone."""
    found = [[0.5] * experts]
    for chosen in range(experts):
        found.append([0.5 if at == chosen else 1.0 for at in range(experts)])
    return found


def require_optuna() -> None:
    """Raise UserError if optuna, which proposes weights, is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("merge.weights: 'tuned' needs optuna; install xlstm-distill[tuning].")


def _study(seed: int) -> Any:
    require_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
    return optuna.create_study(sampler=sampler, direction="minimize")


def _distributions(names: Sequence[str]) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution

    return {name: FloatDistribution(LOWEST, 1.0) for name in names}

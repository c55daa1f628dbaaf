"""What merging gains and loses: the merged student against the expert of each task's domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xlstm_eval.metrics import compare, pair_results
from xlstm_eval.records import Comparison, TaskEvidence, TaskPair, TaskResult
from xlstm_eval.report.data import HEADLINE_ALPHA, ReportData, ReportModel


@dataclass(frozen=True)
class Merging:
    """Hold the merged student's comparison with experts, and which expert each task has."""

    comparison: Comparison
    experts: dict[str, str]

    def rows(self) -> list[tuple[TaskPair, str, TaskEvidence | None]]:
        """Return each task's scores (the expert's as the teacher's), its expert, its evidence."""
        found = self.comparison.statistics
        assert found is not None
        return [
            (pair, self.experts[pair.task], found.tasks.get(pair.task))
            for pair in self.comparison.tasks
        ]


def merging_of(data: ReportData) -> Merging | None:
    """Compare the headline, where it is a merge, with its experts; None without any.

    The paper's Figure 4. Tasks whose domain no expert was trained on are left out. Tests and
    intervals are paired over the items, as those against the teacher are.
    """
    merged = data.headline()
    experts = [model for model in data.models if model.role == "expert"]
    if merged.role != "merged":
        return None
    chosen = {}
    for result in merged.results:
        expert = expert_of(result.domain, experts)
        if expert is not None:
            chosen[result.task] = expert
    if not chosen:
        return None
    from xlstm_eval.statistics.measure import measure  # scipy takes a second to load

    before = [_result(expert, task) for task, expert in chosen.items()]
    after = [_result(merged, task) for task in chosen]
    alphas = (0.0, HEADLINE_ALPHA)
    compared = compare(merged.name, pair_results(before, after), alphas)
    return Merging(
        comparison=measure(compared, alphas, data.margin),
        experts={task: expert.name for task, expert in chosen.items()},
    )


def expert_of(domain: str | None, experts: Sequence[ReportModel]) -> ReportModel | None:
    """Return the expert of a domain: of those trained on it, the one with the fewest domains."""
    own = [expert for expert in experts if domain in expert.domains]
    return min(own, key=lambda expert: len(expert.domains)) if own else None


def _result(model: ReportModel, task: str) -> TaskResult:
    found = next(result for result in model.results if result.task == task)
    # An expert at chance leaves the merge something to gain, so the task stays.
    return found.model_copy(update={"chance": None})


def merging_sentence(found: Merging) -> str:
    """Say in one sentence what merging keeps of its experts, and on how many tasks it changes."""
    measured = found.comparison.statistics
    assert measured is not None
    if measured.pooled.kept is None or not measured.tasks:
        return ""
    shown = [own for own in measured.tasks.values() if own.p_value_holm <= 0.05]
    losses = sum(own.difference < 0 for own in shown)
    kept = 100 * measured.pooled.kept
    return (
        f"Merging keeps {kept:.1f} % of the experts' scores in their own domains. Beyond noise it "
        f"loses on {losses} and gains on {len(shown) - losses} of {len(measured.tasks)} tasks."
    )

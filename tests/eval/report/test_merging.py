"""The merged student against the expert of each task's domain, paired over items."""

from __future__ import annotations

import pytest
from scipy import stats

from xlstm_eval.records import TaskResult
from xlstm_eval.report.data import ReportData, ReportModel
from xlstm_eval.report.merging import expert_of, merging_of, merging_sentence


def result(task: str, domain: str | None, right: int, wrong: int) -> TaskResult:
    items = (1.0,) * right + (0.0,) * wrong
    score = right / len(items)
    return TaskResult(
        task=task,
        metric="acc,none",
        score=score,
        domain=domain,
        samples=len(items),
        correct=right,
        items=items,
    )


def model(name: str, scores: list[TaskResult], *domains: str) -> ReportModel:
    role = "expert" if domains else "merged"
    return ReportModel(name=name, role=role, results=tuple(scores), domains=domains)


def data(*models: ReportModel) -> ReportData:
    return ReportData(
        title="t", teacher="T", teacher_results=models[0].results, models=tuple(models)
    )


def tasks(add: int, run: int, talk: int) -> list[TaskResult]:
    return [
        result("add", "math", add, 100 - add),
        result("run", "code", run, 100 - run),
        result("talk", None, talk, 100 - talk),
    ]


def test_each_task_is_compared_with_its_domains_expert() -> None:
    found = merging_of(
        data(
            model("merged", tasks(70, 62, 50)),
            model("math", tasks(90, 10, 50), "math"),
            model("code", tasks(10, 60, 50), "code"),
        )
    )
    assert found is not None
    assert found.experts == {"add": "math", "run": "code"}  # nobody was trained on no domain
    rows = {pair.task: own for pair, _, own in found.rows()}
    assert rows["add"].difference == pytest.approx(-0.2)
    assert rows["run"].difference == pytest.approx(0.02)
    # Paired: 20 items that the expert alone has right, none the other way round.
    assert rows["add"].p_value == pytest.approx(stats.binomtest(0, 20).pvalue)
    low, high = rows["run"].difference_interval
    assert low < 0.02 < high < 0.1
    sentence = merging_sentence(found)
    assert sentence.startswith("Merging keeps 88.0 % of the experts' scores in their own domains.")
    assert sentence.endswith("Beyond noise it loses on 1 and gains on 0 of 2 tasks.")


def test_the_expert_with_the_fewest_domains_stands_for_a_domain() -> None:
    broad = model("broad", tasks(1, 1, 1), "math", "code")
    narrow = model("narrow", tasks(2, 2, 2), "math")
    assert expert_of("math", [broad, narrow]) == narrow
    assert expert_of("code", [broad, narrow]) == broad
    assert expert_of("stem", [broad, narrow]) is None


def test_without_a_merge_or_experts_there_is_nothing_to_compare() -> None:
    assert merging_of(data(model("merged", tasks(1, 1, 1)))) is None
    assert merging_of(data(model("math", tasks(1, 1, 1), "math"))) is None

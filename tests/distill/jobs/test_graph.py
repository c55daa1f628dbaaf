"""The jobs that follow from a recipe."""

from __future__ import annotations

import pytest

from xlstm_distill.jobs.graph import array_words, job_graph, wanted_labels
from xlstm_distill.jobs.site import Settings, Site
from xlstm_distill.recipe import MergeSettings, Refine
from xlstm_distill.stages.lineage import Lineage


def graph(recipe, **stages):
    site = Site(stages={name: Settings(**values) for name, values in stages.items()})
    return {job.name: job for job in job_graph(Lineage(recipe), site)}


def test_the_graph_of_four_experts(recipe):
    jobs = graph(recipe, capture={"tasks": 3})
    assert {name: job.depends_on for name, job in jobs.items()} == {
        "prepare": (),
        "capture": ("prepare",),
        "align": ("prepare",),
        "distill": ("capture", "align"),
        "merge": ("distill",),
        "evaluate": ("merge",),
        "report": ("evaluate",),
    }
    assert [task.name for task in jobs["distill"].tasks] == ["math", "code", "stem", "chat"]
    assert [task.index for task in jobs["evaluate"].tasks] == list(range(6))
    assert jobs["evaluate"].tasks[0].labels == ("evaluate/teacher",)
    assert len(jobs["capture"].tasks) == 3
    assert jobs["merge"].tasks[0].index is None


def test_refined_experts_are_an_array_between_distill_and_merge(recipe):
    refine = Refine(
        tokens=40000, lr=1e-5, prompt_tokens=64, new_tokens=64, batch=8, experts=("code", "chat")
    )
    refined = recipe.model_copy(update={"refine": refine})
    jobs = graph(refined)
    assert jobs["refine"].depends_on == ("distill",)
    assert jobs["merge"].depends_on == ("refine",)
    assert [(task.index, task.name) for task in jobs["refine"].tasks] == [(0, "code"), (1, "chat")]
    made = {label for job in jobs.values() for task in job.tasks for label in task.labels}
    assert made == set(Lineage(refined).labels())


def test_every_artifact_is_made_by_a_job(recipe):
    made = {label for job in graph(recipe).values() for task in job.tasks for label in task.labels}
    assert made == set(Lineage(recipe).labels())


def test_the_job_of_the_merge_makes_the_variants_too(recipe):
    added = MergeSettings(method="task_arithmetic", scale=1.5)
    merge = recipe.merge.model_copy(update={"variants": {"added": added}})
    wanted = recipe.model_copy(update={"merge": merge})
    jobs = graph(wanted)
    (task,) = jobs["merge"].tasks
    assert task.labels == ("merge", "variant/added")
    assert jobs["merge"].depends_on == ("distill",)
    assert jobs["evaluate"].tasks[-1].labels == ("evaluate/added",)
    made = {label for job in jobs.values() for task in job.tasks for label in task.labels}
    assert made == set(Lineage(wanted).labels())


def test_no_more_shares_than_domains_and_none_without_stored_targets(recipe):
    few = graph(recipe, prepare={"tasks": 3})["prepare"].tasks
    assert [task.name for task in few] == ["math, chat", "code", "stem"]
    assert len(graph(recipe, prepare={"tasks": 9})["prepare"].tasks) == 4
    capture = recipe.capture.model_copy(update={"targets": "online"})
    online = graph(recipe.model_copy(update={"capture": capture}))
    assert "capture" not in online
    assert online["distill"].depends_on == ("align",)


def test_only_what_the_report_still_needs_is_wanted(recipe):
    lineage = Lineage(recipe)
    every = set(lineage.labels())
    assert wanted_labels(lineage, set()) == every
    assert wanted_labels(lineage, every) == set()
    assert wanted_labels(lineage, every - {"report"}) == {"report"}
    # Rows were deleted after the experts were trained: nothing needs them any more.
    experts = {label for label in every if label.startswith("distill/")}
    left = every - {"data/math", "capture/math"}
    assert wanted_labels(lineage, left) == set()
    assert wanted_labels(lineage, experts | {"align"}) >= {"merge", "data/math", "report"}
    assert "capture/math" not in wanted_labels(lineage, experts)


@pytest.mark.parametrize(
    ("indices", "at_once", "words"),
    [
        ([0, 1, 2, 3], None, "0-3"),
        ([2], 4, "2%4"),
        ([0, 2, 3, 7], 2, "0,2-3,7%2"),
        ([5, 4], None, "4-5"),
    ],
)
def test_indices_are_written_as_sbatch_reads_them(indices, at_once, words):
    assert array_words(indices, at_once) == words

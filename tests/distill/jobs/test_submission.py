"""What is submitted, what is not submitted twice, and where each index stands."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from xlstm_distill.errors import RunError, UserError
from xlstm_distill.jobs.progress import read_book, read_jobs
from xlstm_distill.jobs.queue import NEVER
from xlstm_distill.jobs.site import Settings, Site
from xlstm_distill.jobs.submission import prepare_jobs, submit
from xlstm_distill.jobs.table import tasks_table
from xlstm_distill.runtime.console import Console

SITE = Site(stages={"capture": Settings(tasks=2)})
DOMAINS = ("math", "code", "stem", "chat")
DATA = [f"data/{name}" for name in DOMAINS]
CAPTURED = [f"capture/{name}" for name in DOMAINS]


@pytest.fixture
def call(folder, recipe, cluster):
    """Call `slurm --submit`; returns what was submitted by this call."""

    def submit_missing(recipe=recipe, site=SITE):
        before = len(cluster.calls)
        submit(prepare_jobs(folder, recipe, site, cluster), site, cluster, lambda line: None)
        return cluster.calls[before:]

    return submit_missing


@pytest.fixture
def states(folder, recipe, cluster):
    """States of all indices of a job."""

    def find(job, scheduler=cluster):
        tasks = read_book(folder, recipe, SITE, scheduler).tasks()
        return [task.state for task in tasks if task.job == job]

    return find


def finish(cluster, publish, job, indices, *labels):
    for index in indices:
        cluster.start(job, index)
        cluster.end(job, index)
    publish(*labels)


def test_everything_is_submitted_once_and_each_job_waits_for_those_it_needs(call, cluster):
    assert call() == [
        ("prepare", "0-3", None),
        ("capture", "0-1", "afterok:101"),
        ("align", None, "afterok:101"),
        ("distill", "0-3", "afterok:102:103"),
        ("merge", None, "afterok:104"),
        ("evaluate", "0-5", "afterok:105"),
        ("report", None, "afterok:106"),
    ]
    assert call() == []
    assert cluster.cancelled == []
    # Each of them asks for this run directory's jobs alone.
    assert all(name.startswith("quickstart.") for name in cluster.asked)


def test_a_submission_that_could_not_be_recorded_is_not_repeated(call, folder):
    call()
    (folder.path / "submitted.json").unlink()
    assert call() == []


def test_a_refusal_in_the_middle_leaves_the_rest_for_the_next_call(call, cluster):
    whole = cluster.submit

    def refuse(script, array, dependency):
        if script.stem == "distill":
            raise RunError("sbatch: too many jobs")
        return whole(script, array, dependency)

    cluster.submit = refuse
    with pytest.raises(RunError, match="too many"):
        call()
    cluster.submit = whole
    assert [name for name, _, _ in call()] == ["distill", "merge", "evaluate", "report"]
    # Indices that an earlier call submitted are named one by one.
    assert cluster.calls[3] == ("distill", "0-3", "afterok:102_0:102_1:103")


def test_a_failed_index_is_submitted_again_with_what_depends_on_it(call, cluster, publish, states):
    call()
    finish(cluster, publish, "prepare", range(4), *DATA)
    finish(cluster, publish, "capture", range(2), *CAPTURED)
    finish(cluster, publish, "align", [None], "align")
    finish(cluster, publish, "distill", [0, 3], "distill/math", "distill/chat")
    cluster.start("distill", 1)
    cluster.start("distill", 2)
    cluster.end("distill", 2, code=1, log="error: disk full")
    # --kill-on-invalid-dep takes the dependants out of the queue.
    cluster.cancel(["105", *(f"106_{n}" for n in range(6)), "107"])
    cluster.cancelled.clear()
    assert states("distill") == ["done", "running", "failed", "done"]
    assert states("merge") == ["cancelled"]
    assert states("evaluate") == ["cancelled"] * 6
    assert call() == [
        ("distill", "2", None),
        ("merge", None, "afterok:108:104_1"),
        ("evaluate", "0-5", "afterok:109"),
        ("report", None, "afterok:110"),
    ]
    assert call() == []
    assert cluster.cancelled == []


def test_jobs_that_wait_for_what_failed_are_cancelled_and_submitted_anew(call, cluster, publish):
    call()
    finish(cluster, publish, "prepare", range(4), *DATA)
    cluster.start("align")
    cluster.end("align", code=1)
    # The cluster has not noticed yet, or is set up to keep them.
    cluster.entries = [
        replace(entry, reason=NEVER) if entry.id == 104 else entry for entry in cluster.entries
    ]
    again = call()
    assert [name for name, _, _ in again] == ["align", "distill", "merge", "evaluate", "report"]
    assert again[1] == ("distill", "0-3", "afterok:102_0:102_1:108")
    assert cluster.cancelled[:5] == ["104_0", "104_1", "104_2", "104_3", "105"]
    assert len({entry.words for entry in cluster.entries}) == 2 + 1 + 4 + 1 + 6 + 1
    assert call() == []


def test_a_share_that_has_ended_is_done_before_its_artifacts_are(call, cluster, publish, states):
    call()
    finish(cluster, publish, "prepare", range(4), *DATA)
    cluster.start("capture", 0)
    cluster.end("capture", 0)
    cluster.start("capture", 1)
    cluster.end("capture", 1, code=1)
    assert states("capture") == ["done", "failed"]
    assert ("capture", "1", None) in call()
    cluster.start("capture", 1)
    cluster.end("capture", 1)
    # Both have ended well and the targets are not there: somebody removed shards.
    assert ("capture", "0-1", None) in call()


def test_another_recipe_waits_until_the_queue_is_empty(call, cluster, recipe, publish, folder):
    call()
    other = recipe.model_copy(update={"seed": 7})
    with pytest.raises(UserError, match=r"jobs of another recipe.*scancel 101_0 101_1"):
        call(other)
    assert "seed: 7" not in folder.recipe.read_text()
    with pytest.raises(UserError, match=r"another number of tasks.*scancel 102_0 102_1$"):
        call(site=Site(stages={"capture": Settings(tasks=3)}))
    with pytest.raises(UserError, match="Slurm cannot be asked here"):
        prepare_jobs(folder, other, SITE, None)
    cluster.entries.clear()
    assert [name for name, _, _ in call(other)][:2] == ["prepare", "capture"]


def test_what_is_done_is_not_submitted_and_nothing_waits_for_it(call, publish, cluster):
    publish(*DATA, *CAPTURED, "align", "distill/math")
    assert call()[0] == ("distill", "1-3", None)


def test_an_array_that_the_cluster_does_not_take_is_refused_before_anything(call, cluster):
    cluster.largest = 3
    with pytest.raises(UserError, match=r"evaluate: its array goes up to index 5.*allows 3"):
        call()
    assert cluster.calls == []
    site = Site(stages={"capture": Settings(tasks=40)})
    with pytest.raises(UserError, match=r"stages.capture.tasks a smaller number"):
        call(site=site)


def test_a_throttle_stays_with_the_indices(call, publish):
    publish("distill/math")
    site = Site(defaults=Settings(at_once=2), stages={"capture": Settings(tasks=2)})
    assert ("distill", "1-3%2", "afterok:102:103") in call(site=site)


def test_running_requeued_and_failed_indices(call, cluster, publish, folder, states):
    call()
    assert states("prepare") == ["waiting"] * 4
    cluster.start("prepare", 0)
    cluster.start("prepare", 1)
    entry = cluster.find("prepare", 1)
    cluster.entries[cluster.entries.index(entry)] = replace(
        entry, state="PENDING", reason="BeginTime"
    )
    cluster.start("prepare", 2)
    cluster.end("prepare", 2, code=1, log="error: no [brackets] left\x1b[0m")
    cluster.start("prepare", 3)
    cluster.entries.remove(cluster.find("prepare", 3))  # killed
    tasks = {task.index: task for task in read_jobs(folder.run, cluster) if task.job == "prepare"}
    assert [tasks[n].state for n in range(4)] == ["running", "requeued", "failed", "failed"]
    assert tasks[0].nodes == "n1"
    assert tasks[1].why == "BeginTime"
    assert tasks[2].why == "error: no [brackets] left[0m"
    assert tasks[3].why == "ended without a word: killed (memory? node?)"
    console = Console()
    with console.rich().capture() as shown:
        console.rich().print(tasks_table(list(tasks.values())))
    assert "failed: error: no [brackets] left" in shown.get()
    # A requeued index is in the queue; failed ones are submitted again.
    assert call()[0] == ("prepare", "2-3", None)


def test_speed_and_time_left_come_from_the_training(call, cluster, publish, folder):
    call()
    publish(*DATA, *CAPTURED, "align")
    cluster.start("distill", 2)
    training = folder.run / "training" / "distill-stem-0123"
    training.mkdir(parents=True)
    header = {"label": "distill/stem", "steps": 10, "tokens_per_step": 100, "first_step": 0}
    (training / "training.json").write_text(json.dumps(header))
    (training / "log.jsonl").write_text('{"step": 3, "tokens_per_second": 50.0}\n')
    found = next(t for t in read_jobs(folder.run, cluster) if (t.job, t.index) == ("distill", 2))
    assert (found.state, found.tokens_per_second) == ("running", 50.0)
    assert found.seconds_left == pytest.approx(12.0)


def test_without_slurm_s_commands_the_marks_tell(call, cluster, states, folder):
    call()
    cluster.start("prepare", 0)
    cluster.start("prepare", 1)
    cluster.end("prepare", 1, code=2)
    assert states("prepare", None) == ["running", "failed", "waiting", "waiting"]

    class Silent:
        def queue(self, names):
            raise RunError("squeue: no answer")

    tasks = [task for task in read_jobs(folder.run, Silent()) if task.job == "prepare"]
    assert tasks[0].why == "Slurm cannot be asked here"


def test_a_damaged_record_stops_a_submission(call, folder):
    call()
    (folder.path / "submitted.json").write_text("[{")
    with pytest.raises(UserError, match="the record of submitted jobs cannot be read"):
        call()


def test_damaged_marks_do_not_count(call, cluster, folder, states):
    call()
    folder.mark("prepare", 0).write_text("started\nstarted x y z\n\x00\xff")
    assert states("prepare")[0] == "waiting"


def test_a_run_without_jobs_has_none(folder):
    assert read_jobs(folder.run, None) == []

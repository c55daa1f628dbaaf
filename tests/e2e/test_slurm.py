"""Four experts as Slurm arrays on a real cluster: preempted, out of time, failed, on two nodes.

Jobs are forks of one process (helpers/job_server.py), because imports would take most of the time;
the job on two nodes starts its processes itself.
One run serves for most of it: Slurm takes index 1 of the experts away, the time limit stops index
2, and index 3 fails. What is merged in the end must be what a local run merges.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call_cli
from processes import ROOT, SETTINGS, process_environment
from slurm_cluster import Cluster, NoSlurm, wait_until

from xlstm_distill.jobs.folder import Folder
from xlstm_distill.jobs.progress import TaskStatus, read_jobs
from xlstm_distill.jobs.queue import Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.multi_process, pytest.mark.timeout(3000)]

RECIPE = ROOT / "recipes" / "quickstart.yaml"
EXPERTS = ("math", "code", "stem", "chat")
SETS = (
    "data.context=64", "data.validation_rows=2", "data.workers=0", "student.mixer.window=8",
    *(f"data.domains.{name}.sources=[{{generator: {name}, documents: 300}}]" for name in EXPERTS),
    "align.tokens=1024", "align.batch=4", "align.warmup_steps=1",
    # No checkpoint but the one that a signal asks for.
    "training.checkpoint_steps=1000", "training.validate_steps=null",
    "distill.batch=4", "distill.warmup_steps=1",
    *(f"distill.experts.{name}.phases=[{{domain: {name}, tokens: 6144}}]" for name in EXPERTS),
    "evaluate.limit=2", "evaluate.experts=false", "evaluate.speed.seconds=0",
    "evaluate.tasks=[{name: qs_math_add, domain: math}]",
)  # fmt: skip
PATHS = os.pathsep.join(str(ROOT / name) for name in ("distill", "kernels", "eval"))
FIRST_STEPS = 2
"""Steps that an expert has taken when it is disturbed."""
PATIENCE = 900.0
"""Seconds that a step of the story may take on a busy machine."""
REAL = [sys.executable, "-m", "xlstm_distill"]
"""Words that start the program in a process of its own."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes, whose commands this process uses."""
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
    except NoSlurm as reason:
        pytest.skip(str(reason))
    before = dict(os.environ)
    os.environ.update(made.environment)
    try:
        yield made
    finally:
        os.environ.clear()
        os.environ.update(before)
        made.stop()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Words that run `xlstm-distill` in a fork of a process that has imported everything."""
    path = tmp_path_factory.mktemp("server") / "socket"
    helper = str(ROOT / "tests" / "helpers" / "job_server.py")
    environment = process_environment(PYTHONPATH=PATHS)
    server = subprocess.Popen(
        [sys.executable, helper, str(path)], stdin=subprocess.PIPE, env=environment
    )
    wait_until(path.exists, "the server does not start", PATIENCE)
    # -S and -I: the client needs nothing but the standard library.
    yield [sys.executable, "-I", "-S", helper, str(path), "--client"]
    server.communicate(timeout=60)


def site(program: list[str], **stages: Any) -> dict[str, Any]:
    """A site file for this cluster: a task takes a node, so that two run at a time."""
    return {
        "defaults": {"partition": "low", "time": "60", "cpus": 2},
        "stages": {"prepare": {"tasks": 2}, "capture": {"tasks": 2}, **stages},
        "program": program,
        "environment": {**SETTINGS, "PYTHONPATH": PATHS, "MAIN_HOST": "127.0.0.1"},
        "signal_seconds": 60,
    }


@dataclass
class Story:
    """A run in jobs, and what was seen on the way."""

    cluster: Cluster
    run: Path
    site: Path
    submitted: list[list[str]] = field(default_factory=list)
    seen: dict[str, dict[tuple[str, int | None], TaskStatus]] = field(default_factory=dict)

    def submit(self) -> list[str]:
        """Submit what is missing; returns the names of the jobs."""
        overrides = [word for value in SETS for word in ("--set", value)]
        words = ("slurm", RECIPE, "--run", self.run, "--site", self.site, "--submit", "--json")
        done = call_cli(*words, *overrides)
        assert done.returncode == 0, done.stderr
        self.submitted.append([job["job"] for job in json.loads(done.stdout)["submitted"]])
        return self.submitted[-1]

    def look(self) -> dict[tuple[str, int | None], TaskStatus]:
        """Where all indices stand."""
        return {(task.job, task.index): task for task in read_jobs(self.run, Slurm())}

    def state(self, job: str, index: int | None = None) -> str:
        return self.look()[job, index].state

    def wait_for(self, state: str, job: str, index: int | None = None) -> None:
        def holds() -> bool:
            found = self.state(job, index)
            assert found != "failed" or state == "failed", self.log(job, index)
            return found == state

        wait_until(holds, f"{job} {index} is not {state}", PATIENCE, pause=0.3)

    def wait_until_over(self) -> None:
        """Wait until nothing is queued."""

        def is_over() -> bool:
            return not any(task.is_queued for task in self.look().values())

        wait_until(is_over, "jobs are still in the queue", PATIENCE, pause=0.5)

    def log(self, job: str, index: int | None = None) -> str:
        path = Folder(self.run).log(job, index)
        return path.read_text() if path.is_file() else ""

    def freeze_in_training(self, expert: str) -> int:
        """Stop an expert's process once it has taken some steps; returns its process."""

        def trained() -> bool:
            logs = self.run.glob(f"training/distill-{expert}-*/log.jsonl")
            return any(log.read_text().count("\n") >= FIRST_STEPS for log in logs)

        wait_until(trained, f"{expert} does not train", PATIENCE, pause=0.02)
        (header,) = self.run.glob(f"training/distill-{expert}-*/training.json")
        process = int(json.loads(header.read_text())["pid"])
        # It spends no time while Slurm makes up its mind, which takes up to half a minute.
        os.kill(process, signal.SIGSTOP)
        return process

    def start_again(self, job: str, index: int) -> None:
        """Start a requeued index soon: Slurm would wait for two minutes.

        Not in the second in which it was requeued: a node counts in seconds, takes a start in that
        one for the killed one, and the index fails ("already killed, do not launch").
        """
        self.wait_for("requeued", job, index)
        number = self.look()[job, index].id
        self.cluster.call("scontrol", "update", f"JobId={number}_{index}", "StartTime=now+2")


@pytest.fixture(scope="module")
def story(cluster: Cluster, program: list[str], tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Run the jobs of four experts, disturb three of them, and submit again what failed."""
    base = tmp_path_factory.mktemp("jobs")
    mended = base / "mended"
    values = site(program, distill={"at_once": 2})
    line = f'[ "$name" != distill-3 ] || [ -e {mended} ] || {{ echo "error: no disk"; exit 1; }}'
    values["setup"] = [line]
    (base / "site.yaml").write_text(yaml.safe_dump(values))
    told = Story(cluster, base / "a run", base / "site.yaml")
    told.submit()
    told.submit()  # while all of it is in the queue

    frozen = told.freeze_in_training("code")
    node = told.look()["distill", 1].nodes
    assert node is not None
    cluster.call(
        *("sbatch", "--partition=high", f"--nodelist={node}", "--cpus-per-task=2"),
        *("--output=/dev/null", "--wrap=true"),
    )
    let_go(frozen, signal.SIGTERM)
    told.start_again("distill", 1)

    frozen = told.freeze_in_training("stem")
    number = told.look()["distill", 2].id
    cluster.call("scontrol", "update", f"JobId={number}_2", "EndTime=now+70")
    let_go(frozen, signal.SIGUSR1)
    told.start_again("distill", 2)

    told.wait_until_over()
    told.seen["failed"] = told.look()
    mended.touch()
    told.submit()
    told.wait_until_over()
    told.seen["end"] = told.look()
    return told


def let_go(process: int, number: signal.Signals) -> None:
    """Wait until a frozen process has got a signal of Slurm's, then let it go on."""

    def has_got_it() -> bool:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        pending = next(line for line in lines if line.startswith("ShdPnd:")).split()[1]
        return bool(int(pending, 16) & 1 << (number - 1))

    wait_until(has_got_it, f"no {number.name}", PATIENCE)
    os.kill(process, signal.SIGCONT)


def hashes(run: Path) -> dict[str, str]:
    """Hashes of the weights of every student in a run."""
    found = {}
    for path in sorted((run / "artifacts").glob("**/model.safetensors")):
        label = str(path.parents[1].relative_to(run / "artifacts"))
        found[label] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def test_the_merged_weights_are_those_of_a_local_run(
    story: Story, program: list[str], tmp_path: Path
) -> None:
    assert {task.state for task in story.seen["end"].values()} == {"done"}
    words = ("run", story.run / "slurm" / "recipe.yaml", "--run", tmp_path / "local")
    local = subprocess.run(
        [*program, *map(str, words)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert local.returncode == 0, local.stderr
    found = hashes(story.run)
    assert set(found) == {"align", "merge", *(f"distill/{name}" for name in EXPERTS)}
    assert found == hashes(tmp_path / "local")
    scores = [json.loads((run / "report" / "report.json").read_text()) for run in (
        story.run, tmp_path / "local"
    )]  # fmt: skip
    assert scores[0]["models"] == scores[1]["models"]


def test_nothing_is_submitted_twice(story: Story) -> None:
    names = ["prepare", "capture", "align", "distill", "merge", "evaluate", "report"]
    assert story.submitted == [names, [], ["distill", "merge", "evaluate", "report"]]


def test_a_preempted_index_goes_on_from_its_checkpoint(story: Story) -> None:
    log = story.log("distill", 1)
    assert "stopped by SIGTERM after" in log
    assert "distill/code: goes on at step" in log
    assert ", start 2" in log
    assert story.seen["failed"]["distill", 1].requeues == 1
    # Slurm put it back by itself.
    assert "back into the queue" not in log


def test_a_time_limit_stops_a_training_in_time_and_requeues_it(story: Story) -> None:
    log = story.log("distill", 2)
    assert "stopped by SIGUSR1 after" in log
    assert "distill/stem: goes on at step" in log
    assert "stopped by USR1; back into the queue, requeue 1 of at most 50" in log
    assert ", start 2" in log
    assert story.seen["failed"]["distill", 2].state == "done"


def test_a_failure_cancels_what_depends_on_it_alone(story: Story) -> None:
    seen = story.seen["failed"]
    assert [seen["distill", n].state for n in range(4)] == ["done", "done", "done", "failed"]
    assert seen["distill", 3].why == "error: no disk"
    assert seen["merge", None].state == "cancelled"
    assert {seen["evaluate", n].state for n in range(2)} == {"cancelled"}
    assert story.seen["end"]["distill", 3].state == "done"


def test_two_nodes_align_as_one_process_does(story: Story, tmp_path: Path) -> None:
    run = tmp_path / "two nodes"
    for name in ("data", "capture"):
        shutil.copytree(story.run / "artifacts" / name, run / "artifacts" / name)
    two = {"nodes": 2, "launch": "ddp-cpu", "processes": 1}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site(REAL, align=two)))
    told = Story(story.cluster, run, tmp_path / "site.yaml")
    assert told.submit() == ["align", "distill", "merge", "evaluate", "report"]
    ids = [str(task.id) for (job, _), task in told.look().items() if job == "distill"]
    story.cluster.call("scancel", ids[0])
    told.wait_until_over()
    assert told.state("align") == "done", told.log("align")
    from safetensors.torch import load_file

    one, other = (
        load_file(at / "artifacts" / "align" / "model" / "model.safetensors")
        for at in (story.run, run)
    )
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-4 * tensor.norm() + 1e-6, name

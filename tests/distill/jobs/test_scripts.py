"""The batch scripts: what is written, and what they do when bash runs them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from xlstm_distill.errors import UserError
from xlstm_distill.jobs.folder import Folder
from xlstm_distill.jobs.graph import job_graph
from xlstm_distill.jobs.queue import submission_environment
from xlstm_distill.jobs.scripts import Writer, templates_folder
from xlstm_distill.jobs.site import Site, check_site
from xlstm_distill.recipe.load import load_recipe
from xlstm_distill.stages.lineage import Lineage


def write(folder, recipe, **values):
    """Write the jobs of a site file with these values; returns the scripts by name."""
    site = check_site(values, Path("/"), Path("site.yaml"))
    Writer(folder, recipe, site).write(job_graph(Lineage(recipe), site))
    return {path.stem: path.read_text() for path in folder.path.glob("*.sbatch")}


def options(script):
    """The options of a script, without the quotes."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "))]


def test_every_job_has_a_script_that_bash_reads(folder, recipe, written):
    stages = {"distill": {"nodes": 2, "launch": "ddp", "processes": 4, "time": "1-00:00:00"}}
    stages["evaluate"] = {"at_once": 2, "extra": ["--constraint=[a100|h100]&ib"]}
    scripts = write(folder, recipe, stages=stages, srun=["--mpi=none"], container=["run", "a b"])
    assert [job["name"] for job in written()] == list(scripts) or len(scripts) == 7
    for job in written():
        path = folder.path / job["script"]
        subprocess.run(["bash", "-n", path], check=True)
        assert set(job) == {"name", "script", "array", "depends_on"}
    assert {job["name"]: job["array"] for job in written()}["evaluate"] == "0-5%2"
    assert "--constraint=[a100|h100]&ib" in options(scripts["evaluate"])
    found = options(scripts["distill"])
    for option in ("--nodes=2", "--ntasks-per-node=1", "--time=1-00:00:00", "--requeue"):
        assert option in found
    for option in ("--signal=B:USR1@300", "--kill-on-invalid-dep=yes", "--open-mode=append"):
        assert option in found
    # A percent sign in a path begins a pattern, and a blank ends a word.
    logs = str(folder.run).replace("%", "%%")
    assert f"--output={logs}/slurm/logs/distill-%a.log" in found
    assert f"--chdir={folder.run}" in found
    assert "run 'a b' xlstm-distill capture" in scripts["distill"]
    assert "--num_machines 2 --num_processes 8" in scripts["distill"]


def test_jobs_read_copies_that_nobody_edits(folder, recipe, tmp_path):
    launch = tmp_path / "mine.yaml"
    launch.write_text("num_processes: 2\n")
    write(folder, recipe, stages={"align": {"launch": str(launch)}})
    launch.unlink()
    assert (folder.path / "launch-align.yaml").read_text() == "num_processes: 2\n"
    assert load_recipe(folder.recipe) == recipe
    # The site file of the last call, without the original of the configuration.
    saved = folder.saved_site()
    assert saved.settings("align").launch == str(folder.path / "launch-align.yaml")
    Writer(folder, recipe, saved).write(job_graph(Lineage(recipe), saved))


@pytest.mark.parametrize("name", ["it's", 'a"b', "back\\slash", "two\nlines"])
def test_a_path_that_sbatch_cannot_read_is_refused(name, recipe, tmp_path):
    with pytest.raises(UserError, match="give another"):
        write(Folder(tmp_path / name), recipe)


def test_the_templates_are_found():
    assert (templates_folder() / "site.example.yaml").is_file()


# --- what a script does


SCONTROL = """#!/bin/bash
echo "$*" >> {log}
[ "$1" = show ] && echo "   JobState=$(cat {state}) Reason=None"
exit 0
"""


class Job:
    """The script of an index, run by bash with a program and a `scontrol` of the test's."""

    def __init__(self, folder, recipe, tmp_path, program, index=1, **site):
        self.folder, self.index, self.base = folder, index, tmp_path
        (tmp_path / "program").write_text(program)
        write(folder, recipe, program=["bash", str(tmp_path / "program")], **site)
        (tmp_path / "bin").mkdir(exist_ok=True)
        self.calls, self.state = tmp_path / "calls", tmp_path / "state"
        scontrol = tmp_path / "bin" / "scontrol"
        scontrol.write_text(SCONTROL.format(log=self.calls, state=self.state))
        scontrol.chmod(0o755)
        self.state.write_text("RUNNING")

    def start(self, name="evaluate", **more):
        environment = {
            **os.environ,
            "PATH": f"{self.base / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_ARRAY_JOB_ID": "5",
            "SLURM_ARRAY_TASK_ID": str(self.index),
            **more,
        }
        return subprocess.Popen(
            ["bash", self.folder.script(name)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def marks(self, name="evaluate"):
        found = self.folder.marks(name, self.index)
        return [(mark.word, mark.id, mark.text) for mark in found][1:]

    def wait_for(self, path):
        deadline = time.monotonic() + 20
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_command_gets_its_words_and_its_code_is_the_job_s(folder, recipe, tmp_path):
    job = Job(
        folder, recipe, tmp_path, 'echo "$X"; printf "%s\\n" "$@"; exit 3', environment={"X": "a$b"}
    )
    out, _ = (done := job.start()).communicate(timeout=20)
    assert done.returncode == 3
    lines = [line for line in out.splitlines() if not line.startswith("[slurm]")]
    assert lines == [
        "a$b", "evaluate", str(folder.recipe), "--run-dir", str(folder.run), "--model", "merged"
    ]  # fmt: skip
    assert job.marks() == [("ended", 5, "3")]
    assert not job.calls.exists()


def test_an_index_is_its_own_expert_whatever_experts_are_called(folder, recipe, tmp_path):
    """Commands take names before indices: an expert called `1` must not be that of index 1 too."""
    math, code, *_ = recipe.distill.experts.values()
    distill = recipe.distill.model_copy(update={"experts": {"1": math, "code": code}})
    merge = recipe.merge.model_copy(update={"weights": "uniform"})
    named = recipe.model_copy(update={"distill": distill, "merge": merge})
    found = []
    for index in (0, 1):
        job = Job(folder, named, tmp_path, 'echo "expert ${*: -1}"', index=index)
        out, _ = job.start("distill").communicate(timeout=20)
        found += [line for line in out.splitlines() if line.startswith("expert")]
    # Shards that no share published are gathered first, by a command with other words.
    assert [line for line in found if "/" not in line] == ["expert 1", "expert code"]


STOPS = "trap 'sleep 0.2; exit 75' {signal}; touch {ready}; while :; do sleep 0.05; done"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_command_and_75_is_requeued(number, folder, recipe, tmp_path):
    program = STOPS.format(signal=number.name, ready=tmp_path / "ready")
    job = Job(folder, recipe, tmp_path, program)
    process = job.start()
    job.wait_for(tmp_path / "ready")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75, out
    # The index alone: the job's own id may be that of the whole array.
    assert job.calls.read_text().splitlines() == ["show job 5_1", "requeue 5_1"]
    assert job.marks() == [("requeued", 5, "1")]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_what_was_cancelled_or_preempted_is_not_requeued_by_itself(state, folder, recipe, tmp_path):
    job = Job(folder, recipe, tmp_path, "exit 75")
    job.state.write_text(state)
    assert job.start().wait(timeout=20) == 75
    assert job.calls.read_text().splitlines() == ["show job 5_1"]
    assert job.marks() == [("ended", 5, "75")]


def test_requeues_end(folder, recipe, tmp_path):
    job = Job(folder, recipe, tmp_path, "exit 75", requeues=2)
    for _ in range(3):
        assert job.start().wait(timeout=20) == 75
    words = [word for word, _, _ in job.marks() if word != "started"]
    assert words == ["requeued", "requeued", "ended"]


def test_a_signal_before_the_command_starts_is_not_lost(folder, recipe, tmp_path):
    ready = tmp_path / "ready"
    setup = [f"touch {ready}", "sleep 0.5"]
    job = Job(folder, recipe, tmp_path, f"touch {tmp_path}/ran", setup=setup)
    process = job.start()
    job.wait_for(ready)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 75
    assert not (tmp_path / "ran").exists()
    assert job.marks()[-1] == ("requeued", 5, "1")


def test_a_command_that_died_of_the_signal_is_requeued(folder, recipe, tmp_path):
    job = Job(folder, recipe, tmp_path, f"touch {tmp_path}/ready; exec sleep 20")
    process = job.start()
    job.wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 75
    assert job.marks()[-1] == ("requeued", 5, "1")


def test_a_setup_line_that_ends_the_job_leaves_its_code(folder, recipe, tmp_path):
    job = Job(folder, recipe, tmp_path, "exit 0", setup=["exit 4"])
    assert job.start().wait(timeout=20) == 4
    assert job.marks() == [("ended", 5, "4")]
    job = Job(folder, recipe, tmp_path, "exit 0", modules=["cuda"])
    out, _ = (done := job.start()).communicate(timeout=20)
    assert done.returncode == 1
    assert "the modules of the site file cannot be loaded" in out


def test_an_expert_gathers_shards_that_no_share_published(folder, recipe, tmp_path, publish):
    program = 'echo "$1"'
    job = Job(folder, recipe, tmp_path, program)
    said = [line for line in job.start("distill").communicate()[0].splitlines() if line[0] != "["]
    assert said == ["capture", "distill"]
    publish(*(f"capture/{name}" for name in ("math", "code", "stem", "chat")))
    said = [line for line in job.start("distill").communicate()[0].splitlines() if line[0] != "["]
    assert said == ["distill"]


def test_nodes_are_told_their_numbers(folder, recipe, tmp_path):
    stages = {
        "align": {"nodes": 2, "launch": "ddp-cpu", "processes": 1, "launch_args": "--a 'b c'"}
    }
    job = Job(folder, recipe, tmp_path, 'printf "%s\\n" "${@: -2}"', index=None, stages=stages)
    srun = tmp_path / "bin" / "srun"
    srun.write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"\n'
    )
    srun.chmod(0o755)
    more = {"SLURM_ARRAY_JOB_ID": "", "MAIN_HOST": "first", "SLURM_JOB_ID": "20007"}
    out, _ = job.start("align", **more).communicate(timeout=20)
    said = [line for line in out.splitlines() if not line.startswith("[slurm]")]
    assert said == [
        "--launch-args",
        "--num_machines 2 --num_processes 2 --a 'b c' --machine_rank 1 --main_process_ip first "
        "--main_process_port 20007",
    ]


def test_an_empty_site_file_is_enough(folder, recipe):
    scripts = write(folder, recipe)
    assert not any("--account" in option for option in options(scripts["align"]))
    assert Site() == folder.saved_site()


def test_variables_of_the_shell_override_no_option_of_a_script(folder, recipe):
    script = write(folder, recipe, defaults={"account": "mine"})["distill"]
    environment = {
        "SBATCH_ACCOUNT": "other",
        "SBATCH_PARTITION": "gpu",
        "SBATCH_ARRAY_INX": "7",
        "SLURM_CONF": "here",
        "SLURM_JOB_ID": "1",
        "HOME": "/root",
    }
    assert submission_environment(script, environment) == {
        # The site file names no partition: the shell's counts.
        "SBATCH_PARTITION": "gpu",
        "SLURM_CONF": "here",
        "HOME": "/root",
    }

"""Stages in several processes, as a user starts them.

Through --launch, accelerate launch, torchrun and the console script.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import process_environment, run_python

pytestmark = pytest.mark.multi_process

ROOT = Path(__file__).parents[2]
RECIPE, CONFIGS = ROOT / "recipes" / "quickstart.yaml", ROOT / "recipes" / "accelerate"
SETS = (
    "align.tokens=8192", "align.batch=4", "align.warmup_steps=1", "data.validation_rows=4",
    "capture.targets=online", "distill.batch=4", "distill.warmup_steps=1",
    "distill.experts={math: {phases: [{domain: math, tokens: 8192}]}}",
)  # fmt: skip
CPU = str(CONFIGS / "ddp-cpu.yaml")


def words(stage: str, run: Path, *more: str, sets: tuple[str, ...] = SETS) -> list[str]:
    """The command line of a stage with these overrides."""
    overrides = [word for value in sets for word in ("--set", value)]
    return [stage, str(RECIPE), "--run-dir", str(run), *more, *overrides]


def cli(*arguments: str, shims: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return run_python("-m", "xlstm_distill", *arguments, shims=shims)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory) -> Path:
    """A run whose student was aligned by the processes that --launch started."""
    run = tmp_path_factory.mktemp("launch") / "run"
    done = cli(*words("align", run, "--launch", CPU))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("align     done in") == 1
    return run


ACCELERATE = ("accelerate.commands.launch", "--config_file", CPU)
SCRIPT = str(Path(sys.executable).parent / "xlstm-distill")
LAUNCHERS = (
    pytest.param((*ACCELERATE, SCRIPT), id="accelerate-console-script", marks=pytest.mark.slow),
    # The quick tests align through --launch, which is the first of these in one command.
    pytest.param(
        (*ACCELERATE, "-m", "xlstm_distill"), id="accelerate-module", marks=pytest.mark.slow
    ),
    pytest.param(
        ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xlstm_distill"),
        id="torchrun",
        marks=pytest.mark.slow,
    ),
)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_work_as_well(launcher, aligned):
    done = run_python("-m", *launcher, *words("align", aligned))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("align     already done") == 1


ZERO = [
    pytest.param(f"zero{stage}", marks=[pytest.mark.deepspeed, pytest.mark.slow])
    for stage in (1, 2, 3)
]


# The quick suite trains, resumes and saves under FSDP2 in test_resume.py.
@pytest.mark.parametrize("name", [pytest.param("fsdp2", marks=pytest.mark.slow), *ZERO])
def test_a_sharded_expert_is_saved_whole(name, aligned, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import xlstm_distill  # noqa: F401  (makes students known to the Auto classes)

    run = shutil.copytree(aligned, tmp_path / "run")
    options = "--num_processes 2 --mixed_precision no"
    launch = ("--launch", str(CONFIGS / f"{name}.yaml"), "--launch-args", options)
    # DeepSpeed has no checkpoints of its own.
    checkpoints = () if name == "fsdp2" else ("--set", "training.checkpoint_steps=null")
    sharded = words("distill", run, *launch, "--set", "capture.shard_teacher=true", *checkpoints)
    done = cli(*sharded, shims=True)  # without them, neither shards on CPUs
    assert done.returncode == 0, done.stderr
    models = [run / "artifacts" / stage / "model" for stage in ("align", "distill/math")]
    before, after = (load_file(model / "model.safetensors") for model in models)
    assert {name: w.shape for name, w in before.items()} == {
        name: w.shape for name, w in after.items()
    }
    assert any((before[name] != after[name]).any() for name in before)
    _, loading = AutoModelForCausalLM.from_pretrained(models[1], output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]


# Slow: test_accelerator.py makes the same comparison without processes.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2", ZERO[2]])
def test_sharding_that_would_silently_not_happen_is_refused(name, aligned, tmp_path):
    run = shutil.copytree(aligned, tmp_path / "run")
    options = "--num_processes 2 --mixed_precision no"
    launch = ("--launch", str(CONFIGS / f"{name}.yaml"), "--launch-args", options)
    done = cli(*words("distill", run, *launch))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    asked = {"fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}[name]
    assert any(
        f"asked for {asked} on 2 processes, and accelerate runs DDP on 2 processes" in line
        for line in lines
    )
    assert "Traceback" not in done.stderr
    assert not list(run.glob("artifacts/distill/*"))


def test_several_processes_that_accelerate_would_not_start_are_refused(tmp_path):
    config = (CONFIGS / "ddp-cpu.yaml").read_text().replace("MULTI_GPU\nmixed", "MULTI_CPU\nmixed")
    (tmp_path / "multi_cpu.yaml").write_text(config)
    done = cli(*words("align", tmp_path / "run", "--launch", str(tmp_path / "multi_cpu.yaml")))
    assert done.returncode == 2
    assert "several processes were asked for and one was started" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_bad_recipe_is_said_once(tmp_path):
    launched = words("align", tmp_path / "run", "--launch", CPU, "--set", "align.lr=fast")
    done = cli(*launched)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "align.lr" in done.stderr
    done = cli(*words("align", tmp_path / "run", "--launch-args", "--num_processes 2"))
    assert done.returncode == 2
    assert "--launch-args: '--num_processes 2' has no effect without --launch" in done.stderr


def logged_steps(run: Path) -> int:
    """Count the steps in the logs of a run's trainings."""
    return sum(log.read_text().count("\n") for log in run.glob("training/*/log.jsonl"))


@contextlib.contextmanager
def training(run: Path, *sets: str):
    """Start an endless alignment in two processes, as a terminal does: in a session of its own."""
    command = words("align", run, "--launch", CPU, sets=("align.tokens=4000000", *SETS[1:], *sets))
    process = subprocess.Popen(
        [sys.executable, "-m", "xlstm_distill", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=process_environment(),
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=listen_to_ctrl_c,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def listen_to_ctrl_c() -> None:
    """A shell may have started the tests in the background, where it ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(process: subprocess.Popen[str], is_there) -> None:
    deadline = time.monotonic() + 240
    while not is_there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def prepared(aligned, tmp_path) -> Path:
    """A run that has its rows and nothing else."""
    run = tmp_path / "run"
    shutil.copytree(aligned / "artifacts" / "data", run / "artifacts" / "data")
    return run


# What a terminal and a scheduler send differs in the exit code alone, so that one of them is quick.
@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGINT, "Ctrl-C", 130),
        pytest.param(signal.SIGTERM, "SIGTERM", 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "SIGUSR1", 75, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_launcher_makes_all_processes_write_a_checkpoint(
    number, name, code, prepared
):
    with training(prepared, "align.batch=4") as process:
        wait_for(process, lambda: logged_steps(prepared) >= 3)
        os.killpg(process.pid, number)  # a terminal tells its whole process group
        _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    # One process speaks for all.
    message = re.findall(
        rf"stopped by {name} after \d+ of \d+ steps of align, with a checkpoint; .*", errors
    )
    assert len(message) == 1, errors
    (checkpoint,) = prepared.glob("training/*/step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert f"to go on at step {step} of " in message[0]
    assert logged_steps(prepared) == step


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_processes_at_once(prepared):
    """A step of 1024 rows takes many seconds: the first Ctrl-C waits for its end."""
    with training(prepared, "align.batch=1024", "align.micro_batch=8") as process:
        wait_for(process, lambda: list(prepared.glob("training/*/training.json")))
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        _, errors = process.communicate(timeout=100)
    assert time.monotonic() - started < 30
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line]
    assert lines[0].startswith("Ctrl-C: the training ends after this step.")
    expected = "Interrupted. Run the same command again: align goes on at step 0 of "
    assert [line.startswith(expected) for line in lines[1:]] == [True], errors
    assert logged_steps(prepared) == 0
    assert not list(prepared.glob("training/*/step-*"))


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that a launcher has started for the command line."""
    children = psutil.Process(launcher.pid).children()
    return [child for child in children if "xlstm_distill" in child.cmdline()]


@pytest.mark.slow
def test_a_second_run_is_told_who_trains_and_a_killed_launcher_leaves_nobody(prepared):
    sets = ("align.batch=4", "training.checkpoint_steps=2")
    with training(prepared, *sets) as process:
        wait_for(process, lambda: logged_steps(prepared) >= 3)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        again = words("align", prepared, sets=("align.tokens=4000000", *SETS[1:], *sets))
        refused = cli(*again)
        assert refused.returncode == 1
        holder = re.search(r"another process \(pid (\d+) on (.*)\) is at it", refused.stderr)
        assert int(holder[1]) in [rank.pid for rank in ranks], refused.stderr
        assert holder[2] == platform.node()
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=10)
        assert not alive
        _, errors = process.communicate(timeout=10)
        assert errors.count("is gone, so this run ends; run the same command again") == 1, errors
    before = logged_steps(prepared)
    # The lock is free, and the training goes on.
    with training(prepared, *sets) as process:
        wait_for(process, lambda: logged_steps(prepared) > before)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=100)
    assert process.returncode == 130

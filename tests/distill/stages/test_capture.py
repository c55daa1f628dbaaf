"""The capture stage: shared, interrupted or resumed, it always makes the same files."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from capture_process import SETTINGS, run_capture
from processes import process_environment

from xlstm_distill.artifacts import Run
from xlstm_distill.data.budget import captured_rows
from xlstm_distill.data.rows import load_batch
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.losses.plain import sparse_kl
from xlstm_distill.models.teacher import load_teacher
from xlstm_distill.recipe import load_recipe
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import capture, distill
from xlstm_distill.stages.distill import _targets
from xlstm_distill.stages.lineage import Lineage
from xlstm_distill.stages.prepare import prepare_rows
from xlstm_distill.stages.workbench import open_domains
from xlstm_distill.targets.providers import OnlineTargets

SCRIPT = Path(__file__).parents[2] / "helpers" / "capture_process.py"
RECIPE = str(Path(__file__).parents[3] / "recipes" / "quickstart.yaml")


def shards(run, domain="math"):
    """Content of a published domain's shards."""
    return {
        p.name: p.read_bytes()
        for p in sorted((run / "artifacts/capture" / domain / "store").glob("*.bin"))
    }


def leftovers(run):
    """Anything in the capture's folder besides published domains."""
    return {p.name for p in (run / "artifacts/capture").iterdir()} - {"math", "chat"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that captured everything at once."""
    directory = tmp_path_factory.mktemp("capture") / "run"
    lines = run_capture(RECIPE, str(directory))
    assert any(
        "capture/math: " in line and "KL error" in line and "read at" in line for line in lines
    )
    return directory


@pytest.fixture
def fresh(reference, tmp_path):
    """A run with the same rows and no targets."""
    shutil.copytree(reference, tmp_path / "run", ignore=shutil.ignore_patterns("capture"))
    return tmp_path / "run"


@pytest.fixture
def written(monkeypatch):
    """Shards that this process writes."""
    numbers = []
    write = capture.DomainCapture._write_shard

    def noted(self, shard, *rest):
        numbers.append((self.rows.name, shard.number))
        write(self, shard, *rest)

    monkeypatch.setattr(capture.DomainCapture, "_write_shard", noted)
    return numbers


def opened(directory):
    loaded = load_recipe(Path(RECIPE), SETTINGS)
    run = Run.open(directory, loaded)
    lineage = Lineage(loaded)
    return lineage, run, prepare_rows(lineage, run, ["math", "chat"], QuietConsole())


def captured(run):
    return {name: run.load(f"capture/{name}") for name in ("math", "chat")}


def test_the_store_reaches_the_goal_and_gives_the_loss_of_the_teacher_at_work(reference):
    lineage, run, data = opened(reference)
    loaded = lineage.recipe
    figures = run.load("capture/math").manifest["results"]
    assert figures["bytes_per_token"] <= 160
    assert figures["mean_kl_error"] <= 1e-3
    assert figures["mean_k"] >= 4
    assert len(shards(reference)) > 2
    rows = open_domains(loaded, data, captured_rows(loaded))
    stored = _targets(lineage, captured(run), Accelerator(cpu=True))
    teacher = load_teacher(loaded.teacher)
    online = OnlineTargets(teacher, 256, loaded.capture.mass, loaded.capture.min_k)
    batch = load_batch(rows, [("math", 20), ("chat", 3), ("math", 0)])
    mine, theirs = stored(batch), online(batch)
    student = torch.randn(
        len(mine.tail), teacher.config.vocab_size, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(
        sparse_kl(student, mine).mean(), sparse_kl(student, theirs).mean(), rtol=1e-3, atol=1e-3
    )


def test_shares_make_the_same_files_and_the_last_one_publishes(reference, fresh, written):
    lines = run_capture(RECIPE, str(fresh), "1/2")
    assert {number % 2 for _, number in written} == {1}
    assert not (fresh / "artifacts/capture/math").exists()
    assert any(
        "this share is done; " in line and "are still to come from others (0, 2" in line
        for line in lines
    )
    run_capture(RECIPE, str(fresh), "0/2")
    assert (
        len(written) == len(set(written)) == len(shards(reference)) + len(shards(reference, "chat"))
    )
    for domain in ("math", "chat"):
        assert shards(fresh, domain) == shards(reference, domain)
    assert not leftovers(fresh)
    before = len(written)
    run_capture(RECIPE, str(fresh), "1/2")
    assert len(written) == before


def test_the_seconds_of_a_capture_are_those_of_the_teacher_too(fresh, monkeypatch):
    write = capture.DomainCapture._write_shard
    slow = lambda *given: (time.sleep(0.2), write(*given))  # noqa: E731
    monkeypatch.setattr(capture.DomainCapture, "_write_shard", slow)
    run_capture(RECIPE, str(fresh))
    manifest = json.loads((fresh / "artifacts/capture/math/manifest.json").read_text())
    assert manifest["wall_seconds"] > 0.2 * len(shards(fresh))


def test_only_missing_and_damaged_shards_are_made_again(reference, fresh, written):
    run_capture(RECIPE, str(fresh), "0/2")
    (gathered,) = (fresh / "artifacts/capture").glob(".math.*.shards")
    damaged = gathered / "store/targets-00002.bin"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (gathered / "store/.targets-00001.bin.0123456789ab.partial").write_bytes(b"half a shard")
    written.clear()
    lines = run_capture(RECIPE, str(fresh))
    odd = [n for n in range(len(shards(reference))) if n % 2]
    assert sorted(number for name, number in written if name == "math") == sorted([*odd, 2])
    assert any("targets-00002.bin: cut short" in line and "made again" in line for line in lines)
    assert shards(fresh) == shards(reference)
    assert not list(fresh.rglob("*.partial"))


def test_shards_of_other_settings_stay_and_are_gone_on_from(fresh, written):
    other = ("capture.top_k=128",)
    run_capture(RECIPE, str(fresh), "0/2", changes=other)
    done = list(written)
    lines = run_capture(RECIPE, str(fresh))
    (kept,) = (fresh / "artifacts/capture").glob(".math.*.shards")
    said = [line for line in lines if "with other settings stay in" in line]
    assert len(said) == 2
    assert any(str(kept) in line for line in said)
    written.clear()
    run_capture(RECIPE, str(fresh), changes=other)
    assert not set(done) & set(written)
    assert not list((fresh / "artifacts/capture").glob(".*.shards"))


def test_a_store_that_is_not_the_teachers_is_not_published(fresh, monkeypatch):
    def other(config, device="cpu"):
        teacher = load_teacher(config, device)
        with torch.no_grad():
            teacher.model.norm.weight.mul_(0.5)
        return teacher

    monkeypatch.setattr(capture, "SELF_TEST_ROWS", 12)
    monkeypatch.setattr(capture, "load_teacher", other)
    run_capture(RECIPE, str(fresh), "0/2")
    monkeypatch.setattr(capture, "load_teacher", load_teacher)
    with pytest.raises(
        RunError,
        match=r"self-test failed: at row \d+ the teacher is .* nats from the stored targets",
    ):
        run_capture(RECIPE, str(fresh), "1/2")
    assert not (fresh / "artifacts/capture/math").exists()


def test_distillation_refuses_a_store_of_another_tokenizer(reference, monkeypatch):
    lineage, run, _ = opened(reference)
    other = Lineage(lineage.recipe)
    for name in ("math", "chat"):
        other.data_identity(name)  # so that nothing but the tokenizer differs
    other.tokenizer_hash = "others"
    with pytest.raises(
        RunError,
        match=r"index\.json: belongs to another run: its tokenizer is .*, here it is 'others'",
    ):
        _targets(other, captured(run), Accelerator(cpu=True))


def test_an_online_teacher_is_loaded_once(reference, monkeypatch):
    loaded = load_recipe(Path(RECIPE), [*SETTINGS, "capture.targets=online"])
    loads = []
    monkeypatch.setattr(
        distill, "load_teacher", lambda *given: loads.append(given) or load_teacher(*given)
    )
    assert isinstance(_targets(Lineage(loaded), {}, Accelerator(cpu=True)), OnlineTargets)
    assert len(loads) == 1


@pytest.mark.parametrize("text", ["2/2", "1", "a/2", "-1/2", "0/0", "1/2/3", ""])
def test_a_share_that_is_none_is_one_line(text):
    loaded = load_recipe(Path(RECIPE), SETTINGS)
    with pytest.raises(UserError, match=r"--shard: .* must be I/N with I from 0 to N - 1"):
        capture.capture(Lineage(loaded), None, QuietConsole(), text)


def test_a_share_of_online_targets_is_refused():
    loaded = load_recipe(Path(RECIPE), (*SETTINGS, "capture.targets=online"))
    with pytest.raises(UserError, match=r"--shard: capture\.targets is 'online'"):
        capture.capture(Lineage(loaded), None, QuietConsole(), "0/2")


@pytest.mark.parametrize(
    ("rows", "context"), [(1, 64), (1000, 64), (2356, 256), (10**6, 4096), (5 * 10**6, 4096)]
)
def test_shards_cover_all_rows_once(rows, context):
    plan = capture.plan_shards(rows, context)
    assert [n for s in plan for n in (s.first, s.first + s.count)][1:-1] == [
        s.first for s in plan[1:] for _ in "ab"
    ]
    assert (plan[0].first, plan[-1].first + plan[-1].count) == (0, rows)
    assert [s.number for s in plan] == list(range(len(plan)))
    assert max(s.count for s in plan) * context <= 2**22


def start(run, share, wait, *launcher):
    command = [sys.executable, *launcher, str(SCRIPT), RECIPE, str(run), share, str(wait)]
    return subprocess.Popen(
        command,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-2000:]
    return output


@pytest.mark.multi_process
def test_after_sigkill_two_at_once_finish_the_work(reference, fresh):
    killed = start(fresh, "-", 0.2)
    deadline = time.monotonic() + 240
    while not list(fresh.glob("artifacts/capture/.math.*/store/targets-00001.bin")):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (fresh / "artifacts/capture/math").exists()
    other, before = start(fresh, "0/1", 0.05), len(list(fresh.rglob("targets-*.bin")))
    while other.poll() is None and len(list(fresh.rglob("targets-*.bin"))) == before:
        time.sleep(0.01)
    run_capture(RECIPE, str(fresh))  # both want all of it
    finish(other)
    for domain in ("math", "chat"):
        assert shards(fresh, domain) == shards(reference, domain)
    assert not leftovers(fresh)


# In the quick suite two runs of the program share the work: the test above.
@pytest.mark.slow
@pytest.mark.multi_process
def test_two_ranks_make_the_same_files(reference, fresh):
    output = finish(
        start(fresh, "-", 0, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    )
    assert output.count("read at") == 2  # once a domain, by the rank that published
    for domain in ("math", "chat"):
        assert shards(fresh, domain) == shards(reference, domain)
    assert not leftovers(fresh)

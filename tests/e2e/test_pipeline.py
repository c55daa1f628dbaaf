"""The whole pipeline on the embedded teacher, with small budgets, from the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import call_cli
from processes import process_environment, run_python
from safetensors.torch import load_file

from xlstm_distill.export.source import find_student

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
# One task of each domain: other tests load and check all of the quickstart's tasks.
TASKS = ("math_add", "code_expression", "stem_unit", "chat_copy")
SMALL = (
    "align.tokens=32768", "align.batch=4", "align.warmup_steps=2",
    "distill.experts={math: {phases: [{domain: math, tokens: 24576}]},"
    " chat: {phases: [{domain: chat, tokens: 24576}]}}",
    "distill.batch=4", "distill.warmup_steps=2", "evaluate.limit=6", "data.validation_rows=4",
    "evaluate.speed.seconds=0.1",
    "evaluate.tasks=["
    + ", ".join(f"{{name: qs_{task}, domain: {task.partition('_')[0]}}}" for task in TASKS)
    + "]",
)  # fmt: skip


def arguments(*words: str | Path, sets: tuple[str, ...] = SMALL) -> list[str | Path]:
    """A command's words, and an option --set for each override."""
    overrides = [word for value in sets for word in ("--set", value)]
    return [*words, *overrides]


def cli(*words: str | Path, sets: tuple[str, ...] = SMALL) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process."""
    return call_cli(*arguments(*words, sets=sets))


def cli_process(
    *words: str | Path, sets: tuple[str, ...] = SMALL
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own: also libraries' own output is seen."""
    return run_python("-m", "xlstm_distill", *arguments(*words, sets=sets), cwd="/")


def in_two_processes(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line under torchrun, in two processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return run_python(*launcher, "-m", "xlstm_distill", *arguments(*words))


def one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The error's line, after checking that there is one, no traceback, and the right exit code."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def manifests(run: Path) -> dict[str, int]:
    """When each artifact was published; those that are kept from earlier settings are left out."""
    found = [p for p in (run / "artifacts").rglob("manifest.json") if ".kept-" not in str(p)]
    return {p.parent.relative_to(run / "artifacts").as_posix(): p.stat().st_mtime_ns for p in found}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small run that all tests share; they only read it. One real process made it."""
    directory = tmp_path_factory.mktemp("pipeline") / "run"
    done = cli_process("run", RECIPE, "--run", directory)
    assert done.returncode == 0, done.stderr
    assert f"Report: {directory / 'report' / 'report.html'}" in done.stdout
    assert "\x1b" not in done.stdout
    return directory


def test_every_stage_publishes_an_artifact_with_a_manifest(run):
    found = set(manifests(run))
    experts, domains = {"math", "chat"}, {"math", "code", "stem", "chat"}
    assert found == {
        *(f"data/{d}" for d in domains), *(f"capture/{e}" for e in experts), "align",
        *(f"distill/{e}" for e in experts), "merge",
        *(f"evaluate/{m}" for m in ("teacher", "merged", *experts)), "report",
    }  # fmt: skip
    for label in found:
        manifest = json.loads((run / "artifacts" / label / "manifest.json").read_text())
        assert manifest["seed"] == 0
        assert manifest["wall_seconds"] >= 0
        assert {"recipe", "inputs", "versions", "fingerprint"} <= set(manifest)
    assert not list((run / "artifacts").rglob("*.partial"))


def test_a_stage_that_is_killed_and_then_told_to_stop_ends_as_if_nothing_had_been(run, tmp_path):
    """After SIGKILL, SIGTERM and Ctrl-C, the weights equal those of an undisturbed run exactly."""
    shutil.copytree(run / "artifacts" / "data", tmp_path / "artifacts" / "data")
    words = ["align", RECIPE, "--run", tmp_path, "--set", "training.checkpoint_steps=3"]
    command = [sys.executable, "-m", "xlstm_distill", *map(str, arguments(*words))]
    ends = ((signal.SIGKILL, 4, -signal.SIGKILL), (signal.SIGTERM, 8, 75), (signal.SIGINT, 12, 130))
    told = {}
    for number, step, code in ends:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment(),  # with as many threads as the undisturbed run
            # A shell may have started the tests in the background, where it ignores SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and not any(
            log.read_text().count("\n") > step
            for log in (tmp_path / "training").glob("align-*/log.jsonl")
        ):
            time.sleep(0.01)
        process.send_signal(number)
        _, told[number] = process.communicate(timeout=120)
        assert process.returncode == code, told[number]
    assert "stopped by SIGTERM after " in told[signal.SIGTERM]
    stopped = r"stopped by Ctrl-C after (\d+) of 22 steps of align, with a checkpoint; .* \1 of 22"
    goes_on_at = re.search(stopped, told[signal.SIGINT])[1]
    status = cli("status", tmp_path, sets=()).stdout
    assert re.search(r"align +stopped \d:\d\d ago at checkpoint \d+ +\d+ of 22", status)
    done = cli(*words)
    assert f"align: goes on at step {goes_on_at} of 22" in done.stdout, done.stderr
    model = Path("artifacts", "align", "model", "model.safetensors")
    assert (tmp_path / model).read_bytes() == (run / model).read_bytes()
    assert not list((tmp_path / "training").iterdir())
    artifact = tmp_path / "artifacts" / "align"
    log = [json.loads(line) for line in (artifact / "log.jsonl").read_text().splitlines()]
    # The artifact's seconds count the work of all three processes.
    steps = [4 * 384 / line["tokens_per_second"] for line in log]
    assert len(steps) == 22
    assert json.loads((artifact / "manifest.json").read_text())["wall_seconds"] > sum(steps)


def test_models_are_hugging_face_directories_that_generate(run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import xlstm_distill  # noqa: F401  (makes students known to the Auto classes)

    for label in ("align", "distill/math", "merge"):
        folder = run / "artifacts" / label / "model"
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            p.name for p in folder.iterdir()
        }
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("Repeat: sun fog", return_tensors="pt")
    answer = student.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_the_report_holds_every_model(run):
    report = json.loads((run / "report" / "report.json").read_text())
    assert {p.name for p in (run / "report").iterdir()} == {
        "report.html",
        "report.md",
        "report.json",
    }
    assert [m["name"] for m in report["models"]] == ["merged", "math", "chat"]
    for model in report["models"]:
        assert set(model["scores"]) == set(report["teacher"]["scores"])
        assert 0 <= model["critical_tolerance"] <= 1
        assert "0.05" in model["win_and_tie"]
        assert len(model["recovery"]) == len(model["scores"])
    # The experts have the merged student's shapes.
    assert set(report["speed"]) == {"teacher", "merged"}
    assert sum(report["items"].values()) == 6 * len(TASKS)
    own = {"qs_math_add": "math", "qs_chat_copy": "chat"}  # of two domains there are experts
    assert {task: v["expert"] for task, v in report["merging"]["tasks"].items()} == own
    gates = report["gates"]["merged"]
    assert (len(gates), len(gates[0])) == (4, 4)
    html = (run / "report" / "report.html").read_text()
    assert 'src="http' not in html


def test_run_again_nothing_is_made_anew(run):
    before = manifests(run)
    done = cli("run", RECIPE, "--run", run)
    assert done.returncode == 0, done.stderr
    assert manifests(run) == before
    assert done.stdout.count("already done") == 6


def test_new_merge_weights_redo_only_what_depends_on_them(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", copy_function=shutil.copy2)
    before = manifests(copy)
    variant = "merge.variants={trimmed: {method: ties, density: 0.2}}"
    sets = (*SMALL, "merge.weights={math: 0.25, chat: 0.75}", variant)
    done = cli("run", RECIPE, "--run", copy, sets=sets)
    assert done.returncode == 0, done.stderr
    after = manifests(copy)
    assert {label for label in after if after[label] != before.get(label)} == {
        "merge", "variant/trimmed", "evaluate/merged", "evaluate/trimmed", "report",
    }  # fmt: skip
    report = json.loads((copy / "report" / "report.json").read_text())
    roles = {model["name"]: model["role"] for model in report["models"]}
    assert roles == {"merged": "merged", "math": "expert", "chat": "expert", "trimmed": "variant"}
    # The earlier ones are kept: back to their settings, nothing is made.
    done = cli("run", RECIPE, "--run", copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("put back") == 3
    back = manifests(copy)
    assert {label: back[label] for label in before} == before


@pytest.mark.slow
def test_patches_of_a_runs_experts_are_measured(run, capsys):
    from xlstm_distill.benchmarks.patches import main

    before = manifests(run)
    assert main([str(run / "recipe.yaml"), str(run), "--density", "0.05", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:2] == "| "]
    head, aligned, sparse, dense, expert = (row for row in rows)
    assert head[4:] == ["math", "chat", "mean", "against experts"]
    assert (aligned[0], expert[0]) == ("aligned student", "expert")
    assert 0 < float(sparse[3].rstrip("%")) < 100
    # All differences, each rounded to bf16: the scores of the expert itself.
    assert float(dense[3].rstrip("%")) > 99.9
    assert dense[4:-1] == expert[4:-1]
    assert dense[-1].startswith("+0.0 [")
    assert manifests(run) == before


def test_a_longer_expert_redoes_only_itself(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", copy_function=shutil.copy2)
    before = manifests(copy)
    expert = "{domain: math, tokens: 24576}"
    longer = [value.replace(expert, "{domain: math, tokens: 32768}") for value in SMALL]
    assert longer != list(SMALL)
    done = cli("run", RECIPE, "--run", copy, sets=tuple(longer))
    assert done.returncode == 0, done.stderr
    after = manifests(copy)
    assert {label for label in after if after[label] != before[label]} == {
        "data/math", "capture/math", "distill/math", "merge",
        "evaluate/math", "evaluate/merged", "report",
    }  # fmt: skip


@pytest.mark.slow
def test_a_refined_expert_is_merged_and_nothing_before_it_is_made_again(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", copy_function=shutil.copy2)
    before = manifests(copy)
    line = one_line(cli("refine", RECIPE, "--run", copy), 2)
    assert "the recipe has no such section" in line
    section = (
        "refine={tokens: 6144, batch: 8, lr: 1.0e-4, prompt_tokens: 160, new_tokens: 32,"
        " experts: [chat]}"
    )
    done = cli("run", RECIPE, "--run", copy, sets=(*SMALL, section))
    assert done.returncode == 0, done.stderr
    assert "stage 4 of 7: refine" in done.stdout
    assert "on its own text KL" in done.stdout
    after = manifests(copy)
    made = {label for label in after if after[label] != before.get(label)}
    assert made == {
        "refine/chat", "merge", "evaluate/chat", "evaluate/merged", "report",
    }  # fmt: skip
    weights = {
        label: load_file(copy / "artifacts" / label / "model" / "model.safetensors")
        for label in ("distill/math", "distill/chat", "refine/chat", "merge")
    }
    name = "model.layers.0.mlp.up_proj.weight"
    math, chat, refined, merged = (found[name].double() for found in weights.values())
    assert not torch.equal(chat, refined)
    torch.testing.assert_close(merged, (math + refined) / 2, rtol=0, atol=1e-7)
    report = json.loads((copy / "report" / "report.json").read_text())
    assert "refine/chat" in json.dumps(report)
    # Who exports or chats gets the refined expert, as long as the recipe refines it.
    assert find_student(copy, "chat").directory.parts[-3:-1] == ("refine", "chat")
    again = cli("refine", RECIPE, "--run", copy, "--expert", "0", sets=(*SMALL, section))
    assert again.stdout.splitlines()[-1].split() == ["refine", "already", "done"]


@pytest.mark.parametrize("stage", ["distill", "merge", "evaluate", "report"])
def test_a_stage_that_lacks_what_it_builds_on_leaves_the_run_as_it_was(stage, run):
    before = manifests(run)
    line = one_line(cli(stage, RECIPE, "--run", run, sets=(*SMALL, "data.context=128")), 1)
    assert "made from other settings than this recipe's" in line
    assert manifests(run) == before


def test_stages_run_one_by_one_and_say_what_is_missing(tmp_path):
    line = one_line(cli("merge", RECIPE, "--run", tmp_path / "run"), 1)
    assert "run the stage 'distill' first" in line
    line = one_line(cli("distill", RECIPE, "--expert", "math", "--run", tmp_path / "run"), 1)
    assert "run the stage 'align' first" in line
    done = cli("align", RECIPE, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "align" in manifests(tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_in_one_line_and_keeps_what_was_there(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", copy_function=shutil.copy2)
    before = manifests(copy)
    broken = (*SMALL, "align.lr=1.0e+38", "align.clip=null")
    line = one_line(cli_process("run", RECIPE, "--run", copy, sets=broken), 1)
    assert "align: step" in line
    assert "is nan" in line or "is inf" in line
    assert manifests(copy) == before


def test_a_teacher_that_is_not_there_is_one_line(tmp_path):
    run = tmp_path / "run"
    absent = ("teacher.path=quickstart/nowhere",)
    line = one_line(cli_process("run", RECIPE, "--run", run, sets=absent), 2)
    assert "teacher.path: 'quickstart/nowhere' does not exist" in line
    (tmp_path / "empty").mkdir()
    empty = (f"teacher.path={tmp_path / 'empty'}",)
    line = one_line(cli("run", RECIPE, "--run", run, sets=empty), 2)
    assert "teacher.path" in line


def test_a_tokenizer_of_another_model_is_one_line(tmp_path):
    from transformers import AutoTokenizer

    teacher = shutil.copytree(ROOT / "recipes" / "quickstart" / "teacher", tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens([f"extra{n}" for n in range(2000)])
    tokenizer.save_pretrained(teacher)
    line = one_line(
        cli("run", RECIPE, "--run", tmp_path / "run", sets=(f"teacher.path={teacher}",)), 2
    )
    assert "do not belong together" in line


def test_a_task_that_is_not_there_is_told_before_anything_is_made(tmp_path):
    line = one_line(
        cli(
            "run", RECIPE, "--run", tmp_path / "run", sets=("evaluate.tasks=[{name: qs_math_ad}]",)
        ),
        2,
    )
    assert line == "error: evaluate.tasks: unknown task 'qs_math_ad'. Did you mean 'qs_math_add'?"
    assert manifests(tmp_path / "run") == {}


def test_debug_shows_where(tmp_path):
    done = cli("merge", RECIPE, "--run", tmp_path / "run", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


# The quick suite aligns in two processes through --launch, in test_launch.py.
@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_write_once_and_align_the_same_student(run, tmp_path):
    from safetensors.torch import load_file

    from xlstm_kernels.testing import error_ratio

    done = in_two_processes("align", RECIPE, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("align     done in") == 1
    one, two = (
        load_file(r / "artifacts" / "align" / "model" / "model.safetensors")
        for r in (run, tmp_path / "run")
    )
    for name, tensor in one.items():
        if not name.endswith("input_gate.bias"):  # its gradient is zero: Adam amplifies rounding
            assert error_ratio(two[name], tensor.double()) < 1e-3, name
    assert not list((tmp_path / "run" / "artifacts").rglob("*.partial"))


def test_a_student_of_windows_alone_goes_through_all_stages(tmp_path):
    """It has no new parameters: nothing to align, and no output gates to report."""
    windows = (
        "student.mixer.branches=[window]",
        "data.domains={math: {sources: [{generator: math, documents: 2000}]}}",
        "data.validation_rows=4", "capture.targets=online",
        "align.tokens=32768", "align.warmup_steps=0",
        "distill.experts={math: {phases: [{domain: math, tokens: 4096}]}}",
        "distill.warmup_steps=0",
        "evaluate.tasks=[{name: qs_math_add}]", "evaluate.limit=4",
    )  # fmt: skip
    done = cli("run", RECIPE, "--run", tmp_path / "run", sets=windows)
    assert done.returncode == 0, done.stderr
    assert "align: no new parameters to align with branches ['window']" in done.stdout.splitlines()
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert not report.get("gates")
    assert {"align", "distill/math", "merge", "evaluate/merged", "report"} <= set(
        manifests(tmp_path / "run")
    )
    again = cli("align", RECIPE, "--run", tmp_path / "run", sets=windows)
    assert again.stdout.splitlines()[-1].split() == ["align", "already", "done"]

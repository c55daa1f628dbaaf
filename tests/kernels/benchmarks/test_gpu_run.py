"""`make gpu`: its parts in a dry run on a CPU, what is done again, and what is left out."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from xlstm_kernels.benchmarks import gpu
from xlstm_kernels.benchmarks import parts as listed
from xlstm_kernels.benchmarks.parts import UNFINISHED, WITH_FAILURES, Part

PARTS = 9


def ledger(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_dry_run_runs_every_part(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)  # where make starts it
    status = gpu.main(["--out", str(tmp_path), "--dry-run", "--in-process"])
    log = (tmp_path / "log.txt").read_text()
    assert status == 0, log
    assert [line["status"] for line in ledger(tmp_path)] == ["done"] * PARTS, log
    assert log.count("=== part") == PARTS
    assert "right  mlstm float32 Dk=16 Dv=16" in log
    assert "WRONG" not in log
    assert "| context | batch | prefill tokens/s, student |" in log
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"rows.jsonl", "kernels.md", "kernels.json", "table.py", "tuned.jsonl"} <= names
    assert "decoding.jsonl" in names
    for rows in tmp_path.rglob("rows.jsonl"):
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        assert any(row["status"] == "timed" for row in found), rows
        assert not any(row["status"] in ("failed", "wrong") for row in found), rows


def test_the_parts_of_a_gpu_are_those_of_the_dry_run(tmp_path: Path) -> None:
    real, dry = listed.parts(tmp_path, "-n 8"), listed.dry_parts(tmp_path)
    assert len(real) == PARTS
    for part, small in zip(real, dry, strict=True):
        assert (part.name, part.module, part.budget) == (small.name, small.module, small.budget)
        assert part.limit + listed.GRACE <= 540  # a command may take ten minutes
        assert part.arguments != small.arguments


def test_every_part_takes_the_arguments_that_it_gets(tmp_path: Path) -> None:
    for part in (*listed.parts(tmp_path, "-n 8"), *listed.dry_parts(tmp_path)):
        if part.module == "pytest":  # the dry run has it collect these tests
            continue
        options = importlib.import_module(part.module).parse(part.command())
        assert ("--budget-s" in part.command()) == hasattr(options, "budget_s")
        if part.budget is not None:
            assert options.budget_s == part.budget
            # With less time, it stops by itself before it is asked to.
            short = part._replace(limit=100.0)
            options = importlib.import_module(part.module).parse(short.command())
            assert options.budget_s == 100 - listed.SPARE


def test_the_gpu_tests_have_an_order_and_all_are_in_it(root: Path) -> None:
    tree = ast.parse((root / listed.GPU_TESTS).read_text())
    found = [x.name for x in tree.body if isinstance(x, ast.FunctionDef) and "test_" in x.name]
    assert sorted(listed.CHEAP_FIRST) == sorted(found), "add it to CHEAP_FIRST, by what it compiles"
    others = root.glob("tests/**/test_*.py")
    marked = [path for path in others if "pytest.mark.gpu" in path.read_text()]
    assert [path for path in marked if path.name != Path(__file__).name] == [
        root / listed.GPU_TESTS
    ]
    named = [word.partition("::")[2] for word in listed.gpu_tests("") if "::" in word]
    assert tuple(named) == listed.CHEAP_FIRST
    # 30 cases of five head dims in three dtypes, with states.
    assert named[-1] == "test_mlstm_with_states"


HIDE = """
import runpy, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in sys.argv[1].split(",")
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
module, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_module(module, run_name="__main__")
"""


@pytest.mark.slow  # two processes that import transformers
@pytest.mark.parametrize("number", [8, 9])
def test_a_part_asks_for_what_it_needs_and_for_no_more(
    number: int, root: Path, tmp_path: Path
) -> None:
    part = listed.dry_parts(tmp_path)[number - 1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {word.partition(">")[0] for word in project["dependencies"]}
    # torch requires jinja2, and accelerate psutil.
    spare = names - {"pyyaml", "jinja2", "psutil"} - set(part.needs)
    assert {"datasets", "typer", "lm_eval", "rich"} <= spare
    no_children = ["--no-memory"] if "decoding" in part.module else []  # they would find all

    command = [sys.executable, "-c", HIDE, ",".join(spare), part.module, *part.command()]
    done = subprocess.run(
        [*command, *no_children], check=False, capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_wheel_has_the_name_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(listed.WHEELS, "no_such_module", "NoSuchWheel")
    assert Part("a", "a", (), needs=("sys", "no_such_module")).missing() == ["NoSuchWheel"]
    assert listed.WHEELS["yaml"] == "PyYAML"


def script(tmp_path: Path, name: str, code: str, **settings: object) -> Part:
    """A part that runs some lines of Python."""
    (tmp_path / f"{name}.py").write_text(code)
    return Part(name, name, (), needs=(), **settings)  # type: ignore[arg-type]


def run(tmp_path: Path, parts: list[Part], *options: str) -> int:
    chosen = gpu.parse(["--out", str(tmp_path / "out"), *options])
    with gpu.stop_signals() as stop:
        return gpu.run_parts(parts, chosen, stop)


@pytest.fixture
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("_importable")
def test_what_ended_well_is_not_run_again_and_all_else_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [
        script(tmp_path, "good", "print('all is well')"),
        script(tmp_path, "rows", f"raise SystemExit({WITH_FAILURES})"),
        script(tmp_path, "budget", f"raise SystemExit({UNFINISHED})"),
        script(tmp_path, "crash", "raise RuntimeError('no')"),  # a traceback ends with 1
        script(tmp_path, "usage", "raise SystemExit(2)"),
        script(tmp_path, "hangs", "import time\nprint('begun')\ntime.sleep(60)", limit=1.0),
        Part("wheels", "wheels", (), needs=("sys", "no_such_package")),
    ]
    assert run(tmp_path, parts) == 1
    out = tmp_path / "out"
    assert [(line["part"], line["status"]) for line in ledger(out)] == [
        ("good", "done"), ("rows", "done with failures"), ("budget", "unfinished"),
        ("crash", "failed"), ("usage", "failed"), ("hangs", "over its limit"),
        ("wheels", "left out"),
    ]  # fmt: skip
    said = capfd.readouterr().out
    assert "part 7 of 7, wheels: left out; bring wheels of no_such_package and what they" in said
    assert "part 4 of 7, crash: failed, exit status 1; see log.txt" in said
    assert "\nunfinished: budget\n" in said
    log = (out / "log.txt").read_text()
    assert all(line in log for line in ("all is well", "RuntimeError: no", "begun"))
    for name in ("crash", "usage", "budget", "hangs"):
        script(tmp_path, name, "print('mended')")
    assert run(tmp_path, parts[:6]) == 0
    said = capfd.readouterr().out
    assert "part 1 of 6, good: done before" in said
    assert "\ndone: 5\ndone with failures: rows\nThe same command goes on" in said
    # What failed is tried again when all that is new is there, and rows that failed come last.
    assert [line["part"] for line in ledger(out)][7:] == [
        "budget", "crash", "usage", "hangs", "rows",
    ]  # fmt: skip
    assert run(tmp_path, parts[:3], "--only", "1", "--again") == 0
    assert ledger(out)[-1]["part"] == "good"


@pytest.mark.usefixtures("_importable")
def test_no_part_begins_that_the_budget_does_not_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = script(tmp_path, "late", "raise SystemExit(3)")
    assert run(tmp_path, [part], "--budget-s", "50") == 0
    assert "late: not begun; --budget-s has 30 s left" in capsys.readouterr().out
    assert not (tmp_path / "out" / "parts.jsonl").exists()
    # One that the budget cuts short has not failed.
    monkeypatch.setattr(gpu, "SHORTEST", 0.5)
    cut = script(tmp_path, "cut", "import time; time.sleep(60)")
    assert run(tmp_path, [cut], "--budget-s", "21") == 0
    assert ledger(tmp_path / "out")[0]["status"] == "unfinished"


STUBBORN = """
import os, signal, subprocess, sys, time
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "its child"])
signal.signal(signal.SIGINT, signal.SIG_IGN)
with open("pids", "a") as file:
    file.write(f"{os.getpid()}\\n")
time.sleep(60)
"""


def ends(pid: int) -> bool:
    """Whether a process is gone within five seconds; one that nobody has waited for yet is."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.usefixtures("_importable")
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_stops_it_stops_the_part_and_what_that_started(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "STOP_GRACE", 0.2)
    part, pids = script(tmp_path, "stubborn", STUBBORN), tmp_path / "pids"

    def stop() -> None:
        while not pids.exists() or pids.read_text().count("\n") < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=stop)
    asking.start()
    assert run(tmp_path, [part, part._replace(name="next")]) == 128 + number
    asking.join()
    assert [(line["part"], line["status"]) for line in ledger(tmp_path / "out")] == [
        ("stubborn", "stopped")
    ]
    assert all(ends(int(pid)) for pid in pids.read_text().split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "99"], "--only 99: the parts are 1 to 9"),
        (["--only", "0"], "--only 0: the parts are 1 to 9"),
        (["--budget-s", "-5"], "'-5' is not a number of seconds above 0"),
        (["--budget-s", "nan"], "'nan' is not a number of seconds above 0"),
        (["--budget-s", "soon"], "'soon' is not a number of seconds above 0"),
        (["--from", "nowhere"], "--from nowhere: there is no parts.jsonl in it"),
        (["--out", __file__], "File exists; name a folder that can be written"),
    ],
)
def test_wrong_input_is_a_line_and_status_2(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_nothing_counts_as_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().out.startswith("There is no CUDA device. DRY=1")
    assert not (tmp_path / "parts.jsonl").exists()


@pytest.mark.usefixtures("_importable")
def test_a_new_folder_goes_on_after_an_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, late = script(tmp_path, "good", "print('once')"), script(tmp_path, "late", "print(2)")
    assert run(tmp_path, [part]) == 0
    earlier = tmp_path / "out"
    (earlier / "bench").mkdir()
    (earlier / "bench" / "rows.jsonl").write_text("{}\n")
    shutil.move(earlier, tmp_path / "earlier")
    for path in (tmp_path / "earlier").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)  # as a copy that is read-only
    for _ in range(2):  # the second time, it has results of its own
        gpu.bring(tmp_path / "earlier", earlier)
        assert run(tmp_path, [part, late]) == 0
    assert [line["part"] for line in ledger(earlier)] == ["good", "late"]
    assert (earlier / "bench" / "rows.jsonl").read_text() == "{}\n"
    said = capsys.readouterr().out
    assert said.count("Goes on after") == said.count("has results of its own") == 1


FAKE = """#!/bin/sh
test "$1" = -c && exit $TORCH
echo "$0"
test -z "$WAIT" && exit
trap 'echo ended; exit' TERM
echo waits
while true; do sleep 0.05; done
"""


def fake_python(path: Path) -> Path:
    """A Python that says where it is, and waits for SIGTERM where WAIT is set."""
    path.parent.mkdir(parents=True)
    path.write_text(FAKE)
    path.chmod(0o755)
    return path


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_takes_the_python_that_has_torch_and_ends_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(root / "Makefile", tmp_path)
    found, named = fake_python(tmp_path / "bin" / "python3"), fake_python(tmp_path / "own" / "py")
    monkeypatch.setenv("PATH", f"{found.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHON", raising=False)
    make = ["make", "-C", str(tmp_path), "--no-print-directory", "gpu", "OUT=out"]

    def said(*words: str, torch: int = 0) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("TORCH", str(torch))
        return subprocess.run([*make, *words], check=False, capture_output=True, text=True)

    assert said().stdout.strip().endswith("python3")
    fake_python(tmp_path / ".venv" / "bin" / "python")
    assert said().stdout.strip() == ".venv/bin/python"
    assert said(f"PYTHON={named}").stdout.strip() == str(named)
    without = said(torch=1)
    assert without.returncode == 2
    assert "'.venv/bin/python' is none. Name one: make gpu PYTHON=" in without.stdout
    with subprocess.Popen(
        make, stdout=subprocess.PIPE, text=True, env=os.environ | {"WAIT": "1", "TORCH": "0"}
    ) as waiting:
        assert waiting.stdout is not None
        assert [waiting.stdout.readline().strip() for _ in range(2)][-1] == "waits"
        waiting.terminate()
        assert "ended" in waiting.stdout.read()

"""`make gpu`: its parts in a dry run on a CPU, what is done again, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from xlstm_kernels.benchmarks import gpu

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
    for rows in tmp_path.rglob("rows.jsonl"):
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        assert any(row["status"] == "timed" for row in found), rows
        assert not any(row["status"] in ("failed", "wrong") for row in found), rows


def test_the_parts_of_a_gpu_are_those_of_the_dry_run(tmp_path: Path) -> None:
    real, dry = gpu.parts(tmp_path, "-n 8"), gpu.dry_parts(tmp_path)
    assert len(real) == PARTS
    for part, small in zip(real, dry, strict=True):
        assert (part.name, part.module) == (small.name, small.module)
        assert part.limit <= 540  # a command may take ten minutes
        assert part.arguments != small.arguments


def script(tmp_path: Path, name: str, code: str, **settings: object) -> gpu.Part:
    """A part that runs some lines of Python."""
    (tmp_path / f"{name}.py").write_text(code)
    return gpu.Part(name, name, (), needs=(), **settings)  # type: ignore[arg-type]


def run(tmp_path: Path, parts: list[gpu.Part], *options: str) -> int:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    chosen = gpu.parse(["--out", str(out), *options])
    return gpu.run_parts(parts, out, chosen)


def test_what_ended_well_is_not_run_again_and_a_failure_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [
        script(tmp_path, "good", "print('all is well')"),
        script(tmp_path, "bad", "import sys; print('no'); sys.exit(2)"),
        script(tmp_path, "hangs", "import time\nprint('begun')\ntime.sleep(60)", limit=1.0),
        gpu.Part("wheels", "wheels", (), needs=("sys", "no_such_package")),
    ]
    assert run(tmp_path, parts) == 2
    out = tmp_path / "out"
    assert [(line["part"], line["status"]) for line in ledger(out)] == [
        ("good", "done"), ("bad", "failed"), ("hangs", "over its limit"), ("wheels", "left out"),
    ]  # fmt: skip
    said = capfd.readouterr().out
    assert "wheels: left out; bring wheels of: no_such_package" in said
    log = (out / "log.txt").read_text()
    assert all(line in log for line in ("all is well", "no", "begun"))
    script(tmp_path, "bad", "print('mended')")
    assert run(tmp_path, parts[:2]) == 0
    assert "good: done before" in capfd.readouterr().out
    assert [line["part"] for line in ledger(out)][4:] == ["bad"]


def test_no_part_begins_that_the_budget_does_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = script(tmp_path, "late", "raise SystemExit(3)")
    assert run(tmp_path, [part], "--budget-s", "30") == 0
    assert "late: not begun; --budget-s has 30 s left" in capsys.readouterr().out
    assert not (tmp_path / "out" / "parts.jsonl").exists()

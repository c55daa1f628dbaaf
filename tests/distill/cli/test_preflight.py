"""Batches that the processes of a run cannot share are refused before any work."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from xlstm_distill.cli.processes import preflight
from xlstm_distill.recipe import load_recipe
from xlstm_distill.stages.lineage import Lineage

Call = Callable[..., Result]
ErrorOf = Callable[[Result, int], str]


@pytest.fixture
def first_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be rank 0 of three; the others do not exist, so hashes cannot be shared with them."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(Lineage, "share_hashes", lambda lineage: None)


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_done(
    call: Call,
    stages: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error_of: ErrorOf,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    line = error_of(call(stage, "small.yaml"), 2)
    assert line == (
        f"error: {stage}.batch: 4 rows cannot be shared by 3 processes; take 3 or 6, or a "
        "number of processes that divides it."
    )
    assert not (tmp_path / "runs").exists()
    assert stages["calls"] == []


def test_every_batch_that_cannot_be_shared_is_named(
    call: Call,
    stages: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    errors_of: Callable[..., list[str]],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    found = errors_of(call("run", "small.yaml"), 2)
    assert [line.split(": ")[1] for line in found] == ["align.batch", "distill.batch"]
    assert not (tmp_path / "runs").exists()
    assert stages["calls"] == []


def test_only_the_first_process_refuses_a_batch(
    call: Call, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(preflight, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    try:
        result = call("run", "small.yaml")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.exit_code, result.output) == (2, "")
    assert stages["calls"] == []


def test_batches_do_not_matter_where_nothing_is_trained(
    call: Call,
    stages: dict[str, Any],
    tmp_path: Path,
    first_of_three: None,
    error_of: ErrorOf,
) -> None:
    assert call("capture", "small.yaml").exit_code == 0
    done = tmp_path / "runs" / "small" / "artifacts" / "align"
    done.mkdir()
    made_from = Lineage(load_recipe("small.yaml")).settings("align")
    (done / "manifest.json").write_text(json.dumps({"recipe": made_from}))
    assert call("align", "small.yaml").exit_code == 0
    other = call("align", "small.yaml", "--set", "align.lr=0.5")
    assert error_of(other, 2).startswith("error: align.batch: ")
    assert error_of(call("run", "small.yaml"), 2).startswith("error: distill.batch: 4 rows")


def test_a_batch_that_aligns_nothing_needs_no_sharing(
    call: Call, stages: dict[str, Any], first_of_three: None
) -> None:
    assert call("align", "small.yaml", "--set", "student.mixer.branches=[window]").exit_code == 0


def test_a_launcher_s_processes_are_counted_before_they_start(
    call: Call, monkeypatch: pytest.MonkeyPatch, error_of: ErrorOf
) -> None:
    config = Path(__file__).parents[3] / "recipes" / "accelerate" / "ddp-cpu.yaml"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # which the configuration sets: to be undone
    line = error_of(
        call("align", "small.yaml", "--launch", config, "--launch-args", "--num_processes 3"), 2
    )
    assert line.startswith("error: align.batch: 4 rows cannot be shared by 3 processes")

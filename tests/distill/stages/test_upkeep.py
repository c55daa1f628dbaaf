"""`verify` finds every changed byte; what is kept is listed, and removed when asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from xlstm_distill.artifacts import Draft, Request, Run
from xlstm_distill.cli.app import app
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.data.shards import write_rows
from xlstm_distill.errors import RunError, UserError
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import upkeep
from xlstm_distill.stages.workbench import load_student


class Recipe:
    seed = 0


def request_(stage: str, value: int = 1, name: str | None = None) -> Request:
    return Request(stage, parts={"value": value}, inputs={}, name=name)


def weights(draft: Draft) -> None:
    (draft.path / "model").mkdir()
    (draft.path / "model" / "model.safetensors").write_bytes(b"weights")
    draft.write_json("log.json", [1])


def rows(draft: Draft) -> None:
    draft.self_checked = ("rows-*.arrow",)
    row = PackedRow(np.arange(8), np.ones(8, bool), [8], used=8)
    write_rows(draft.path, [row] * 4, context=8, vocabulary=97)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two artifacts, and one that is kept."""
    opened = Run.open(tmp_path / "run", Recipe())
    opened.make(request_("align", 2), weights)
    opened.make(request_("align", 1), weights)
    opened.make(request_("data", name="math"), rows)
    return opened.directory


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def change(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_whole_run_is_said_to_be_whole(run):
    code, out, err = call("verify", run)
    assert (code, err) == (0, "")
    assert "artifacts/align: 2 files" in out
    assert "artifacts/data/math: 2 files" in out
    assert "MB (100%)" in out
    found = json.loads(call("verify", run, "--json")[1])
    assert found["ok"]
    assert [len(entry["problems"]) for entry in found["artifacts"]] == [0, 0, 0]


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("align/model/model.safetensors", 3),
        ("data/math/rows-00000.arrow", -1),
        ("data/math/index.json", 5),
    ],
)
def test_one_changed_bit_names_its_file(run, file, place):
    change(run / "artifacts" / file, place)
    code, out, err = call("verify", run)
    assert code == 1
    assert file in err
    assert "1 wrong of 2 files" in out or "index.json" in file
    found = json.loads(call("verify", run, "--json")[1])
    assert not found["ok"]


def test_a_missing_file_a_damaged_manifest_and_a_wrong_directory_are_said(run, tmp_path):
    (run / "artifacts" / "align" / "log.json").unlink()
    (run / "artifacts" / "data" / "math" / "manifest.json").write_text("{")
    code, _, err = call("verify", run)
    assert code == 1
    assert "log.json: missing; it was published with" in err
    assert "data/math/manifest.json: not a manifest" in err
    with pytest.raises(UserError, match="is no run directory"):
        upkeep.verify(tmp_path, QuietConsole())
    assert "damaged: log.json is missing" in " ".join(call("status", run)[1].split())


def test_a_file_that_was_added_is_said_and_is_an_error_beside_weights(run):
    (run / "artifacts" / "data" / "math" / "notes.txt").write_text("mine")
    code, out, err = call("verify", run)
    assert (code, err) == (0, "")
    assert "data/math/notes.txt: the manifest does not list it" in out
    (run / "artifacts" / "align" / "model" / "generation_config.json").write_text("{}")
    code, _, err = call("verify", run)
    assert code == 1
    assert "model/generation_config.json: the manifest does not list it" in err
    found = json.loads(call("verify", run, "--json")[1])["artifacts"]
    assert [len(entry["unlisted"]) for entry in found] == [0, 0, 1]


def test_an_artifact_without_checksums_is_no_error(run):
    path = run / "artifacts" / "align" / "manifest.json"
    content = json.loads(path.read_text())
    del content["files"]
    path.write_text(json.dumps({**content, "format": 2}))
    code, out, _ = call("verify", run)
    assert code == 0
    assert f"artifacts/align: {upkeep.NO_CHECKSUMS}" in out


def test_what_is_kept_is_listed_and_removed(run):
    kept = Run.open(run, Recipe()).kept_path("align", request_("align", 2).fingerprint)
    out = call("status", run)[1]
    assert "kept from earlier settings, 14 bytes ('xlstm-distill clean RUN' removes them):" in out
    assert f"artifacts/{kept.name}" in out
    listed = json.loads(call("status", run, "--json")[1])["kept"]
    assert [(one["label"], one["bytes"]) for one in listed] == [("align", 14)]
    code, out, _ = call("clean", run)
    assert code == 0
    assert f"removed artifacts/{kept.name} (14 bytes)" in out
    assert not kept.exists()
    assert sorted(p.name for p in (run / "artifacts").iterdir()) == ["align", "data"]


def test_a_changed_student_is_not_loaded(run):
    change(run / "artifacts" / "align" / "model" / "model.safetensors", 0)
    artifact = Run.open(run, Recipe()).need(request_("align", 1))
    with pytest.raises(RunError, match=r"model\.safetensors: its content changed"):
        load_student(artifact, None)

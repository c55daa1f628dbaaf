"""The committed evaluation items."""

from __future__ import annotations

from pathlib import Path

from xlstm_distill.embedded.items import files

QUICKSTART = Path(__file__).parents[3] / "recipes" / "quickstart"


def test_committed_tasks_are_what_the_generators_write() -> None:
    written = files()
    found = {path.name: path.read_text() for path in (QUICKSTART / "tasks").iterdir()}
    assert found == written

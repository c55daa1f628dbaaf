"""Validation items are new problems of the training side: none is held out."""

from __future__ import annotations

import json

from xlstm_distill.embedded.tasks import TASKS, is_held_out
from xlstm_distill.embedded.validation import (
    validation_files,
    validation_items,
    validation_name,
)


def test_no_item_is_held_out_and_none_comes_twice(root):
    asked = set()
    for path in (root / "recipes" / "quickstart" / "tasks").glob("*.jsonl"):
        asked |= {json.loads(line)["prompt"] for line in path.read_text().splitlines()}
    for task in TASKS.values():
        items = validation_items(task, 12, seed=4)
        assert len({item.key for item in items}) == 12
        assert not any(is_held_out(task.name, item.key) for item in items)
        assert not {item.prompt for item in items} & asked
        assert validation_items(task, 12, seed=4) == items != validation_items(task, 12, seed=5)


def test_each_task_of_a_generator_has_a_file_of_items():
    files = validation_files(["stem"], 3, 0)
    names = {validation_name(task) for task in TASKS.values() if task.domain == "stem"}
    assert set(files) == {f"{name}.{end}" for name in names for end in ("yaml", "jsonl")}
    assert all(len(files[f"{name}.jsonl"].splitlines()) == 3 for name in names)

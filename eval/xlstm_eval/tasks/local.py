"""Tasks of our own that are made from lm-eval's by changing a few settings (`local.yaml`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xlstm_eval.tasks.code import code_of_answers, pass_at_k

TABLE = Path(__file__).with_name("local.yaml")


@dataclass(frozen=True)
class LocalTask:
    """A task of our own: lm-eval's task ``original``, and what differs from it."""

    name: str
    original: str
    pass_at: tuple[int, ...]
    code_blocks: bool
    change: dict[str, Any]

    def settings(self, original: dict[str, Any]) -> dict[str, Any]:
        """Return lm-eval's settings of this task, given those of the original."""
        metric = {
            "metric": pass_at_k,
            "k": list(self.pass_at),
            "aggregation": "mean",
            "higher_is_better": True,
        }
        found = original | self.change | {"task": self.name, "metric_list": [metric]}
        if self.code_blocks:
            own = {"function": "custom", "filter_fn": code_of_answers}
            found["filter_list"] = [{"name": "extract_code", "filter": [own]}]
        return found


@functools.cache
def local_tasks() -> dict[str, LocalTask]:
    """Return our own tasks by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {
        name: LocalTask(
            name=name,
            original=row["from"],
            pass_at=tuple(row["pass_at"]),
            code_blocks=row.get("code_blocks", False),
            change=row.get("change", {}),
        )
        for name, row in table.items()
    }

"""Tasks of our own that are made from lm-eval's by changing a few settings (`local.yaml`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from xlstm_eval.records import EvalError
from xlstm_eval.tasks.code import code_of_answers, pass_at_k
from xlstm_eval.tasks.ruler import needle_settings

TABLE = Path(__file__).with_name("local.yaml")


@dataclass(frozen=True)
class LocalTask:
    """A task of our own: lm-eval's task ``original``, and what differs from it.

    With a ``length`` (tokens) it is one of RULER's, with prompts of that length.
    """

    name: str
    original: str
    pass_at: tuple[int, ...]
    code_blocks: bool
    change: dict[str, Any]
    length: int | None = None

    def settings(self, original: dict[str, Any], tokenizer: str | None = None) -> dict[str, Any]:
        """Return lm-eval's settings of this task, given those of the original.

        ``tokenizer`` is a folder, for tasks with a length. Raises EvalError: there is none.
        """
        if self.length is not None:
            if tokenizer is None:
                raise EvalError(f"{self.name}: its prompts are sized by a tokenizer. Give one.")
            return needle_settings(original, self.length, tokenizer) | {"task": self.name}
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
            pass_at=tuple(row.get("pass_at", ())),
            code_blocks=row.get("code_blocks", False),
            change=row.get("change", {}),
            length=row.get("length"),
        )
        for name, row in table.items()
    }


def task_length(name: str) -> int:
    """Return the tokens of a task's prompts and answers, or 0 where they are not all of one."""
    own = local_tasks().get(name)
    return 0 if own is None else own.length or 0

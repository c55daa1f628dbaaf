"""Validation items of the embedded tasks: new problems of the training side of the split.

Weights may be tuned on them: no evaluation item is among them, as their side of the split differs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import yaml

from xlstm_distill.embedded.items import definition
from xlstm_distill.embedded.tasks import TASKS, Item, Task, draw

DRAWS = 20
"""Draws for each item that is wanted; a task of few problems gives what it has by then."""


def validation_name(task: Task) -> str:
    """The name of a task's validation items in lm-eval; no evaluation task has it."""
    return f"validation_{task.domain}_{task.name}"


def validation_files(generators: Iterable[str], count: int, seed: int) -> dict[str, str]:
    """Return file name -> content for all tasks of these generators: YAML and items for lm-eval."""
    wanted = set(generators)
    written: dict[str, str] = {}
    for task in TASKS.values():
        if task.domain not in wanted:
            continue
        name = validation_name(task)
        lines = [
            json.dumps({"prompt": item.prompt, "answer": item.answer}) + "\n"
            for item in validation_items(task, count, seed)
        ]
        written[f"{name}.jsonl"] = "".join(lines)
        written[f"{name}.yaml"] = yaml.safe_dump(definition(name, task), sort_keys=False)
    return written


def validation_items(task: Task, count: int, seed: int) -> list[Item]:
    """Draw at most `count` different items that are not held out."""
    rng = random.Random(f"validation {seed} {task.name}")
    found: dict[str, Item] = {}
    for _ in range(DRAWS * count):
        if len(found) == count:
            break
        item = draw(task, rng, held_out=False)
        found.setdefault(item.key, item)
    return list(found.values())

"""Training conversations of the embedded domains: single questions as evaluated, and conversations of several turns."""

import difflib
import random
from collections.abc import Iterator
from typing import Any

from xlstm_distill.embedded.tasks import DOMAINS, TASKS, Item, Table, Task, draw, is_held_out
from xlstm_distill.errors import UserError

SINGLE_SHARE = 0.2  # conversations of one question, the form evaluation uses
RECALL_SHARE = 0.35  # conversations about a table; the rest chain questions of the domain's other tasks
SHORT_TABLE_SHARE = 0.4  # tables shorter than evaluated ones, from which recall is learnt first
MOST_TURNS = 7
# Harder tasks are drawn more often; 1 where not listed.
WEIGHTS = {"add": 3.0, "story": 2.0, "expression": 4.0, "variables": 3.0, "fact": 2.0, "sort": 1.5}


def documents(domain: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield `count` conversations of one domain, the same for the same seed, none of them about a held-out problem.

    Each is `{"messages": [{"role", "content"}, ...], "domain": ..., "task": ...}`, below 256 tokens.
    Raises UserError where the domain is unknown.
    """
    if domain not in DOMAINS:
        close = difflib.get_close_matches(str(domain), DOMAINS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(f"embedded domain '{domain}': unknown; allowed: {', '.join(DOMAINS)}.{hint}")
    return _documents(domain, count, seed)


def _documents(domain: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{seed} {domain}")
    tasks = [task for task in TASKS.values() if task.domain == domain]
    recall = [task for task in tasks if task.table]
    short = [task for task in tasks if not task.table]
    for _ in range(count):
        if rng.random() < RECALL_SHARE:
            yield _recall(rng.choice(recall), rng)
        else:
            yield _chain(short, rng)


def _chain(tasks: list[Task], rng: random.Random) -> dict[str, Any]:
    """Chain questions of short tasks: all of one task, or mixed."""
    turns = 1 if rng.random() < SINGLE_SHARE else rng.randint(2, MOST_TURNS)
    weights = [WEIGHTS.get(task.name, 1.0) for task in tasks]
    chosen = rng.choices(tasks, weights, k=turns if rng.random() < 0.5 else 1)
    picked = chosen if len(chosen) == turns else chosen * turns
    items = [draw(task, rng, held_out=False) for task in picked]
    name = picked[0].name if len(set(picked)) == 1 else "mixed"
    return _conversation(items, picked[0].domain, name)


def _recall(task: Task, rng: random.Random) -> dict[str, Any]:
    """Write one table and ask of several of its rows in turn, in any order and at any distance."""
    table = task.table
    assert isinstance(table, Table)
    if rng.random() < SINGLE_SHARE:
        return _conversation([draw(task, rng, held_out=False)], task.domain, task.name)
    short = rng.random() < SHORT_TABLE_SHARE
    rows = table.rows(rng, rng.randint(3, table.far) if short else rng.randint(table.far, table.most))
    turns = min(len(rows), rng.randint(4, 12))
    asked = [table.ask(rows, at) for at in rng.sample(range(len(rows)), turns)]
    items = [item for item in asked if not is_held_out(task.name, item.key)]
    if not items:
        return _conversation([draw(task, rng, held_out=False)], task.domain, task.name)
    # The table is written once, in the first turn; later turns only ask.
    text = table.text(rows)
    later = [Item(item.prompt.removeprefix(text), item.answer, item.key) for item in items[1:]]
    return _conversation([items[0], *later], task.domain, task.name)


def _conversation(items: list[Item], domain: str, task: str) -> dict[str, Any]:
    messages = []
    for item in items:
        messages += [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]
    return {"messages": messages, "domain": domain, "task": task}

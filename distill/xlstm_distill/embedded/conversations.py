"""Training conversations of the embedded domains: single questions as evaluated, and several turns.

Conversations of several turns hold more answers for the same text, so that a row teaches more.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator
from typing import Any

from xlstm_distill.embedded.problems import Item
from xlstm_distill.embedded.tasks import DOMAINS, TASKS, Task, draw, is_held_out
from xlstm_distill.errors import UserError

SINGLE_SHARE = 0.1  # conversations of one question, the form that evaluation uses
# Conversations about a long text; the rest chain questions of the domain's short tasks.
RECALL_SHARES = {"math": 0.2, "code": 0.25, "stem": 0.3, "chat": 0.4}
MOST_TURNS = 6  # of short questions
# Harder tasks are drawn more often; 1 where not listed.
WEIGHTS = {
    "add": 2.0,
    "story": 2.0,
    "expression": 3.0,
    "variables": 2.0,
    # Half the tokens of the longest texts are notes, which teach nothing.
    "far_16": 0.5,
}


def documents(domain: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield `count` conversations of one domain, the same for the same seed.

    None is about a held-out problem. Each is `{"messages": [{"role", "content"}, ...], "domain":
    ..., "task": ...}`, below 384 tokens.

    Raises:
        UserError: the domain is unknown.
    """
    if domain not in DOMAINS:
        close = difflib.get_close_matches(str(domain), DOMAINS, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UserError(
            f"embedded domain '{domain}': unknown; allowed: {', '.join(DOMAINS)}.{hint}"
        )
    return _documents(domain, count, seed)


def _documents(domain: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{seed} {domain}")
    tasks = [task for task in TASKS.values() if task.domain == domain]
    recall = [task for task in tasks if task.passage]
    short = [task for task in tasks if not task.passage]
    for _ in range(count):
        if rng.random() < RECALL_SHARES[domain]:
            (task,) = rng.choices(recall, _weights(recall))
            yield _about_a_text(task, rng)
        else:
            yield _chain(short, rng)


def _weights(tasks: list[Task]) -> list[float]:
    return [WEIGHTS.get(task.name, 1.0) for task in tasks]


def _chain(tasks: list[Task], rng: random.Random) -> dict[str, Any]:
    """Chain questions of short tasks: all of one task, or mixed."""
    turns = 1 if rng.random() < SINGLE_SHARE else rng.randint(2, MOST_TURNS)
    chosen = rng.choices(tasks, _weights(tasks), k=turns if rng.random() < 0.5 else 1)
    picked = chosen if len(chosen) == turns else chosen * turns
    items = [draw(task, rng, held_out=False) for task in picked]
    name = picked[0].name if len(set(picked)) == 1 else "mixed"
    return _conversation(items, picked[0].domain, name)


def _about_a_text(task: Task, rng: random.Random) -> dict[str, Any]:
    """Write one text and ask several of its questions in turn."""
    assert task.passage is not None
    if rng.random() < SINGLE_SHARE:
        return _conversation([draw(task, rng, held_out=False)], task.domain, task.name)
    passage = task.passage(rng, False)
    most = min(len(passage.questions), passage.turns)
    asked = rng.sample(passage.questions, rng.randint(most // 2, most))
    kept = [q for q in asked if not is_held_out(task.name, passage.text + q.prompt)]
    if not kept:
        return _conversation([draw(task, rng, held_out=False)], task.domain, task.name)
    # The text is written once, in the first turn; later turns only ask.
    items = []
    for number, question in enumerate(kept):
        whole = passage.text + question.prompt
        prompt = question.prompt if number else whole
        items.append(Item(prompt, question.answer, whole, question.level))
    return _conversation(items, task.domain, task.name)


def _conversation(items: list[Item], domain: str, task: str) -> dict[str, Any]:
    messages = []
    for item in items:
        messages.append({"role": "user", "content": item.prompt})
        messages.append({"role": "assistant", "content": item.answer})
    return {"messages": messages, "domain": domain, "task": task}

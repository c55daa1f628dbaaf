"""The embedded teacher's tasks: twenty-two in four domains, answered by exact match.

A task yields items. An item is one question as the evaluation asks it, its answer, and a key that
names the problem whatever its wording. A stable hash of the key says whether the item is held out,
so no evaluation problem is trained on, in any order of operands.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from xlstm_distill.embedded import problems, recall
from xlstm_distill.embedded.problems import Item
from xlstm_distill.embedded.recall import PassageMaker

DOMAINS = ("math", "code", "stem", "chat")
HELD_OUT_SHARE = 10  # one problem in ten is held out


@dataclass(frozen=True)
class Task:
    """One task of a domain; a recall task has the texts that it asks about.

    asked: what evaluation draws where it is not what training draws: longer texts.
    levels: of the drawn items, those that evaluation asks; all where empty. Training has all.
    """

    name: str
    domain: str
    draw: Callable[[random.Random], Item]
    passage: PassageMaker | None = None
    asked: Callable[[random.Random], Item] | None = None
    levels: tuple[int, ...] = ()


def is_held_out(task: str, key: str) -> bool:
    """Say whether evaluation has the problem, by a hash that is the same on every machine."""
    digest = hashlib.blake2b(f"{task}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def draw(task: Task, rng: random.Random, *, held_out: bool) -> Item:
    """Draw an item of one side of the split, by rejection."""
    make = task.asked if held_out and task.asked else task.draw
    while True:
        item = make(rng)
        if is_held_out(task.name, item.key) == held_out:
            return item


def held_out_items(task: Task, count: int, seed: int = 0) -> list[Item]:
    """Draw `count` different held-out items."""
    rng = random.Random(f"{seed} {task.name}")
    found: dict[str, Item] = {}
    while len(found) < count:
        item = draw(task, rng, held_out=True)
        if not task.levels or item.level in task.levels:
            found.setdefault(item.key, item)
    return list(found.values())


def _recall(
    name: str,
    domain: str,
    passage: PassageMaker,
    *,
    asked: PassageMaker | None = None,
    levels: tuple[int, ...] = (),
) -> Task:
    """Make a recall task; its items ask a passage of full size for something far back."""
    evaluated = partial(_far_item, asked) if asked else None
    return Task(name, domain, partial(_far_item, passage), passage, evaluated, levels)


def _far_item(passage: PassageMaker, rng: random.Random) -> Item:
    drawn = passage(rng, True)
    asked = drawn.questions[rng.choice(drawn.far)]
    prompt = drawn.text + asked.prompt
    return Item(prompt, asked.answer, prompt, asked.level)


TASKS = {
    task.name: task
    for task in (
        Task("add", "math", problems.add),
        Task("story", "math", problems.story, levels=(1, 2)),
        Task("rank", "math", problems.rank),
        _recall("pairs_12", "math", recall.shelves(12)),
        _recall("pairs_18", "math", recall.shelves(18)),
        _recall("pairs_24", "math", recall.shelves(24)),
        Task("expression", "code", problems.expression, levels=(2, 3)),
        Task("variables", "code", problems.variables, levels=(2, 3, 4)),
        Task("sorted", "code", problems.sort_numbers, levels=(6, 7, 8)),
        _recall("two_hop", "code", recall.bindings, levels=(6,)),
        Task("heaviest", "stem", problems.heaviest),
        Task("unit", "stem", problems.unit, levels=(6,)),
        Task("complement", "stem", problems.complement, levels=tuple(range(15, 21))),
        _recall("far_2", "stem", recall.readings(2)),
        _recall("far_4", "stem", recall.readings(4)),
        _recall("far_8", "stem", recall.readings(8)),
        _recall("far_16", "stem", recall.readings(16)),
        Task("copy", "chat", problems.copy),
        Task("pick", "chat", problems.pick, asked=partial(problems.pick, fewest=8, most=13)),
        Task(
            "sort",
            "chat",
            problems.sort_words,
            asked=partial(problems.sort_words, fewest=5, most=7),
        ),
        _recall(
            "two_queries", "chat", recall.lockers, asked=partial(recall.lockers, fewest=40, most=60)
        ),
        _recall("by_value", "chat", recall.desks, levels=(recall.REPLACES,)),
    )
}

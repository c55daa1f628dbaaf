"""Seeded generators of the embedded teacher's tasks: fifteen of them, in four domains, answered by exact match.

A task yields items. An item is one question as the evaluation asks it, its answer, and a key that names the problem
whatever its wording. A stable hash of the key says whether the item is held out, so no evaluation problem is trained
on, in any order of operands. Recall tasks put the answer further back than a window of 32 tokens reaches.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from xlstm_distill.embedded import pools

DOMAINS = ("math", "code", "stem", "chat")
HELD_OUT_SHARE = 10  # one problem in ten is held out


@dataclass(frozen=True)
class Item:
    """One question: the user's turn, the assistant's answer, and the problem's key in the split."""

    prompt: str
    answer: str
    key: str


@dataclass(frozen=True)
class Task:
    """One task of a domain; a recall task has the table it asks about."""

    name: str
    domain: str
    draw: Callable[[random.Random], Item]
    table: "Table | None" = None


@dataclass(frozen=True)
class Table:
    """A recall task's long text: how to write it, how to ask of it, and how far back an evaluated answer lies.

    far: rows that follow the answer's row in an evaluated item, enough for 40 tokens or more.
    most: rows of the longest table.
    """

    title: str
    row: str
    question: str
    keys: tuple[str, ...]
    value: Callable[[random.Random], str]
    far: int
    most: int

    def rows(self, rng: random.Random, count: int) -> list[tuple[str, str]]:
        """Draw `count` (key, value) rows with different keys."""
        return [(key, self.value(rng)) for key in rng.sample(self.keys, count)]

    def text(self, rows: list[tuple[str, str]]) -> str:
        """Write the table."""
        return self.title + "".join(self.row.format(key=key, value=value) + "\n" for key, value in rows)

    def ask(self, rows: list[tuple[str, str]], at: int) -> Item:
        """Ask for row `at` of a table; the key is the table with its question."""
        prompt = self.text(rows) + self.question.format(key=rows[at][0])
        return Item(prompt, rows[at][1], prompt)

    def draw(self, rng: random.Random) -> Item:
        """Draw an item as evaluated: a long table, and a row of which at least `far` rows follow."""
        rows = self.rows(rng, rng.randint(self.far + 3, self.most))
        return self.ask(rows, rng.randrange(len(rows) - self.far))


def is_held_out(task: str, key: str) -> bool:
    """Say whether the problem belongs to evaluation, by a hash that is the same on every machine and run."""
    if task == "fact":  # a closed set: one paraphrase of each fact is held out, see `_fact`
        return key.startswith("held:")
    digest = hashlib.blake2b(f"{task}|{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def _add(rng: random.Random) -> Item:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return Item(f"Compute {a}+{b}.", str(a + b), f"{min(a, b)}+{max(a, b)}")


def _story(rng: random.Random) -> Item:
    have, change, gains = rng.randint(10, 89), rng.randint(1, 9), rng.random() < 0.5
    verb = rng.choice(("gets", "buys", "finds") if gains else ("loses", "sells", "gives"))
    name, item = rng.choice(pools.NAMES), rng.choice(pools.ITEMS)
    total = have + change if gains else have - change
    return Item(f"{name} has {have} {item}, {verb} {change}. How many?", str(total), f"{have} {gains} {change}")


def _largest(rng: random.Random) -> Item:
    numbers = rng.sample(range(10, 100), 3)
    return Item("Largest of {} {} {}?".format(*numbers), str(max(numbers)), str(sorted(numbers)))


def _expression(rng: random.Random) -> Item:
    a, b, c = rng.randint(1, 20), rng.randint(1, 9), rng.randint(1, 9)
    text, plus, minus = rng.choice(
        (
            (f"{a}+{b}+{c}", (a, b, c), 0),
            (f"{a}+{b}-{c}", (a, b), c),
            (f"{a}-{b}+{c}", (a, c), b),
            (f"{a}-({b}-{c})", (a, c), b),
        )
    )
    if sum(plus) < minus:
        return _expression(rng)
    return Item(f"print({text})", str(sum(plus) - minus), f"{sorted(plus)}-{minus}")


def _sorted(rng: random.Random) -> Item:
    numbers = rng.sample(range(10, 100), 3)
    listed, answer = ",".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    return Item(f"print(*sorted([{listed}]))", answer, answer)


def _variables(rng: random.Random) -> Item:
    names, values, lines, shape = rng.sample(pools.LETTERS, 3), [], [], []
    for at, name in enumerate(names):
        other = rng.randrange(at) if at and rng.random() < 0.7 else None
        step = rng.randint(1, 9)
        if other is None:
            values.append(step)
            lines.append(f"{name}={step}")
        elif values[other] + step <= 20 and rng.random() < 0.5:
            values.append(values[other] + step)
            lines.append(f"{name}={names[other]}+{step}")
        else:
            values.append(values[other])
            lines.append(f"{name}={names[other]}")
        shape.append(lines[-1].translate({ord(n): str(i) + "v" for i, n in enumerate(names)}))
    wanted = rng.randrange(3)
    program = "\n".join([*lines, f"print({names[wanted]})"])
    return Item(program, str(values[wanted]), f"{shape} {wanted}")


def _fact(rng: random.Random) -> Item:
    return fact_item(rng.randrange(len(FACTS)), rng.randrange(4))


def fact_item(at: int, phrase: int) -> Item:
    """Ask fact `at` in its wording `phrase`; fact n's wording n mod 4 is held out, the other three are for training."""
    wordings, answer = FACTS[at]
    side = "held" if phrase == at % 4 else "train"
    return Item(wordings[phrase], answer, f"{side}:{wordings[phrase]}")


def _unit(rng: random.Random) -> Item:
    amount, (source, target, zeros) = rng.randint(1, 999), rng.choice(pools.UNITS)
    return Item(f"Convert {amount} {source} to {target}.", f"{amount}{'0' * zeros}", f"{amount} {source} {target}")


def _copy(rng: random.Random) -> Item:
    words = " ".join(rng.sample(pools.WORDS, rng.randint(2, 4)))
    return Item(f"Repeat: {words}", words, words)


def _pick(rng: random.Random) -> Item:
    words = rng.sample(pools.WORDS, rng.randint(3, 7))
    first = rng.random() < 0.5
    listed = " ".join(words)
    return Item(f"{'First' if first else 'Last'} word of: {listed}", words[0 if first else -1], f"{first} {listed}")


def _sort(rng: random.Random) -> Item:
    words = rng.sample(pools.WORDS, 3)
    while len({word[0] for word in words}) < 3:
        words = rng.sample(pools.WORDS, 3)
    return Item(f"Sort: {' '.join(words)}", " ".join(sorted(words)), " ".join(sorted(words)))


FACTS = pools.facts()
STOCK = Table("Stock:\n", "{key} {value}", "How many {key}?", pools.ITEMS, lambda r: str(r.randint(10, 99)), 9, 20)
CONSTANTS = Table("", "{key}={value}", "echo ${key};", pools.LETTERS, lambda r: r.choice(pools.WORDS), 11, 24)
FLASKS = Table(
    "Flasks:\n", "{key} {value}", "What is in {key}?", pools.LETTERS, lambda r: r.choice(pools.SYMBOLS), 11, 24
)
GIFTS = Table("Gifts:\n", "{key} {value}", "Gift for {key}?", pools.NAMES, lambda r: r.choice(pools.ITEMS), 11, 20)

TASKS = {
    task.name: task
    for task in (
        Task("add", "math", _add),
        Task("story", "math", _story),
        Task("largest", "math", _largest),
        Task("stock", "math", STOCK.draw, STOCK),
        Task("expression", "code", _expression),
        Task("sorted", "code", _sorted),
        Task("variables", "code", _variables),
        Task("constants", "code", CONSTANTS.draw, CONSTANTS),
        Task("fact", "stem", _fact),
        Task("unit", "stem", _unit),
        Task("flasks", "stem", FLASKS.draw, FLASKS),
        Task("copy", "chat", _copy),
        Task("pick", "chat", _pick),
        Task("sort", "chat", _sort),
        Task("gifts", "chat", GIFTS.draw, GIFTS),
    )
}


def draw(task: Task, rng: random.Random, *, held_out: bool) -> Item:
    """Draw an item of one side of the split, by rejection."""
    while True:
        item = task.draw(rng)
        if is_held_out(task.name, item.key) == held_out:
            return item


def held_out_items(task: Task, count: int, seed: int = 0) -> list[Item]:
    """Draw `count` different held-out items."""
    rng = random.Random(f"{seed} {task.name}")
    found: dict[str, Item] = {}
    while len(found) < count:
        item = draw(task, rng, held_out=True)
        found.setdefault(item.key, item)
    return list(found.values())

"""Seeded generators of the recall tasks: a long text, and questions on what stands far back in it.

Difficulty is graded: the number of pairs, the distance from the pair to the question, two queries
in one question, keys looked up by their value, and two hops. Keys such as B4 share their letter
with some keys and their digit with others, so half a match finds the wrong row.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from xlstm_distill.embedded import pools

WINDOW = 16  # tokens; the window of the quickstart's student, the unit of distances
# Rows after the asked one in an evaluated item, so that its answer is 2 windows back or more.
SHELVES_AFTER = 6  # of 6 tokens
LOCKERS_AFTER = 7  # of 5 tokens
BINDINGS_AFTER = 8  # of 4 tokens


@dataclass(frozen=True)
class Passage:
    """A text and its questions with answers; `far` numbers those that an evaluation may ask.

    turns: questions of a training conversation; more would not fit the context after a long text.
    """

    text: str
    questions: tuple[tuple[str, str], ...]
    far: tuple[int, ...]
    turns: int = 12


PassageMaker = Callable[[random.Random, bool], Passage]
"""Draws a passage: of the evaluated size where the flag is True, else of any size up to it."""


def shelves(pairs: int) -> PassageMaker:
    """Make passages of up to `pairs` shelves with a number on each."""

    def passage(rng: random.Random, full: bool) -> Passage:
        count = pairs if full else rng.randint(3, pairs)
        rows = _numbered_keys(rng, count)
        text = "Shelves:\n" + _table(rows)
        questions = tuple((f"How many on {key}?", value) for key, value in rows)
        return Passage(text, questions, tuple(range(max(1, count - SHELVES_AFTER))))

    return passage


def readings(windows: int) -> PassageMaker:
    """Make passages of 8 readings, then notes as long as `windows` windows."""

    def passage(rng: random.Random, full: bool) -> Passage:
        rows = _numbered_keys(rng, 8 if full else rng.randint(3, 8))
        # A word and its space are two tokens.
        words = windows * WINDOW // 2
        notes = rng.choices(pools.WORDS, k=words if full else rng.randint(1, words))
        text = "Readings:\n" + _table(rows) + f"Notes: {' '.join(notes)}\n"
        questions = tuple((f"Reading of {key}?", value) for key, value in rows)
        return Passage(text, questions, tuple(range(len(rows))), turns=5 if words > 90 else 8)

    return passage


def lockers(rng: random.Random, full: bool) -> Passage:
    """Make a table of lockers, and questions on two of them at once.

    The answer names each locker before what is in it, so that both are lookups of the same kind.
    """
    keys = _grid(rng, _table_size(rng, full))
    rows = [(key, rng.choice(pools.ITEMS)) for key in keys]
    far = max(2, len(rows) - LOCKERS_AFTER)
    questions = []
    for number in range(12):
        # The first half asks for far rows only; an evaluation takes those.
        (one, first), (two, second) = rng.sample(rows[:far] if number < 6 else rows, 2)
        answer = f"{one} - {first}, {two} - {second}"
        questions.append((f"What is in {one} and {two}?", answer))
    return Passage("Lockers:\n" + _table(rows), tuple(questions), tuple(range(6)), turns=6)


def desks(rng: random.Random, full: bool) -> Passage:
    """Make a table of who sits where, and ask for the person by the place."""
    keys = _grid(rng, _table_size(rng, full))
    rows = list(zip(rng.sample(pools.NAMES, len(keys)), keys, strict=True))
    questions = tuple((f"Who sits at {key}?", name) for name, key in rows)
    far = tuple(range(max(1, len(rows) - LOCKERS_AFTER)))
    return Passage("Desks:\n" + _table(rows), questions, far)


def bindings(rng: random.Random, full: bool) -> Passage:
    """Make shell variables, half of which name another variable, and ask through that name.

    `${!q}` is bash's indirection: the value of the variable that q names. Training also asks `$q`,
    the one hop of which two are made.
    """
    half = 8 if full else rng.randint(2, 8)
    names = rng.sample(pools.LETTERS, 2 * half)
    targets, pointers = names[:half], names[half:]
    values = {name: rng.choice(pools.WORDS) for name in targets}
    pointed = dict(zip(pointers, rng.choices(targets, k=half), strict=True))
    order = rng.sample(names, len(names))
    text = "".join(f"{name}={values.get(name) or pointed[name]}\n" for name in order)
    place = {name: at for at, name in enumerate(order)}
    questions, far = [], []
    for name in rng.sample(pointers, half):
        if max(place[name], place[pointed[name]]) < len(order) - BINDINGS_AFTER:
            far.append(len(questions))
        questions.append((f"echo ${{!{name}}}", values[pointed[name]]))
    for name in rng.sample(names, half):
        questions.append((f"echo ${{{name}}}", values.get(name) or pointed[name]))
    if full and not far:
        return bindings(rng, full)
    return Passage(text, tuple(questions), tuple(far))


def _grid(rng: random.Random, count: int) -> list[str]:
    """Draw keys from a grid hardly larger than their number, in any order."""
    side = 1
    while side * side < count + 1:
        side += 1
    columns, rows = rng.sample(pools.COLUMNS, side), rng.sample(pools.ROWS, side)
    return rng.sample([column + row for column in columns for row in rows], count)


def _numbered_keys(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return [(key, str(rng.randint(10, 99))) for key in _grid(rng, count)]


def _table_size(rng: random.Random, full: bool) -> int:
    return 16 if full else rng.randint(3, 16)


def _table(rows: list[tuple[str, str]]) -> str:
    return "".join(f"{key} {value}\n" for key, value in rows)

"""Seeded generators of the recall tasks: a long text, and questions on what stands far back in it.

Difficulty is graded: the number of pairs, the distance from the pair to the question, two queries
in one question, keys looked up by their value, and two hops. Keys such as B4 share their letter
with some keys and their digit with others, so half a match finds the wrong row. A later row
replaces an earlier one with the same key, so a reader has to forget, or to know which came last.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from xlstm_distill.embedded import pools

WINDOW = 16  # tokens; the window of the quickstart's student, the unit of distances
# Rows after the asked one in an evaluated item, so that its answer is 2 windows back or more.
SHELVES_AFTER = 6  # of 6 tokens at least
LOCKERS_AFTER = 7  # of 5 tokens
BINDINGS_AFTER = 8  # of 4 tokens
REPLACES = 3  # added to the level where an earlier row has the same key
MENTIONS = 16  # words of notes for each key that stands among them


@dataclass(frozen=True)
class Question:
    """A question on a text, its answer, and how hard it is in its task's own measure."""

    prompt: str
    answer: str
    level: int


@dataclass(frozen=True)
class Passage:
    """A text and its questions; `far` numbers those that an evaluation may ask.

    turns: questions of a training conversation; more would not fit the context after a long text.
    """

    text: str
    questions: tuple[Question, ...]
    far: tuple[int, ...]
    turns: int = 12


PassageMaker = Callable[[random.Random, bool], Passage]
"""Draws a passage: of the evaluated size where the flag is True, else of any size up to it."""


def shelves(pairs: int) -> PassageMaker:
    """Make passages of up to `pairs` shelves with a number on each; later rows replace earlier.

    Level: digits of the number, and REPLACES.
    """

    def passage(rng: random.Random, full: bool) -> Passage:
        keys = _written(rng, pairs if full else rng.randint(3, pairs), full)
        rows = [(key, _number(rng, rng.randint(2, 4))) for key in keys]
        questions = _lookups("How many on", rows)
        last = {key: at for at, key in enumerate(keys)}
        far = [at for at, key in enumerate(last) if last[key] < len(rows) - SHELVES_AFTER]
        if full and not far:
            return passage(rng, full)
        return Passage("Shelves:\n" + _table(rows), questions, tuple(far), turns=10)

    return passage


def readings(windows: int) -> PassageMaker:
    """Make passages of 8 readings, then notes as long as `windows` windows that mention their keys.

    Level: digits of the reading, and REPLACES.
    """

    def passage(rng: random.Random, full: bool) -> Passage:
        keys = _written(rng, 8 if full else rng.randint(3, 8), full)
        rows = [(key, _number(rng, rng.randint(2, 3))) for key in keys]
        # A word and its space are two tokens.
        words = windows * WINDOW // 2
        notes = rng.choices(pools.WORDS, k=words if full else rng.randint(1, words))
        for at in rng.sample(range(len(notes)), len(notes) // MENTIONS):
            notes[at] = rng.choice(keys)
        text = "Readings:\n" + _table(rows) + f"Notes: {' '.join(notes)}\n"
        questions = _lookups("Reading of", rows)
        far = tuple(range(len(questions)))
        return Passage(text, questions, far, turns=3 if words > 90 else 8)

    return passage


def lockers(rng: random.Random, full: bool, fewest: int = 10, most: int = 16) -> Passage:
    """Make a table of lockers, and questions on two of them at once. Level: rows.

    The answer names each locker before what is in it, so that both are lookups of the same kind.
    Training also asks for one locker.
    """
    count = rng.randint(fewest if full else 3, most)
    rows = [(key, rng.choice(pools.ITEMS)) for key in _grid(rng, count)]
    far = max(2, len(rows) - LOCKERS_AFTER)
    questions: list[Question] = []
    for number in range(12):
        # The first half asks for far rows only; an evaluation takes those.
        (one, first), (two, second) = rng.sample(rows[:far] if number < 6 else rows, 2)
        answer = f"{one} - {first}, {two} - {second}"
        questions.append(Question(f"What is in {one} and {two}?", answer, count))
    questions += [Question(f"What is in {key}?", f"{key} - {item}", count) for key, item in rows]
    return Passage("Lockers:\n" + _table(rows), tuple(questions), tuple(range(6)), turns=6)


def desks(rng: random.Random, full: bool) -> Passage:
    """Make a table of who took which desk, and ask for the person by the desk, of whom the last.

    Level: 0, or REPLACES.
    """
    keys = _written(rng, 16 if full else rng.randint(3, 16), full)
    names = rng.sample(pools.NAMES, len(keys))
    last = {key: at for at, key in enumerate(keys)}
    questions: list[Question] = []
    for key, at in last.items():
        level = REPLACES if keys.index(key) < at else 0
        questions.append(Question(f"Who sits at {key}?", names[at], level))
    far = [at for at, key in enumerate(last) if last[key] < len(keys) - LOCKERS_AFTER]
    if full and not far:
        return desks(rng, full)
    text = "Desks:\n" + _table(list(zip(names, keys, strict=True)))
    return Passage(text, tuple(questions), tuple(far))


def bindings(rng: random.Random, full: bool) -> Passage:
    """Make shell variables, half of which name another variable, and ask through that name.

    `${!q}` is bash's indirection: the value of the variable that q names. Training also asks `$q`,
    the one hop of which two are made. Level: pairs of variables.
    """
    half = rng.randint(6, 8) if full else rng.randint(2, 8)
    names = rng.sample(pools.LETTERS, 2 * half)
    targets, pointers = names[:half], names[half:]
    values = {name: rng.choice(pools.WORDS) for name in targets}
    pointed = dict(zip(pointers, rng.choices(targets, k=half), strict=True))
    order = rng.sample(names, len(names))
    text = "".join(f"{name}={values.get(name) or pointed[name]}\n" for name in order)
    place = {name: at for at, name in enumerate(order)}
    questions: list[Question] = []
    far: list[int] = []
    for name in rng.sample(pointers, half):
        if max(place[name], place[pointed[name]]) < len(order) - BINDINGS_AFTER:
            far.append(len(questions))
        questions.append(Question(f"echo ${{!{name}}}", values[pointed[name]], half))
    for name in rng.sample(names, half):
        questions.append(Question(f"echo ${{{name}}}", values.get(name) or pointed[name], half))
    if full and not far:
        return bindings(rng, full)
    return Passage(text, tuple(questions), tuple(far))


def _written(rng: random.Random, count: int, full: bool) -> list[str]:
    """Draw the keys of `count` rows, up to a third of which replace an earlier row.

    At full size it is a third.
    """
    again = count // 3 if full else rng.randint(0, count // 3)
    keys = _grid(rng, count - again)
    return rng.sample(keys + keys[:again], count)


def _lookups(asks: str, rows: list[tuple[str, str]]) -> tuple[Question, ...]:
    """Ask for every key's number, in the order of their first rows; the last row counts."""
    keys = [key for key, _ in rows]
    questions: list[Question] = []
    for key, value in dict(rows).items():
        level = len(value) + (REPLACES if keys.count(key) > 1 else 0)
        questions.append(Question(f"{asks} {key}?", value, level))
    return tuple(questions)


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _grid(rng: random.Random, count: int) -> list[str]:
    """Draw keys from a grid hardly larger than their number, in any order."""
    side = 1
    while side * side < count + 1:
        side += 1
    columns, rows = rng.sample(pools.COLUMNS, side), rng.sample(pools.ROWS, side)
    return rng.sample([column + row for column in columns for row in rows], count)


def _table(rows: list[tuple[str, str]]) -> str:
    return "".join(f"{key} {value}\n" for key, value in rows)

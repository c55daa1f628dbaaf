"""Seeded generators of the short problems: arithmetic, programs, elements, strings of words.

Each function draws one item at a random size. Sizes differ within a task, so that its score falls
with size and not from all to nothing; an item's level says its size. The key names the problem
whatever its wording and the order of its operands.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from xlstm_distill.embedded import pools


@dataclass(frozen=True)
class Item:
    """One question: the user's turn, the assistant's answer, and the problem's key in the split.

    level: how hard it is, in its task's own measure.
    """

    prompt: str
    answer: str
    key: str
    level: int


def add(rng: random.Random) -> Item:
    """Add a number of one or two digits and one of two or three. Level: digits of both."""
    a, b = rng.randint(1, rng.choice((9, 99))), rng.randint(10, rng.choice((99, 99, 999)))
    a, b = rng.sample((a, b), 2)
    return Item(f"Compute {a}+{b}.", str(a + b), f"{min(a, b)}+{max(a, b)}", len(f"{a}{b}"))


def story(rng: random.Random) -> Item:
    """Follow one to three changes of a count. Level: changes."""
    total = have = rng.randint(20, 99)
    events, changes = [], []
    for _ in range(rng.randint(1, 3)):
        change, gains = rng.randint(1, 9), rng.random() < 0.5
        verb = rng.choice(("gets", "buys", "finds") if gains else ("loses", "sells", "gives"))
        total += change if gains else -change
        events.append(f"{verb} {change}")
        changes.append(change if gains else -change)
    name, item = rng.choice(pools.NAMES), rng.choice(pools.ITEMS)
    prompt = f"{name} has {have} {item}, {', '.join(events)}. How many?"
    return Item(prompt, str(total), f"{have} {sorted(changes)}", len(changes))


def rank(rng: random.Random) -> Item:
    """Find the largest, smallest or middle one of three to seven numbers. Level: numbers."""
    count = rng.randint(3, 7)
    numbers = sorted(rng.sample(range(10, 1000), count))
    which = rng.choice(("Largest", "Smallest", "Middle") if count % 2 else ("Largest", "Smallest"))
    answer = {"Largest": numbers[-1], "Smallest": numbers[0], "Middle": numbers[count // 2]}[which]
    shown = rng.sample(numbers, count)
    return Item(f"{which} of {' '.join(map(str, shown))}?", str(answer), str(numbers), count)


def expression(rng: random.Random) -> Item:
    """Evaluate a sum and difference of two to four terms, or a product and a term.

    Level: terms, or 5 for a product.
    """
    if rng.random() < 0.1:
        a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 20)
        plus = a * b < c or rng.random() < 0.5
        text = f"{a}*{b}{'+' if plus else '-'}{c}"
        value = a * b + (c if plus else -c)
        return Item(f"print({text})", str(value), f"{min(a, b)}*{max(a, b)} {plus} {c}", 5)
    terms = [rng.randint(1, 20) for _ in range(rng.choice((2, 2, 3, 3, 4)))]
    signs = [1] + [rng.choice((1, -1)) for _ in terms[1:]]
    value = sum(sign * term for sign, term in zip(signs, terms, strict=True))
    if value < 0:
        return expression(rng)
    text = str(terms[0])
    for sign, term in zip(signs[1:], terms[1:], strict=True):
        text += f"{'+' if sign > 0 else '-'}{term}"
    # The sum is the same in any order of its terms, so the key is too.
    key = sorted(sign * term for sign, term in zip(signs, terms, strict=True))
    return Item(f"print({text})", str(value), str(key), len(terms))


def variables(rng: random.Random) -> Item:
    """Follow two to five assignments; the wanted variable is one of the last two.

    Level: assignments.
    """
    count = rng.randint(2, 5)
    names, values, lines, shape = rng.sample(pools.LETTERS, count), [], [], []
    for at, name in enumerate(names):
        other = rng.randrange(at) if at and rng.random() < 0.8 else None
        step = rng.randint(1, 9)
        if other is None:
            values.append(step)
            lines.append(f"{name}={step}")
        elif values[other] + step <= 30 and rng.random() < 0.6:
            values.append(values[other] + step)
            lines.append(f"{name}={names[other]}+{step}")
        else:
            values.append(values[other])
            lines.append(f"{name}={names[other]}")
        numbered = {ord(letter): f"v{number}" for number, letter in enumerate(names)}
        shape.append(lines[-1].translate(numbered))
    wanted = rng.randrange(count - 2, count)
    program = "\n".join([*lines, f"print({names[wanted]})"])
    return Item(program, str(values[wanted]), f"{shape} {wanted}", count)


def sort_numbers(rng: random.Random) -> Item:
    """Sort three to eight numbers of two digits. Level: numbers."""
    numbers = rng.sample(range(10, 100), rng.randint(3, 8))
    listed, answer = ",".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    return Item(f"print(*sorted([{listed}]))", answer, answer, len(numbers))


def heaviest(rng: random.Random) -> Item:
    """Find the heaviest or lightest one of three to six elements. Level: elements."""
    numbers = sorted(rng.sample(range(len(pools.ELEMENTS)), rng.randint(3, 6)))
    most = rng.random() < 0.5
    answer = pools.ELEMENTS[numbers[-1] if most else numbers[0]]
    shown = " ".join(pools.ELEMENTS[number] for number in rng.sample(numbers, len(numbers)))
    which = "Heaviest" if most else "Lightest"
    return Item(f"{which} of {shown}?", answer, str(numbers), len(numbers))


def unit(rng: random.Random) -> Item:
    """Convert an amount; small units into large ones give decimals. Level: zeros or decimals."""
    amount = rng.randint(1, rng.choice((99, 999, 9999, 99999)))
    source, target, power = rng.choice(pools.UNITS)
    if power > 0:
        answer = f"{amount}{'0' * power}"
    else:
        whole, part = divmod(amount, 10**-power)
        answer = f"{whole}.{part:0{-power}d}".rstrip("0").rstrip(".")
    prompt = f"Convert {amount} {source} to {target}."
    return Item(prompt, answer, f"{amount} {source} {target}", abs(power))


def complement(rng: random.Random) -> Item:
    """Write the complement of a strand of 6 to 20 bases. Level: bases."""
    strand = "".join(rng.choices(tuple(pools.BASES), k=rng.randint(6, 20)))
    answer = "".join(pools.BASES[base] for base in strand)
    return Item(f"Complement of {strand}?", answer, strand, len(strand))


def copy(rng: random.Random) -> Item:
    """Repeat 4 to 12 words, of which many stand several times: the word before is no guide.

    Level: words.
    """
    count = rng.randint(4, 12)
    words = " ".join(rng.choices(rng.sample(pools.WORDS, rng.randint(2, count)), k=count))
    return Item(f"Repeat: {words}", words, words, count)


def pick(rng: random.Random, fewest: int = 4, most: int = 10) -> Item:
    """Name one of some words by its place from the start or the end. Level: words."""
    words = rng.sample(pools.WORDS, rng.randint(fewest, most))
    end = rng.random() < 0.3
    place = rng.randint(1, 3 if end else min(6, len(words)))
    answer = words[-place if end else place - 1]
    listed = " ".join(words)
    which = f"Word {place} from the end of" if end else f"Word {place} of"
    return Item(f"{which}: {listed}", answer, f"{which} {listed}", len(words))


def sort_words(rng: random.Random, fewest: int = 3, most: int = 6) -> Item:
    """Sort words with different initials. Level: words."""
    count = rng.randint(fewest, most)
    words = rng.sample(pools.WORDS, count)
    while len({word[0] for word in words}) < count:
        words = rng.sample(pools.WORDS, count)
    answer = " ".join(sorted(words))
    return Item(f"Sort: {' '.join(words)}", answer, answer, count)

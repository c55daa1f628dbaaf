"""Needle items of exact length: needles at given depths of a haystack."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from xlstm_eval.long_context.haystack import Haystack
from xlstm_eval.long_context.prompts import Needle, Prompter, Riddle, make_riddle
from xlstm_eval.long_context.settings import VERSION, NeedleKind
from xlstm_eval.records import EvalError

FEWEST_SENTENCES = 2
"""An item with fewer sentences than this around its needles has no depths."""


@dataclass(frozen=True)
class Item:
    """One needle item, as its file holds it.

    ``tokens`` are of the whole prompt, ``budget`` of the answer; both together are ``length`` or up
    to a sentence less. ``depth`` is the share of the haystack before the first needle that is
    asked for, ``distance`` the tokens between that needle and the answer.
    """

    id: str
    kind: NeedleKind
    length: int
    tokens: int
    budget: int
    depth: float
    distance: int
    needle: str
    content: str
    prefix: str
    answers: list[str]


class ItemMaker:
    """Makes the items of one tokenizer; equal arguments make equal items."""

    def __init__(self, prompter: Prompter, haystack: Haystack, seed: int) -> None:
        self.prompter, self.haystack, self.seed = prompter, haystack, seed
        self._mean = 0.0  # tokens of a sentence, from the last item

    def make(self, kind: NeedleKind, length: int, count: int) -> list[Item]:
        """Make ``count`` items whose depths are spread evenly; raises EvalError: no room."""
        budget, self._mean = self.prompter.budget(kind), 0.0
        return [self._item(kind, length, index, count, budget) for index in range(count)]

    def shortest(self, kind: NeedleKind) -> int:
        """Return a length that has room for every item of a kind."""
        budget, longest = self.prompter.budget(kind), 0
        for index in range(20):
            source = self._random(kind, 0, index)
            riddle = make_riddle(kind, source)
            sentences = itertools.islice(self.haystack.sentences(source), FEWEST_SENTENCES)
            prompt, _ = self._prompt(list(sentences), riddle, [0.5] * len(riddle.needles))
            longest = max(longest, self.prompter.count(prompt))
        return budget + longest

    def _item(self, kind: NeedleKind, length: int, index: int, count: int, budget: int) -> Item:
        source = self._random(kind, length, index)
        riddle = make_riddle(kind, source)
        depth = (index + 0.5) / count
        depths, first = _depths(riddle, depth, source)
        sentences = self._fit(riddle, depths, length - budget, source)
        if not sentences:
            raise EvalError(
                f"lengths: {length} has no room for {kind} items with this tokenizer; they take "
                f"about {self.shortest(kind)}. Begin with a longer one."
            )
        prompt, content = self._prompt(sentences, riddle, depths)
        after = prompt.index(first.sentence) + len(first.sentence)
        return Item(
            id=f"{kind}-{length}-{index}",
            kind=kind,
            length=length,
            tokens=self.prompter.count(prompt),
            budget=budget,
            depth=depth,
            distance=self.prompter.count_part(prompt[after:]),
            needle=first.sentence,
            content=content,
            prefix=riddle.prefix,
            answers=riddle.answers,
        )

    def _random(self, kind: NeedleKind, length: int, index: int) -> random.Random:
        # Of a string: Python hashes it the same in every process.
        return random.Random(f"{VERSION} {self.seed} {kind} {length} {index}")

    def _prompt(
        self, sentences: Sequence[str], riddle: Riddle, depths: Sequence[float]
    ) -> tuple[str, str]:
        """Return the prompt and the user's message in it."""
        content = self.prompter.content(_hide(sentences, riddle.needles, depths), riddle)
        return self.prompter.prompt(content, riddle.prefix), content

    def _fit(
        self, riddle: Riddle, depths: Sequence[float], room: int, source: random.Random
    ) -> list[str]:
        """Return as many sentences as make a prompt of ``room`` tokens; none if there is no room.

        Tokens of sentences do not add up exactly, so the whole is counted, a few times.
        """
        drawn: list[str] = []
        stream = self.haystack.sentences(source)

        def tokens(number: int) -> int:
            drawn.extend(itertools.islice(stream, max(0, number - len(drawn))))
            return self.prompter.count(self._prompt(drawn[:number], riddle, depths)[0])

        number = FEWEST_SENTENCES
        around = tokens(number)
        if around > room:
            return []
        known = {number: around}
        mean = self._mean or self.prompter.count_part(" ".join(drawn)) / number
        while True:
            # The largest number that fits is known once its successor does not fit.
            best = max(n for n, found in known.items() if found <= room)
            step = int((room - known[best]) / mean)
            number = best + max(1, step)
            over = [n for n, found in known.items() if found > room]
            if over:
                number = min(number, max(best + 1, min(over) - 1))
            if number in known:
                break
            known[number] = tokens(number)
            mean = max(1.0, (known[number] - around) / (number - FEWEST_SENTENCES))
        self._mean = mean
        return drawn[:best]


def _depths(riddle: Riddle, depth: float, source: random.Random) -> tuple[list[float], Needle]:
    """Give each needle a depth; return also the first of those that are asked for.

    That one is at ``depth``. Others that are asked for come after it, the rest anywhere.
    """
    first = source.choice([needle for needle in riddle.needles if needle.asked])
    found = []
    for needle in riddle.needles:
        if needle is first:
            found.append(depth)
        else:
            found.append(source.uniform(depth if needle.asked else 0.0, 1.0))
    return found, first


def _hide(sentences: Sequence[str], needles: Sequence[Needle], depths: Sequence[float]) -> str:
    """Put needles between sentences, each where its share of the characters comes before it."""
    ends = list(itertools.accumulate((len(sentence) + 1 for sentence in sentences), initial=0))
    places: dict[int, list[tuple[float, str]]] = {}
    for needle, depth in zip(needles, depths, strict=True):
        after = bisect.bisect_left(ends, depth * ends[-1])
        # The nearer of the two boundaries.
        if after and depth * ends[-1] - ends[after - 1] < ends[after] - depth * ends[-1]:
            after -= 1
        places.setdefault(after, []).append((depth, needle.sentence))
    pieces: list[str] = []
    for place in range(len(sentences) + 1):
        pieces += [needle for _, needle in sorted(places.get(place, []))]
        pieces += sentences[place : place + 1]
    return " ".join(pieces)


def range_of(distance: int) -> int:
    """Return the upper end of a distance's range: the next power of two, at least 64."""
    return max(64, 2 ** math.ceil(math.log2(distance)))

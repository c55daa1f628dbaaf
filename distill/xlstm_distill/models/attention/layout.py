"""Which query heads of a layer keep full attention, which have the mixer, and what each reads.

Loads no torch: plans count by it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Heads as slices (first, end), in order. Slices need no index on the device, and their gradient
adds nothing up in an order that may change."""


def as_runs(heads: Sequence[int]) -> Runs:
    """Write heads as slices of neighbours."""
    found: list[tuple[int, int]] = []
    for head in heads:
        if found and found[-1][1] == head:
            found[-1] = (found[-1][0], head + 1)
        else:
            found.append((head, head + 1))
    return tuple(found)


class LayerHeads:
    """The heads of a layer with H query heads and G key/value heads, of which `kept` are kept.

    mixed: the other heads. queries, keys: what the mixer reads of queries, and of keys and values;
    M queries for each group of the same size, as the operators need. Where the heads that are left
    differ in number from group to group, a group's keys are there several times.

    full_keys: keys and values of the kept heads, each once: they are what a cache holds in full.
    full_queries: queries for them, the same number for each; where a group keeps fewer heads than
    another, one comes twice, and full_outputs leaves its copy out.
    """

    def __init__(self, kept: Sequence[int], heads: int, groups: int) -> None:
        per_group = heads // groups
        self.kept, self.total = tuple(kept), heads
        self.mixed = tuple(head for head in range(heads) if head not in self.kept)
        left = _by_group(self.mixed, per_group)
        # As many heads as all groups can be cut into.
        size = math.gcd(*(len(found) for found in left.values())) if left else 1
        keys = [group for group, found in left.items() for _ in range(len(found) // size)]
        self.queries, self.keys = as_runs(self.mixed), as_runs(keys)
        self.mixed_keys = len(keys)
        full = _by_group(self.kept, per_group)
        most = max((len(found) for found in full.values()), default=0)
        queries: list[int] = []
        outputs: list[int] = []
        for found in full.values():
            outputs += [len(queries) + place for place in range(len(found))]
            queries += [*found, *found[-1:] * (most - len(found))]
        self.full_queries, self.full_keys = as_runs(queries), as_runs(list(full))
        self.full_outputs = as_runs(outputs)
        self.kept_keys = len(full)
        both = {head: place for part in (self.kept, self.mixed) for place, head in enumerate(part)}
        # Where each head lies behind the kept ones and then the mixed ones.
        self.order = as_runs(
            [both[h] if h in self.kept else len(self.kept) + both[h] for h in range(heads)]
        )


def layer_kinds(
    kept: Sequence[Sequence[int]], heads: int, groups: int
) -> list[tuple[LayerHeads, int]]:
    """Return the kinds of layers that differ in the heads they keep, and how many each has."""
    counts: dict[tuple[int, ...], int] = {}
    for layer in kept:
        counts[tuple(layer)] = counts.get(tuple(layer), 0) + 1
    return [(LayerHeads(layer, heads, groups), count) for layer, count in counts.items()]


def _by_group(heads: Sequence[int], per_group: int) -> dict[int, list[int]]:
    """Sort query heads, in rising order, by the key/value head that they read."""
    found: dict[int, list[int]] = {}
    for head in heads:
        found.setdefault(head // per_group, []).append(head)
    return found

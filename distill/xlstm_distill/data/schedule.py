"""The order in which training reads rows: a pure function of seed and step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from xlstm_distill.data.rows import DomainRows, Row

BLOCK = 4096.0
"""Rows that a schedule puts in order at a time."""


@dataclass(frozen=True)
class _Block:
    """A stretch of the schedule: its first row, and for each of its rows the domain and the draw.

    domain (R,) is a place in `RowSchedule.names`; draw (R,) counts the rows of that domain that the
    schedule reads before this one.
    """

    first: int
    domain: np.ndarray
    draw: np.ndarray

    def __contains__(self, n: int) -> bool:
        return self.first <= n < self.first + len(self.domain)


class RowSchedule:
    """Which rows the n-th step reads, as a pure function of seed and step.

    A resumed run therefore reads the same rows. Domains alternate so that each keeps to its weight
    at every point: the k-th row of a domain is due at time (k + 1/2) / share, and rows come in the
    order in which they are due. One unit of time is one row of the schedule. Within a domain, every
    epoch is a new permutation of its training rows.

    Rows are put in order block by block, when they are asked for, so a schedule of billions of
    tokens costs nothing to make. `before` counts the rows that earlier schedules of this seed have
    drawn from each domain; this schedule goes on after them.
    """

    def __init__(
        self,
        domains: Mapping[str, DomainRows],
        weights: Mapping[str, float],
        seed: int,
        total: int,
        before: Mapping[str, int] | None = None,
    ) -> None:
        self.domains, self.seed, self.total = domains, seed, total
        self.before = dict(before or {})
        # A weight of 0 would put the domain's first row at infinity.
        self.names = [name for name, weight in weights.items() if weight > 0]
        positive = [weights[name] for name in self.names]
        self._share = np.array(positive) / sum(positive)
        self._block = self._make_block(0)
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def rows(self, step: int, batch: int) -> list[Row]:
        """Return the rows of a step, with `batch` rows a step."""
        first, stop = step * batch, (step + 1) * batch
        if stop > self.total:
            raise IndexError(
                f"step {step} of {batch} rows is beyond the schedule's {self.total} rows"
            )
        return [self._row(n) for n in range(first, stop)]

    def _row(self, n: int) -> Row:
        if n not in self._block:
            self._block = self._make_block(self._block_number(n))
        here = n - self._block.first
        name = self.names[self._block.domain[here]]
        rows = self.domains[name]
        draw = self.before.get(name, 0) + int(self._block.draw[here])
        epoch, place = divmod(draw, rows.train_rows)
        # Training rows come after the validation rows of their domain.
        # Shuffled by index and not through a buffer: only so can any step be found without reading
        # those before it.
        index = int(self._permutation(name, epoch, rows.train_rows)[place])
        return name, rows.validation + index

    def drawn(self) -> dict[str, int]:
        """Count the rows drawn from each domain when this schedule ends, by it and before it."""
        number = self._block_number(self.total - 1)
        due = self._due_before(number)
        in_last_block = self._make_block(number).domain[: self.total - due.sum()]
        counts = due + np.bincount(in_last_block, minlength=len(due))
        found = dict(self.before)
        for name, count in zip(self.names, counts, strict=True):
            found[name] = found.get(name, 0) + int(count)
        return found

    def _block_number(self, n: int) -> int:
        """Find the block that holds row n."""
        # Every domain rounds its rows to whole ones, so a block starts less than a row per domain
        # away from a multiple of BLOCK.
        number = int(n // BLOCK)
        while int(self._due_before(number).sum()) > n:
            number -= 1
        while int(self._due_before(number + 1).sum()) <= n:
            number += 1
        return number

    def _due_before(self, number: int) -> np.ndarray:
        """Count the rows of each domain (M,) that are due before a block begins."""
        # Row k is due at (k + 1/2) / share, so before time t those with k < share * t - 1/2.
        begins = number * BLOCK
        return np.maximum(np.ceil(self._share * begins - 0.5), 0).astype(np.int64)

    def _make_block(self, number: int) -> _Block:
        """Put the rows in order that are due while a block lasts."""
        starts = self._due_before(number)
        stops = self._due_before(number + 1)
        domain = np.repeat(np.arange(len(starts)), stops - starts)
        draws_of_each = [np.arange(a, b) for a, b in zip(starts, stops, strict=True)]
        draw = np.concatenate(draws_of_each)
        due = (draw + 0.5) / self._share[domain]
        # Stable: of rows due at the same time, that of the domain named first comes first.
        order = np.argsort(due, kind="stable")
        return _Block(int(starts.sum()), domain[order], draw[order])

    def _permutation(self, name: str, epoch: int, rows: int) -> np.ndarray:
        """Return an epoch's order of a domain's training rows; keep the last one of each domain."""
        kept_epoch, kept = self._permutations.get(name, (-1, np.empty(0)))
        if kept_epoch == epoch:
            return kept
        # From the name rather than its place, so that a new domain leaves the others' order alone.
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode()), epoch])
        made = generator.permutation(rows).astype(np.uint32)
        self._permutations[name] = (epoch, made)
        return made

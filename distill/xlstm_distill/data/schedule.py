"""The order in which training reads rows: a pure function of seed and step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from xlstm_distill.data.rows import DomainRows, Row

BLOCK = 4096.0
"""Rows that a schedule puts in order at a time."""


class RowSchedule:
    """Which rows the n-th step reads: a pure function of seed and step, so that a resumed run reads the same.

    Domains alternate so that each keeps to its weight at every point: its k-th row is due at (k + 1/2) / share, and
    rows come in the order in which they are due. Within a domain every epoch is a new permutation of its training
    rows. Nothing is computed before it is asked for: rows are put in order in blocks of the time in which they are due.
    `before` counts the rows that earlier schedules of this seed have drawn of each domain; this one goes on after them.
    """

    def __init__(
        self,
        domains: Mapping[str, DomainRows],
        weights: Mapping[str, float],
        seed: int,
        total: int,
        before: Mapping[str, int] | None = None,
    ) -> None:
        self.domains, self.seed, self.total, self.before = domains, seed, total, dict(before or {})
        self.names = [name for name, weight in weights.items() if weight > 0]
        self._share = np.array([weights[name] for name in self.names]) / sum(
            weights[name] for name in self.names
        )
        self._block: tuple[int, np.ndarray, np.ndarray] = (0, *self._order_block(0))
        self._permutations: dict[str, tuple[int, np.ndarray]] = {}

    def rows(self, step: int, batch: int) -> list[Row]:
        """The rows of a step, with `batch` rows a step."""
        if (step + 1) * batch > self.total:
            raise IndexError(
                f"step {step} of {batch} rows is beyond the schedule's {self.total} rows"
            )
        return [self._row(n) for n in range(step * batch, (step + 1) * batch)]

    def _row(self, n: int) -> Row:
        first, choices, draws = self._block
        if not first <= n < first + len(choices):
            first, choices, draws = self._block = self._find_block(n)
        name = self.names[choices[n - first]]
        rows = self.domains[name]
        epoch, index = divmod(self.before.get(name, 0) + int(draws[n - first]), rows.train_rows)
        return name, rows.validation + int(self._permutation(name, epoch, rows.train_rows)[index])

    def drawn(self) -> dict[str, int]:
        """Rows that have been drawn of each domain when this schedule ends, by it and before it."""
        number = self._block_number(self.total - 1)
        due = self._drawn(number)
        choices, _ = self._order_block(number)
        counts = due + np.bincount(choices[: self.total - due.sum()], minlength=len(due))
        return self.before | {
            n: self.before.get(n, 0) + int(c) for n, c in zip(self.names, counts, strict=True)
        }

    def _find_block(self, n: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The block that holds row n: its first row, and the domain and draw of each of its rows."""
        number = self._block_number(n)
        return int(self._drawn(number).sum()), *self._order_block(number)

    def _block_number(self, n: int) -> int:
        number = int(n // BLOCK)  # rounding moves a block's first row by less than a row per domain
        while int(self._drawn(number).sum()) > n:
            number -= 1
        while int(self._drawn(number + 1).sum()) <= n:
            number += 1
        return number

    def _drawn(self, number: int) -> np.ndarray:
        """Rows of each domain that are due before a block."""
        return np.maximum(np.ceil(self._share * (number * BLOCK) - 0.5), 0).astype(np.int64)

    def _order_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        starts, stops = self._drawn(number), self._drawn(number + 1)
        choices = np.repeat(np.arange(len(starts)), stops - starts)
        draws = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        order = np.argsort((draws + 0.5) / self._share[choices], kind="stable")
        return choices[order], draws[order]

    def _permutation(self, name: str, epoch: int, rows: int) -> np.ndarray:
        if self._permutations.get(name, (-1,))[0] != epoch:
            generator = np.random.default_rng([self.seed, zlib.crc32(name.encode()), epoch])
            self._permutations[name] = (epoch, generator.permutation(rows).astype(np.uint32))
        return self._permutations[name][1]

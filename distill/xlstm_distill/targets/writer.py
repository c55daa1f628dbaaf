"""Write a shard of coded targets: rows are coded by worker processes and written in order."""

from __future__ import annotations

import contextlib
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xlstm_distill.artifacts.files import written_whole
from xlstm_distill.errors import RunError
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.targets.coding import HERE, CodedRow, Coder, KeptRow
from xlstm_distill.targets.shard import HEADER_BYTES, ROW, Figures, Header, Identity, shard_name
from xlstm_distill.targets.transfer import HostTargets, to_host

MEASURED_ROWS = 17
"""The KL error of the coding is measured on every row whose number is a multiple of this.

By number, so that it is the same rows whoever writes them. Not 16, the step at which rows are held
out: those lie together, and the sample would be one stretch of text.
"""


class TargetShardWriter:
    """Write a shard's rows into an open file; `write_shard` makes one.

    Rows are coded by `coder` and written in their order, so the bytes do not depend on it.
    """

    def __init__(
        self,
        file: BinaryIO,
        identity: Identity,
        vocabulary: int,
        number: int,
        first_row: int,
        coder: Coder = HERE,
    ) -> None:
        self.file, self.identity, self.vocabulary = file, identity, vocabulary
        self.number, self.first_row = number, first_row
        self.coder = coder
        # Rows under way, in order: coded or being coded, checksum of their text, sum of their cut.
        self.under_way: deque[tuple[Future[CodedRow], int, float]] = deque()
        self.index: list[tuple[int, int, int, int, int]] = []
        self.offset = HEADER_BYTES
        self.figures = Figures()
        # The header is known last. Until it is written, the file is no shard of targets.
        file.write(bytes(HEADER_BYTES))

    def add(self, counts: Sequence[int], sources: Sequence[int], targets: SparseTargets) -> None:
        """Append rows.

        For each row, `counts` holds its kept tokens and `sources` the checksum of its text.
        `targets` holds the top k of all their tokens in order, to be cut to the identity's mass.

        Raises:
            RunError: the teacher's logits were not finite.
        """
        self.put(counts, sources, to_host(targets, self.identity.mass, self.identity.min_k))

    def put(self, counts: Sequence[int], sources: Sequence[int], targets: HostTargets) -> None:
        """Append rows as `add` does, of targets that are cut already and perhaps still copied."""
        ids, log_probs, lengths, tail, cut = targets.wait()
        place = np.arange(ids.shape[1])
        start = 0
        for count, source in zip(counts, sources, strict=True):
            own = slice(start, start + count)
            start += count
            number = self.first_row + len(self.index) + len(self.under_way)
            # A token always keeps an id, unless no log-probability of it is finite.
            if count and int(lengths[own].min()) == 0:
                raise RunError(
                    f"capture/{self.identity.domain}: the teacher's logits of row {number} are "
                    "not finite."
                )
            # Flat from here on: what is padding here would be most of what a worker is sent.
            kept = place < lengths[own, None]
            row = KeptRow(
                counts=lengths[own],
                ids=ids[own][kept],
                log_probs=log_probs[own][kept],
                tail=tail[own],
                vocabulary=self.vocabulary,
                measured=number % MEASURED_ROWS == 0,
            )
            self.under_way.append((self.coder.submit(row), source, float(cut[own].sum())))
            self._write(self.coder.ahead)

    def _write(self, most: int) -> None:
        """Write the oldest rows until no more than `most` are under way; waits for them."""
        while len(self.under_way) > most:
            future, source, cut = self.under_way.popleft()
            row = future.result()
            self.figures.tokens += row.tokens
            self.figures.kept += row.kept
            self.figures.cut += cut
            if row.kl_error is not None:
                self.figures.measured += row.tokens
                self.figures.measured_rows += row.tokens > 0
                self.figures.kl_error += row.kl_error
            checksum = zlib.crc32(row.data)
            self.index.append((self.offset, len(row.data), row.tokens, checksum, source))
            self.file.write(row.data)
            self.offset += len(row.data)

    def finish(self) -> None:
        """Write the rows that are still under way, the index and, last, the header."""
        self._write(0)
        index = np.array(self.index, ROW).tobytes()
        self.file.write(index)
        self.figures.bytes = self.offset + len(index)
        header = Header(
            identity=self.identity,
            vocabulary=self.vocabulary,
            shard=self.number,
            first_row=self.first_row,
            rows=len(self.index),
            index_offset=self.offset,
            index_checksum=zlib.crc32(index),
            figures=self.figures,
        )
        # Last, because it holds the index's checksum and the figures.
        self.file.seek(0)
        self.file.write(header.to_bytes())


@contextlib.contextmanager
def write_shard(
    directory: Path,
    identity: Identity,
    vocabulary: int,
    number: int,
    first_row: int,
    coder: Coder = HERE,
) -> Iterator[TargetShardWriter]:
    """Give a writer; the shard appears under its name when the block ends without an error."""
    with written_whole(directory / shard_name(number)) as file:
        writer = TargetShardWriter(file, identity, vocabulary, number, first_row, coder)
        yield writer
        writer.finish()

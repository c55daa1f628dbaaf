"""The order of files: few are open at once, each is visited few times, sizes cost one listing."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from xlstm_distill.data.files.order import (
    LANES,
    SIZE_UNKNOWN,
    SourceFile,
    lanes_of,
    listed_sizes,
    text_of,
)


class Listed(MemoryFileSystem):
    """A remote file system that counts what is asked of it."""

    protocol = "listed"
    store: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[Counter[str]] = Counter()

    def find(self, *args, **kwargs):
        self.asked["find"] += 1
        return super().find(*args, **kwargs)

    def _open(self, *args, **kwargs):
        self.asked["open"] += 1
        return super()._open(*args, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("listed://"))


def files(sizes):
    return [SourceFile(f"{n:05}", lambda state: iter(()), size) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(("count", "visits"), [(1, 1), (8, 1), (9, 3), (1023, 3), (5000, 2)])
def test_few_files_are_open_and_each_is_visited_few_times(count, visits):
    made = files([1000 + n % 7 for n in range(count)])
    lanes = lanes_of(made, seed=0)
    assert len(lanes) <= LANES
    labels = Counter(visit.file.label for lane in lanes for visit in lane.visits)
    assert len(labels) == count
    assert max(labels.values()) == visits
    assert sum(lane.text for lane in lanes) == sum(file.text for file in made)
    for file in made[:50]:
        own = [v for lane in lanes for v in lane.visits if v.file is file]
        # Every place of a file is in one of its visits.
        for place in range(file.text + 500):
            assert sum(visit.takes(place) for visit in own) == 1


def test_large_files_have_lanes_to_themselves_and_neighbours_share_one():
    lanes = lanes_of(files([10] * 30 + [1000] * 6), seed=3)
    groups = sorted(sorted({int(v.file.label) for v in lane.visits}) for lane in lanes)
    assert groups == [list(range(15)), list(range(15, 30)), *([n] for n in range(30, 36))]
    again = lanes_of(files([10] * 30 + [1000] * 6), seed=3)
    other = lanes_of(files([10] * 30 + [1000] * 6), seed=4)
    order = [[v.file.label for v in lane.visits] for lane in lanes]
    assert order == [[v.file.label for v in lane.visits] for lane in again]
    assert order != [[v.file.label for v in lane.visits] for lane in other]


def test_sizes_of_remote_files_come_from_one_listing(monkeypatch):
    fsspec.register_implementation("listed", Listed, clobber=True)
    system = fsspec.filesystem("listed")
    addresses = [f"listed://data/{n % 20}/{n}.jsonl" for n in range(5000)]
    for n, address in enumerate(addresses):
        system.pipe_file(address, b"x" * (n % 13))
    system.asked.clear()
    assert listed_sizes(addresses) == [n % 13 for n in range(5000)]
    assert system.asked == {"find": 1}
    # Sizes of some are sizes of none: the others would have to be guessed beside them.
    assert listed_sizes([*addresses, "listed://data/gone.jsonl"]) == [None] * 5001

    def fail(*_, **__):
        raise ConnectionError("reset")

    monkeypatch.setattr(Listed, "find", fail)
    with pytest.raises(ConnectionError):
        listed_sizes(addresses)


def test_sizes_that_cannot_be_had_count_alike():
    assert listed_sizes(["https://host/a.jsonl", "https://host/b.jsonl"]) == [None, None]
    assert listed_sizes(["zip://a.jsonl::hf://datasets/o/n/a.zip"]) == [None]
    assert listed_sizes([]) == []
    assert text_of("a.jsonl", None) == text_of("b.parquet", None) == SIZE_UNKNOWN
    assert text_of("a.JSONL.zst", 10) == 30
    assert text_of("a.parquet", 10) == 20
    assert text_of("a.jsonl", 0) == 1

"""Shards give back what was written, compactly, and name themselves when they are damaged."""

from __future__ import annotations

import errno
import os
import shutil
import uuid

import numpy as np
import pyarrow as pa
import pytest

from xlstm_distill.artifacts import files
from xlstm_distill.data.packing import PackedRow
from xlstm_distill.data.shards import INDEX_FILE, RowShardWriter, ShardReader, write_rows
from xlstm_distill.errors import RunError


def random_rows(count, context, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        used = int(rng.integers(1, context + 1))
        cuts = np.unique(rng.integers(1, used, 3)) if used > 1 else np.empty(0, int)
        lengths = np.diff([0, *cuts.tolist(), used]).tolist()
        ids = np.full(context, 0, np.int32)
        ids[:used] = rng.integers(0, vocabulary, used)
        supervised = np.zeros(context, bool)
        supervised[:used] = rng.random(used) < 0.5
        rows.append(PackedRow(ids, supervised, lengths, used))
    return rows


def assert_same(row, expected):
    assert np.array_equal(row.ids, expected.ids)
    assert np.array_equal(row.supervised, expected.supervised)
    assert row.lengths == expected.lengths
    assert row.used == expected.used


@pytest.mark.parametrize(
    "vocabulary", [2**16, 2**16 + 1, 2**20], ids=["2 bytes", "just 4 bytes", "4 bytes"]
)
@pytest.mark.parametrize("context", [1, 7, 64, 129])
def test_rows_come_back_from_several_shards(context, vocabulary, tmp_path):
    rows = random_rows(50, context, vocabulary)
    rows[3].ids[0] = vocabulary - 1
    writer = RowShardWriter(tmp_path, context, vocabulary)
    for n, row in enumerate(rows):
        writer.add(row)
        if n % 17 == 16:
            writer.end_shard()
    writer.close()
    reader = ShardReader(tmp_path)
    assert (len(reader), reader.context, len(reader.shards)) == (50, context, 3)
    for n in np.random.default_rng(1).permutation(50).tolist():
        assert_same(reader.row(n), rows[n])
    for outside in (-1, 50):
        with pytest.raises(IndexError):
            reader.row(outside)
    assert writer.totals["tokens"] == sum(row.used for row in rows)
    assert writer.totals["supervised"] == sum(int(row.supervised.sum()) for row in rows)


def test_shards_are_mapped_and_keep_no_file_open(tmp_path):
    rows = random_rows(12, 512, 2**17)
    writer = RowShardWriter(tmp_path, 512, 2**17)
    for row in rows:
        writer.add(row)
        writer.end_shard()
    writer.close()
    reader, allocated = ShardReader(tmp_path, most_open=2), pa.total_allocated_bytes()
    before = len(os.listdir("/proc/self/fd"))
    kept = [reader.row(n) for n in range(12)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(reader.mapped) == 2
    assert pa.total_allocated_bytes() == allocated
    for row, expected in zip(kept, rows, strict=True):  # those of closed shards too
        assert_same(row, expected)


def test_a_token_takes_four_bytes_and_a_bit(tmp_path):
    write_rows(tmp_path, random_rows(64, 4096, 128_256), 4096, 128_256)
    (shard,) = tmp_path.glob("*.arrow")
    assert shard.stat().st_size / (64 * 4096) < 4.15


def test_the_datasets_library_reads_a_shard(tmp_path):
    import datasets

    rows = random_rows(5, 16, 100)
    write_rows(tmp_path, rows, 16, 100)
    found = datasets.Dataset.from_file(str(tmp_path / "rows-00000.arrow"))
    assert found.column_names == ["input_ids", "supervised", "lengths", "checksum"]
    assert found[4]["input_ids"] == rows[4].ids.tolist()
    assert found[4]["lengths"] == rows[4].lengths


@pytest.mark.parametrize("damage", ["cut", "gone", "garbled", "flipped", "index"])
def test_a_damaged_file_names_itself(damage, tmp_path):
    write_rows(tmp_path, random_rows(8, 16, 100), 16, 100)
    shard = tmp_path / "rows-00000.arrow"
    content = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(content[:-8])
    elif damage == "gone":
        shard.unlink()
    elif damage == "garbled":
        shard.write_bytes(b"\xff" * len(content))
    elif damage == "flipped":
        shard.write_bytes(bytes([*content[:-200], content[-200] ^ 1, *content[-199:]]))
    else:
        (tmp_path / INDEX_FILE).write_text("{")
    name = INDEX_FILE if damage == "index" else "rows-00000.arrow"
    with pytest.raises(
        RunError, match=rf"{name}: cannot be read .* run the command again to make it anew"
    ) as caught:
        reader = ShardReader(tmp_path)
        for row in range(8):
            reader.row(row)
    assert "\n" not in str(caught.value)


def test_every_damaged_byte_is_found_by_its_row_alone(tmp_path):
    """A training opens at once: no row but those it reads is compared with its checksum."""
    rows = random_rows(8, 16, 100)
    write_rows(tmp_path, rows, 16, 100)
    shard = tmp_path / "rows-00000.arrow"
    whole = shard.read_bytes()
    kept = [rows[5].ids.astype(np.uint16).tobytes(), np.array(rows[5].lengths, "<i4").tobytes()]
    for part in kept:
        place = whole.index(part)
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        reader = ShardReader(tmp_path)
        for other in (0, 4, 6, 7):
            assert_same(reader.row(other), rows[other])
        with pytest.raises(RunError, match="row 5 has not the checksum it was written with"):
            reader.row(5)


def swap(folder, other):
    """Put another folder in this one's place, as a restore does; both stay."""
    folder.rename(folder.with_name("kept"))
    other.rename(folder)


def test_a_reader_stays_with_the_rows_that_it_began_with(tmp_path):
    """Another command puts rows of other settings in their place; they have the same sizes."""
    rows, others = random_rows(6, 16, 100), random_rows(6, 16, 100, seed=1)
    for name, own in (("math", rows), ("other", others)):
        writer = RowShardWriter(tmp_path / name, 16, 100)
        (tmp_path / name).mkdir()
        for row in own:
            writer.add(row)
            writer.end_shard()
        writer.close()
    reader = ShardReader(tmp_path / "math", most_open=1)
    assert_same(reader.row(0), rows[0])
    swap(tmp_path / "math", tmp_path / "other")
    for number, row in enumerate(rows):
        assert_same(reader.row(number), row)
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(RunError, match=r"arrow: another command removed it while this one was"):
        reader.row(0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_leaves_no_shard(tmp_path, monkeypatch):
    # A partial file gets a random name: fix it, to have a full device there.
    monkeypatch.setattr(files.uuid, "uuid4", lambda: uuid.UUID(int=0))
    (tmp_path / f".rows-00000.arrow.{0:012}.partial").symlink_to("/dev/full")
    writer = RowShardWriter(tmp_path, 16, 100)
    for row in random_rows(8, 16, 100):
        writer.add(row)
    with pytest.raises(OSError) as caught:
        writer.end_shard()
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
    assert writer.shards == []

"""Shards and stores: what was written comes back, and nothing else is ever taken for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import zlib

import pytest
import torch

from xlstm_distill.errors import RunError
from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.targets.codec import arrange, decode, encode, kl_error
from xlstm_distill.targets.coding import coding
from xlstm_distill.targets.providers import to_targets
from xlstm_distill.targets.shard import HEADER_BYTES, MAGIC, PREFIX, Identity, read_header
from xlstm_distill.targets.store import INDEX_FILE, Store, shard_checks, write_index
from xlstm_distill.targets.writer import MEASURED_ROWS, write_shard

VOCABULARY = 300
IDENTITY = Identity("math", "rows", "words", "teacher", "main", "bfloat16", 64, 0.95, 4)
COUNTS = ([5, 0, 9], [7, 1], [3])
"""Kept tokens of the rows of three shards."""


def exact_targets(shard):
    logits = 3 * torch.randn(
        sum(COUNTS[shard]), VOCABULARY, generator=torch.Generator().manual_seed(shard)
    )
    return SparseTargets.from_logits(logits, IDENTITY.top_k)


def write(directory, shards=(0, 1, 2), identity=IDENTITY):
    directory.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        first = sum(len(counts) for counts in COUNTS[:shard])
        with write_shard(directory, identity, VOCABULARY, shard, first) as writer:
            writer.add(
                COUNTS[shard],
                [100 + first + n for n in range(len(COUNTS[shard]))],
                exact_targets(shard),
            )
    write_index(directory, identity)
    return directory


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "capture" / "math" / "store")


def read_all(store):
    return to_targets([store.row(row)[0] for row in range(store.rows)])


def test_a_store_stays_with_the_targets_that_it_began_with(directory, tmp_path):
    """Another command puts targets of other settings in their place."""
    expected = read_all(Store(directory, IDENTITY))
    store = Store(directory, IDENTITY, most_open=1)
    other = write(tmp_path / "other", identity=dataclasses.replace(IDENTITY, data="others"))
    directory.rename(tmp_path / "kept")
    other.rename(directory)
    found = read_all(store)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.log_probs, expected.log_probs)
    shutil.rmtree(tmp_path / "kept")
    with pytest.raises(RunError, match=r"bin: another command removed it while this one was"):
        store.row(0)


def test_rows_come_back_in_any_order(directory):
    store = Store(directory, IDENTITY, most_open=1)
    assert store.rows == 6
    expected = [exact_targets(n).keep_mass(0.95, 4) for n in range(3)]
    for row, shard, start, count in (
        (5, 2, 0, 3),
        (0, 0, 0, 5),
        (4, 1, 7, 1),
        (1, 0, 5, 0),
        (2, 0, 5, 9),
    ):
        found, source = store.row(row)
        assert source == 100 + row
        own = slice(start, start + count)
        mine = SparseTargets(
            expected[shard].ids[own], expected[shard].log_probs[own], expected[shard].tail[own]
        )
        kept = torch.isfinite(mine.log_probs)
        assert found.ids.tolist() == mine.ids[kept].tolist()
        exact = arrange(
            kept.sum(1).numpy(), *(part.numpy() for part in (mine.ids, mine.log_probs, mine.tail))
        )
        assert found.counts.tolist() == exact.counts.tolist()
        assert kl_error(exact, found).sum() <= 1e-3 * count
    assert len(store.open) == 1


def test_figures_are_those_of_the_files(directory):
    figures = json.loads((directory / INDEX_FILE).read_text())["figures"]
    shards = list(directory.glob("*.bin"))
    kept = read_all(Store(directory, IDENTITY))
    assert figures["tokens"] == 25
    assert figures["bytes_per_token"] == sum(p.stat().st_size for p in shards) / 25
    assert figures["mean_k"] == float(torch.isfinite(kept.log_probs).sum()) / 25
    cut = 0.0
    for shard in range(3):
        full = exact_targets(shard)
        cut_to_mass = full.keep_mass(0.95, 4)
        cut += float((1 - full.tail).log().sum() - (1 - cut_to_mass.tail).log().sum())
    assert figures["mean_cut"] == pytest.approx(cut / 25, abs=1e-5)
    assert 0 < figures["mean_kl_error"] < 1e-3


@pytest.mark.parametrize("place", [0, 8, 20, 40, HEADER_BYTES + 3, HEADER_BYTES + 60, -30, -1])
def test_a_byte_that_changed_is_found_when_it_matters(directory, place):
    path = directory / "targets-00000.bin"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        RunError, match=rf"{path}: .*Delete {directory.parent} and run capture again"
    ):
        read_all(Store(directory, IDENTITY))


@pytest.mark.parametrize("size", [0, 10, HEADER_BYTES, HEADER_BYTES + 50, -1])
def test_a_shard_cut_short_names_itself(directory, size):
    path = directory / "targets-00001.bin"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(RunError, match=r"targets-00001\.bin: cut short"):
        Store(directory, IDENTITY)
    path.write_bytes(data + b"\0")
    with pytest.raises(RunError, match=r"targets-00001\.bin: cut short or overlong"):
        Store(directory, IDENTITY)


def test_other_files_in_the_place_of_a_shard_are_refused(directory, tmp_path):
    path = directory / "targets-00002.bin"
    good = path.read_bytes()
    for content, message in (
        (b"x" * 5000, "not a shard of targets"),
        (
            good[:8] + struct.pack("<I", 7) + good[12:],
            "has format version 7, this program reads version 1",
        ),
        (
            (directory / "targets-00001.bin").read_bytes(),
            "is not the shard that index.json was written for",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(RunError, match=message):
            Store(directory, IDENTITY)
    path.unlink()
    with pytest.raises(RunError, match=r"targets-00002\.bin: cannot be read \(No such file"):
        Store(directory, IDENTITY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer", "others"),
        ("data", "others"),
        ("teacher", "others"),
        ("dtype", "float32"),
        ("revision", None),
        ("domain", "code"),
        ("top_k", 63),
        ("mass", None),
        ("min_k", 5),
    ],
)
def test_a_store_made_from_something_else_is_refused(directory, field, value):
    expected = dataclasses.replace(IDENTITY, **{field: value})
    with pytest.raises(
        RunError, match=rf"belongs to another run: its {field} is .*, here it is {value!r}"
    ):
        Store(directory, expected)


def test_one_shard_of_another_tokenizer_is_refused(directory):
    write(directory, shards=(1,), identity=dataclasses.replace(IDENTITY, tokenizer="others"))
    write_index(directory, IDENTITY)
    with pytest.raises(
        RunError, match=r"targets-00001\.bin: belongs to another run: its tokenizer is 'others'"
    ):
        Store(directory, IDENTITY)


def test_an_index_that_is_missing_damaged_or_of_another_version_is_refused(directory):
    path = directory / INDEX_FILE
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "version": 2}))
    with pytest.raises(RunError, match="has format version 2, this program reads version 1"):
        Store(directory, IDENTITY)
    for spoil in (lambda: path.write_text("{"), lambda: path.write_text("[]"), path.unlink):
        spoil()
        with pytest.raises(RunError, match=r"index\.json: cannot be read"):
            Store(directory, IDENTITY)


def test_a_header_that_lies_with_a_right_checksum_does_not_reach_the_decoder(directory):
    """The store's index holds the header's checksum, so a shard put together by hand is refused."""
    path = directory / "targets-00000.bin"
    data = path.read_bytes()
    length = PREFIX.unpack_from(data)[2]
    header = json.loads(data[PREFIX.size : PREFIX.size + length])
    header["first_row"] = 1
    text = json.dumps(header, sort_keys=True).encode()
    page = PREFIX.pack(MAGIC, 1, len(text), zlib.crc32(text)) + text
    path.write_bytes(page.ljust(HEADER_BYTES, b"\0") + data[HEADER_BYTES:])
    assert read_header(path).first_row == 1
    with pytest.raises(RunError, match=r"is not the shard that index\.json"):
        Store(directory, IDENTITY)


def test_a_row_beyond_the_last_is_refused(directory):
    with pytest.raises(RunError, match="has 6 rows, row 6 was asked for"):
        Store(directory, IDENTITY).row(6)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        write_shard(tmp_path, IDENTITY, VOCABULARY, 0, 0) as writer,
    ):
        writer.add([5, 0, 9], [1, 2, 3], exact_targets(0))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_name_their_row(tmp_path):
    logits = torch.randn(4, VOCABULARY)
    logits[3, 7] = torch.nan
    targets = SparseTargets.from_logits(logits, 8)
    with (
        pytest.raises(
            RunError, match="capture/math: the teacher's logits of row 11 are not finite"
        ),
        write_shard(tmp_path, IDENTITY, VOCABULARY, 0, 10) as writer,
    ):
        writer.add([3, 1], [0, 0], targets)


def test_what_a_killed_writer_left_is_not_counted(directory):
    left = directory / ".targets-00003.bin.0123456789ab.partial"
    left.write_bytes((directory / "targets-00000.bin").read_bytes()[:5000])
    write_index(directory, IDENTITY)
    assert Store(directory, IDENTITY).rows == 6
    assert not left.exists()


@pytest.mark.multi_process
@pytest.mark.parametrize("mass", [0.95, None])
def test_shards_hold_the_codec_s_bytes_whoever_codes_them(mass, tmp_path):
    """Rows are coded in this process or in two others; the whole files are the same."""
    identity = dataclasses.replace(IDENTITY, mass=mass)
    counts = [7, 0, 40, 1, 25, 3, 60, 12] * 6
    logits = 3 * torch.randn(sum(counts), VOCABULARY, generator=torch.Generator().manual_seed(5))
    targets = SparseTargets.from_logits(logits, identity.top_k)
    files = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        with (
            coding(workers) as coder,
            write_shard(folder, identity, VOCABULARY, 0, 3, coder) as writer,
        ):
            start = 0
            for rows in (counts[:9], counts[9:]):  # in two batches
                stop = start + sum(rows)
                writer.add(rows, range(len(rows)), targets.rows(slice(start, stop)))
                assert len(writer.under_way) <= 2 * workers
                start = stop
        files.append((folder / "targets-00000.bin").read_bytes())
    assert files[0] == files[1]
    expected, errors = [], []
    start = 0
    for number, count in enumerate(counts, 3):
        kept = targets.rows(slice(start, start + count)).keep_mass(mass, identity.min_k)
        start += count
        lengths = torch.isfinite(kept.log_probs).sum(1).numpy()
        row = arrange(lengths, kept.ids.numpy(), kept.log_probs.numpy(), kept.tail.numpy())
        expected.append(encode(row, VOCABULARY))
        if number % MEASURED_ROWS == 0:
            errors.append(kl_error(row, decode(expected[-1], count, VOCABULARY)).sum())
    header = read_header(tmp_path / "0" / "targets-00000.bin")
    assert files[0][HEADER_BYTES : header.index_offset] == b"".join(expected)
    sampled = [count for number, count in enumerate(counts, 3) if number % MEASURED_ROWS == 0]
    assert (header.figures.tokens, header.figures.measured) == (sum(counts), sum(sampled))
    assert header.figures.kl_error == pytest.approx(sum(errors))


@pytest.mark.parametrize("place", [HEADER_BYTES + 1, 40, -1])
def test_every_changed_byte_of_a_shard_is_found_by_its_check(directory, place):
    checks = shard_checks(directory)
    assert sorted(checks) == ["targets-00000.bin", "targets-00001.bin", "targets-00002.bin"]
    for check in checks.values():
        check()
    path = directory / "targets-00001.bin"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"targets-00001\.bin"):
        checks["targets-00001.bin"]()
    path.write_bytes((directory / "targets-00002.bin").read_bytes())  # whole, but another one
    with pytest.raises(RunError, match="another shard"):
        checks["targets-00001.bin"]()

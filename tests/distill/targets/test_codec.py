"""Coded targets: ids come back exactly, log-probabilities closely, and damage is an error."""

from __future__ import annotations

import numpy as np
import pytest

from xlstm_distill.targets.codec import (
    GAP_CURVE,
    LARGEST_GAP,
    MAX_K,
    SINGLE_KNOTS,
    arrange,
    decode,
    encode,
    id_bits,
    kl_error,
    pack_bits,
    packed_bytes,
    tables,
    unpack_bits,
)


def random_targets(counts, vocabulary, seed=0, slope=1.5):
    """Noisy Zipf distributions cut to the given counts: counts, ids, log_probs, tail, padded."""
    rng = np.random.default_rng(seed)
    counts = np.array(counts)
    width = int(counts.max(initial=0))
    ids = np.array([rng.permutation(vocabulary)[:width] for _ in counts]).reshape(
        len(counts), width
    )
    curve = -slope * np.log(np.arange(1, width + 1)) + 0.3 * rng.standard_normal(
        (len(counts), width)
    )
    curve = -np.sort(-curve, axis=1)
    tail = rng.uniform(0, 0.2, len(counts)).astype(np.float32)
    kept = np.arange(width) < counts[:, None]
    total = np.log((np.exp(curve) * kept).sum(axis=1, keepdims=True))
    log_probs = np.where(kept, curve - total + np.log1p(-tail)[:, None], -np.inf).astype(np.float32)
    return counts, ids, log_probs, tail


def there_and_back(targets, vocabulary):
    row = arrange(*targets)
    return row, decode(encode(row, vocabulary), len(row.counts), vocabulary)


@pytest.mark.parametrize("bits", [0, 1, 3, 8, 9, 17, 25])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_packed_numbers_come_back(bits, count):
    values = np.random.default_rng(bits).integers(0, 2**bits, count, dtype=np.uint32)
    data = pack_bits(values, bits)
    assert len(data) == packed_bytes(count, bits)
    assert np.array_equal(unpack_bits(data, count, bits), values)


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 97, 512, 50_257, 128_256])
def test_a_row_comes_back(vocabulary):
    most = min(MAX_K, vocabulary)
    counts = [*np.random.default_rng(1).integers(1, most + 1, 37).tolist(), 1, most]
    row, back = there_and_back(random_targets(counts, vocabulary), vocabulary)
    assert np.array_equal(back.counts, counts)
    assert np.array_equal(back.ids, row.ids)
    np.testing.assert_allclose(back.tail, row.tail, rtol=2**-11, atol=2**-24)
    starts = np.cumsum(counts) - counts
    np.testing.assert_allclose(
        np.add.reduceat(np.exp(back.log_probs), starts), 1 - back.tail, rtol=1e-5
    )
    assert kl_error(row, back).mean() < 1e-3
    for start, count in zip(starts, counts, strict=True):
        assert (np.diff(back.log_probs[start : start + count]) <= 0).all()


def test_groups_hold_the_same_ids_as_before():
    counts, ids, log_probs, tail = random_targets([256, 100, 63, 64, 80, 130], 128_256)
    _, back = there_and_back((counts, ids, log_probs, tail), 128_256)
    start = 0
    for row, count in enumerate(counts):
        own = back.ids[start : start + count]
        assert set(own) == set(ids[row, :count])
        assert np.array_equal(own[:64], ids[row, : min(count, 64)])  # up to there the order is kept
        start += count


def test_the_first_ranks_are_exact_to_half_a_step():
    """Codes are a geometric series, so a knot's error is a share of its own gap, not a sum."""
    targets = random_targets([SINGLE_KNOTS] * 200, 128_256, slope=3.0)
    row, back = there_and_back(targets, 128_256)
    step = (1 + GAP_CURVE) ** (1 / 255) - 1
    gaps = -np.diff(row.log_probs.reshape(200, -1), axis=1)
    # Half a step for the knot, half for the norm.
    bound = step * (gaps.max(axis=1) * 1.1 + LARGEST_GAP / GAP_CURVE)
    error = np.abs((back.log_probs - row.log_probs).reshape(200, -1)).max(axis=1)
    assert (error <= bound + 2**-10).all()
    assert bound.max() < 0.15


def test_ties_stay_ties_and_a_lone_id_has_all_the_mass():
    tied = np.full((1, 40), np.log(1 / 40), np.float32)
    _, back = there_and_back((np.array([40]), np.arange(40)[None], tied, np.zeros(1)), 512)
    np.testing.assert_allclose(back.log_probs, np.log(1 / 40), rtol=1e-6)
    _, back = there_and_back(
        (np.array([1]), np.array([[7]]), np.array([[-0.01]]), np.array([0.00995])), 512
    )
    assert back.ids.tolist() == [7]
    np.testing.assert_allclose(np.exp(back.log_probs), 1 - 0.00995, rtol=1e-4)


def test_gaps_wider_than_the_widest_code_reach_the_ranks_after_them():
    log_probs = np.array([[0.0, -40.0, -41.0, -90.0]], np.float32)
    row, back = there_and_back((np.array([4]), np.arange(4)[None], log_probs, np.zeros(1)), 512)
    assert kl_error(row, back)[0] < 1e-6
    assert back.log_probs[1] == pytest.approx(-LARGEST_GAP)
    assert back.log_probs[2] == pytest.approx(-41, abs=1)


def test_a_row_without_kept_tokens_takes_no_bytes():
    empty = (np.zeros(0, int), np.zeros((0, 0), int), np.zeros((0, 0)), np.zeros(0))
    row, back = there_and_back(empty, 512)
    assert encode(row, 512) == b""
    assert len(back.ids) == len(back.counts) == len(kl_error(row, back)) == 0


def test_bytes_that_are_no_row_are_refused():
    row = arrange(*random_targets([20, 200, 3], 128_256))
    data = encode(row, 128_256)
    for wrong in (data[:-1], data + b"\0", data[:2], b""):
        with pytest.raises(ValueError, match=r"end early|no row"):
            decode(wrong, 3, 128_256)
    with pytest.raises(ValueError):
        decode(data, 4, 128_256)
    with pytest.raises(ValueError, match="no row"):  # ids that the vocabulary does not have
        decode(encode(arrange(*random_targets([20], 512)), 512), 1, 400)


def test_sorted_groups_make_large_sets_smaller():
    def bytes_per_id(count):
        return len(encode(arrange(*random_targets([count] * 64, 128_256)), 128_256)) / (64 * count)

    assert id_bits(128_256) == 17
    assert bytes_per_id(256) < 16 / 8 < bytes_per_id(60)


def test_tables_place_every_rank_between_knots():
    table = tables()
    for k in (1, 2, 16, 17, 64, 80, 255, 256):
        knots = table.knots[k, : table.gaps[k] + 1]
        assert knots[0] == 0
        assert knots[-1] == k - 1
        assert (np.diff(knots) > 0).all()
        assert (table.left[k, :k] <= max(table.gaps[k] - 1, 0)).all()
        assert ((table.weight[k, :k] >= 0) & (table.weight[k, :k] <= 1)).all()

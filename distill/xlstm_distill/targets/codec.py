"""Code the sparse targets of a packed row into bytes and back (format: docs/targets.md).

Pure functions of arrays. Letters: K kept tokens of a row, k ids of one of them (1 to MAX_K), n all
ids of the row, V vocabulary, J knots, S groups.

Ids are stored in descending order of probability. From rank 64 on they are stored in groups whose
ids are sorted, which cost fewer bits. Log-probabilities are a curve over ranks, stored as its value
at a few ranks (knots), as coded gaps between them. In between, the curve is interpolated over log
rank; a group has one value.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = "NDArray[np.integer]"
Floats: TypeAlias = "NDArray[np.floating]"

# k - 1 of a token fits one byte.
MAX_K = 256
# Sorted ids cost fewer bits but share one log-probability. Only late ranks are grouped: they hold
# little mass, and the curve is flat there.
GROUPS = ((64, 16), (128, 32))
"""First rank and size of the sorted groups; ids that do not fill a group are stored singly."""
SINGLE_KNOTS = 16
KNOT_RATIO = 1.35
"""The first ranks are all knots; after them each knot's rank is this many times the one before."""
LARGEST_GAP, GAP_CURVE = 24.0, 400.0
"""Fall of log-probability of the largest code (nats), and how much finer small gaps are coded."""
LARGEST_TAIL = np.float32(1 - 2**-11)
"""The largest tail below 1 that half precision holds."""


@dataclass(frozen=True)
class TargetRow:
    """Targets of one packed row: counts (K,), tail (K,) fp32, ids (n,), log_probs (n,) fp32.

    Ids and log-probabilities follow each other token after token.
    """

    counts: Ints
    ids: Ints
    log_probs: Floats
    tail: Floats


@dataclass(frozen=True)
class Tables:
    """What follows from k alone; the first axis is k.

    knots (257, J): rank of each knot. gaps (257,): number of coded gaps, one less than knots.
    left (257, 256): the knot before each rank. weight (257, 256): weight of the knot after it.
    group (257, 256): size of the rank's group, 1 for a single id.
    levels (256,): the gap of each code (nats).
    """

    knots: Ints
    gaps: Ints
    left: Ints
    weight: Floats
    group: Ints
    levels: Floats


@functools.cache
def tables() -> Tables:
    """Make the tables, once."""
    schedule = _knot_schedule()
    knots = np.zeros((MAX_K + 1, len(schedule)), np.int64)
    gaps = np.zeros(MAX_K + 1, np.int64)
    left = np.zeros((MAX_K + 1, MAX_K), np.uint8)
    weight = np.zeros((MAX_K + 1, MAX_K), np.float32)
    group = np.ones((MAX_K + 1, MAX_K), np.uint8)
    for k in range(1, MAX_K + 1):
        # The last rank is always a knot, so that every rank lies between two.
        own = [*(rank for rank in schedule if rank < k - 1), k - 1]
        knots[k, : len(own)] = own
        # Padded with the last rank, so that all k have rows of one length.
        knots[k, len(own) :] = own[-1]
        gaps[k] = len(own) - 1
        place = np.arange(k, dtype=np.float64)
        for start, size in _groups(k):
            group[k, start : start + size] = size
            # Sorting loses the order inside a group: all its ids get the curve at its middle.
            place[start : start + size] = start + (size - 1) / 2
        if k > 1:
            left[k, :k], weight[k, :k] = _interpolation(own, place)
    return Tables(knots, gaps, left, weight, group, _gap_levels())


def _knot_schedule() -> list[int]:
    """List the ranks of the knots of the largest set of ids; smaller sets use the first of them."""
    ranks = list(range(SINGLE_KNOTS))
    while ranks[-1] < MAX_K - 1:
        # Ranks count from 0, so the ratio applies to rank + 1.
        grown = round((ranks[-1] + 1) * KNOT_RATIO) - 1
        ranks.append(max(ranks[-1] + 1, grown))
    return ranks


def _groups(k: int) -> list[tuple[int, int]]:
    """List first rank and size of the sorted groups of a set of k ids.

    At each rank it is the largest group that may start there and fits.
    """
    found: list[tuple[int, int]] = []
    rank = GROUPS[0][0]
    while True:
        fitting = [size for start, size in GROUPS if rank >= start and rank + size <= k]
        if not fitting:
            return found
        found.append((rank, fitting[-1]))
        rank += fitting[-1]


def _interpolation(knots: list[int], places: Floats) -> tuple[Ints, Floats]:
    """For each place, return the knot before it and the weight of the knot after it.

    Interpolation is linear in log(1 + rank): probabilities fall roughly as a power of the rank, and
    such a curve is a line there.
    """
    # Plus 1, since ranks count from 0.
    x, at = np.log1p(knots), np.log1p(places)
    before = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(knots) - 2)
    low, high = x[before], x[before + 1]
    return before, (at - low) / (high - low)


def _gap_levels() -> Floats:
    """Return the gap that each code stands for: steps grow geometrically from 0 to LARGEST_GAP."""
    # Fine steps where gaps are small: most ranks follow each other closely.
    growth = (1 + GAP_CURVE) ** (np.arange(256) / 255)
    return LARGEST_GAP * (growth - 1) / GAP_CURVE


def arrange(counts: Ints, ids: Ints, log_probs: Floats, tail: Floats) -> TargetRow:
    """Put targets into the order in which they are stored.

    ids and log_probs are (K, width), descending, padded behind `counts` (K,); tail is (K,).
    """
    mask = np.arange(ids.shape[1]) < counts[:, None]
    return in_stored_order(counts, ids[mask], log_probs[mask], tail)


def in_stored_order(counts: Ints, ids: Ints, log_probs: Floats, tail: Floats) -> TargetRow:
    """Put targets into the order in which they are stored.

    ids (n,) and log_probs (n,) are descending within each token; counts (K,) and tail (K,).
    """
    counts = counts.astype(np.int64)
    flat_ids = ids.astype(np.uint32)
    flat_probs = log_probs.astype(np.float32)
    _, _, group = _per_id(counts)
    for _, size in GROUPS:
        places = np.flatnonzero(group == size).reshape(-1, size)
        order = np.argsort(flat_ids[places], axis=1)
        for values in (flat_ids, flat_probs):
            values[places] = np.take_along_axis(values[places], order, axis=1)
    return TargetRow(counts, flat_ids, flat_probs, tail.astype(np.float32))


def encode(row: TargetRow, vocabulary: int) -> bytes:
    """Code an arranged row."""
    _, _, group = _per_id(row.counts)
    parts = [
        # One less, so that 256 fits a byte: no token keeps 0 ids.
        (row.counts - 1).astype(np.uint8),
        # Half precision, and little-endian on every machine.
        row.tail.astype("<f2"),
        _encode_curve(row),
        pack_bits(row.ids[group == 1], id_bits(vocabulary)),
    ]
    for _, size in GROUPS:
        parts += _encode_groups(row.ids[group == size].reshape(-1, size), vocabulary)
    return b"".join(part.tobytes() for part in parts)


def decode(data: bytes | memoryview, tokens: int, vocabulary: int) -> TargetRow:
    """Read back a row of `tokens` kept tokens.

    Raises:
        ValueError: the bytes have another length than their own counts imply, or an id lies beyond
            the vocabulary.
    """
    # Parts have no lengths of their own: each follows from what was read before it.
    buffer = _Buffer(np.frombuffer(data, np.uint8))
    counts = buffer.take(tokens).astype(np.int64) + 1
    tail = buffer.take(2 * tokens).view("<f2").astype(np.float32)
    codes = buffer.take(int(tables().gaps[counts].sum()))
    token, index, group = _per_id(counts)
    ids = np.empty(len(index), np.uint32)
    single = np.flatnonzero(group == 1)
    bits = id_bits(vocabulary)
    packed = buffer.take(packed_bytes(len(single), bits))
    ids[single] = unpack_bits(packed, len(single), bits)
    for _, size in GROUPS:
        places = np.flatnonzero(group == size)
        if len(places):
            ids[places] = _decode_groups(buffer, len(places) // size, size, vocabulary).ravel()
    beyond = int(ids.max(initial=0)) >= vocabulary
    if buffer.left or beyond:
        raise ValueError("its bytes are no row of targets")
    return TargetRow(counts, ids, _decode_curve(counts, codes, tail, token, index), tail)


def kl_error(exact: TargetRow, decoded: TargetRow) -> Floats:
    """KL(exact || decoded) over the kept ids, both renormalised there; (K,) in nats."""
    if not len(exact.counts):
        return np.zeros(0)
    first = np.cumsum(exact.counts) - exact.counts
    token = np.repeat(np.arange(len(exact.counts)), exact.counts)

    def restricted(row: TargetRow) -> Floats:
        # In double precision: the errors to measure are of the order of 1e-7 nats.
        values = row.log_probs.astype(np.float64)
        return values - np.log(np.add.reduceat(np.exp(values), first))[token]

    p, q = restricted(exact), restricted(decoded)
    return np.add.reduceat(np.exp(p) * (p - q), first)


def _per_id(counts: Ints) -> tuple[Ints, Ints, Ints]:
    """Return for every id (n,): its token, its place in the tables, and the size of its group.

    The place is in the tables' flattened (k, rank) axes.
    """
    token = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    rank = np.arange(len(token)) - np.repeat(first, counts)
    place = np.repeat(counts * MAX_K, counts) + rank
    return token, place, tables().group.ravel()[place]


def _encode_curve(row: TargetRow) -> NDArray[np.uint8]:
    """Code the gaps between knots.

    Each gap starts at the decoded value of the knot before it, so that errors do not add up.
    """
    table = tables()
    # A gap gets the code of the level that is nearest.
    middles = (table.levels[1:] + table.levels[:-1]) / 2
    first = np.cumsum(row.counts) - row.counts
    curve = row.log_probs.astype(np.float64)
    value = curve[first] if len(first) else np.zeros(0)
    codes = np.zeros((len(first), table.knots.shape[1] - 1), np.uint8)
    # All tokens at once, knot by knot. Tokens with fewer knots repeat their last one; those codes
    # are dropped at the end.
    for knot in range(1, table.knots.shape[1]):
        gap = value - curve[first + table.knots[row.counts, knot]]
        codes[:, knot - 1] = np.searchsorted(middles, gap)
        value = value - table.levels[codes[:, knot - 1]]
    own = np.arange(codes.shape[1]) < table.gaps[row.counts][:, None]
    return codes[own]


def _decode_curve(counts: Ints, codes: Ints, tail: Floats, token: Ints, index: Ints) -> Floats:
    """Interpolate between knots and normalise to the mass 1 - tail; (n,) fp32."""
    if not len(counts):
        return np.zeros(0, np.float32)
    table = tables()
    knots = table.gaps[counts] + 1
    start = np.cumsum(knots) - knots
    # One more than there are knots: a lone knot has none after it to interpolate with.
    falls = np.zeros(int(knots.sum()) + 1)
    is_gap = np.ones(len(falls), bool)
    is_gap[start] = is_gap[-1] = False
    falls[is_gap] = table.levels[codes]
    # A curve falls from 0 at its first knot. One running sum over the row gives all curves, as the
    # fall since the first knot of each.
    total = np.cumsum(falls)
    at_first = np.append(np.repeat(total[start], knots), total[-1])
    curve = (at_first - total).astype(np.float32)
    before = start[token] + table.left.ravel()[index]
    low, high = curve[before], curve[before + 1]
    values = low + (high - low) * table.weight.ravel()[index]
    mass = np.add.reduceat(np.exp(values), np.cumsum(counts) - counts)
    # A tail that rounds to 1 would make the logarithm infinite.
    shift = np.log1p(-np.minimum(tail, LARGEST_TAIL)) - np.log(mass)
    return values + shift[token]


def id_bits(vocabulary: int) -> int:
    """Bits of an id that is stored singly."""
    return max((vocabulary - 1).bit_length(), 1)


def _low_bits(size: int, vocabulary: int) -> int:
    """Low bits of a group's ids that make it smallest (Elias-Fano)."""

    def bits_of_group(low: int) -> int:
        return size * low + _high_length(size, vocabulary, low)

    return min(range(id_bits(vocabulary)), key=bits_of_group)


def _high_length(size: int, vocabulary: int, low: int) -> int:
    """Bits that hold the rest of a group's ids in unary."""
    return size + ((vocabulary - 1) >> low)


def _encode_groups(ids: Ints, vocabulary: int) -> list[NDArray[np.uint8]]:
    """Code sorted groups (S, size): low bits as they are, high parts as gaps in unary.

    This is the Elias-Fano code (Elias 1974; Fano 1971).
    """
    groups, size = ids.shape
    low = _low_bits(size, vocabulary)
    length = _high_length(size, vocabulary, low)
    unary = np.zeros((groups, length), bool)
    # The high part h of the i-th id is the bit h + i: h zeros in all before it, and i ones.
    ones = (ids >> low).astype(np.int64) + np.arange(size)
    np.put_along_axis(unary, ones, True, axis=1)
    lows = ids & ((1 << low) - 1)
    return [pack_bits(lows.ravel(), low), np.packbits(unary, bitorder="little")]


def _decode_groups(buffer: _Buffer, groups: int, size: int, vocabulary: int) -> Ints:
    """Read sorted groups (S, size)."""
    low = _low_bits(size, vocabulary)
    length = _high_length(size, vocabulary, low)
    count = groups * size
    lows = unpack_bits(buffer.take(packed_bytes(count, low)), count, low).reshape(groups, size)
    bits = groups * length
    unary = np.unpackbits(buffer.take(-(-bits // 8)), count=bits, bitorder="little")
    ones = np.flatnonzero(unary)
    # Every id has exactly one 1.
    if len(ones) != count:
        raise ValueError("a group of ids is damaged")
    starts = np.arange(groups)[:, None] * length
    high = ones.reshape(groups, size) - starts - np.arange(size)
    return (high.astype(np.uint32) << low) | lows


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed numbers; they are packed in eights, which fill `bits` bytes."""
    return -(-count // 8) * bits


def pack_bits(values: Ints, bits: int) -> NDArray[np.uint8]:
    """Pack numbers below 2**bits (bits up to 25), lowest bit first; zeros fill the last eight."""
    if not bits:
        return np.zeros(0, np.uint8)
    padded = np.zeros(-(-len(values) // 8) * 8, "<u4")
    padded[: len(values)] = values
    as_bytes = padded.view(np.uint8).reshape(-1, 4)
    planes = np.unpackbits(as_bytes, axis=1, count=bits, bitorder="little")
    return np.packbits(planes, bitorder="little")


def unpack_bits(data: NDArray[np.uint8], count: int, bits: int) -> Ints:
    """Read back `count` packed numbers as uint32."""
    if not bits:
        return np.zeros(count, np.uint32)
    # Eight numbers fill `bits` bytes. So the n-th of each eight starts at the same byte and bit,
    # and all of these are read at once.
    columns = np.ascontiguousarray(data.reshape(-1, bits).T)
    values = np.empty((8, columns.shape[1]), np.uint32)
    for n in range(8):
        start, shift = divmod(n * bits, 8)
        word = columns[start].astype(np.uint32)
        for more in range(1, (shift + bits + 7) // 8):
            word |= columns[start + more].astype(np.uint32) << (8 * more)
        values[n] = (word >> shift) & ((1 << bits) - 1)
    return values.T.reshape(-1)[:count]


class _Buffer:
    """Bytes that are taken from the front."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        """Bytes not yet taken."""
        return len(self.data) - self.at

    def take(self, count: int) -> NDArray[np.uint8]:
        """Take the next bytes; ValueError where there are too few."""
        if count > self.left:
            raise ValueError("its bytes end early")
        self.at += count
        return self.data[self.at - count : self.at]

"""Values made ahead: in order, not too many, errors in their place, a thread that ends."""

from __future__ import annotations

import threading
import time

import pytest

from xlstm_distill.runtime.prefetch import Prefetcher


def eventually(holds):
    stop = time.monotonic() + 10
    while not holds() and time.monotonic() < stop:
        time.sleep(0.001)
    return holds()


def test_values_come_in_order_and_only_so_many_are_made_ahead():
    made = []

    def make(number):
        made.append(number)
        return number * 10

    with Prefetcher(make, 3, 8, depth=2) as values:
        for number in range(3, 8):
            assert eventually(lambda: len(made) >= min(number - 3 + 2, 5))  # noqa: B023
            time.sleep(0.002)
            assert max(made) <= number + 1
            assert values.take(number) == number * 10
    assert made == [3, 4, 5, 6, 7]


def test_an_error_surfaces_at_its_own_number():
    def make(number):
        if number == 2:
            raise OSError("row 2")
        return number

    with Prefetcher(make, 0, 5, depth=4) as values:
        assert [values.take(0), values.take(1)] == [0, 1]
        with pytest.raises(OSError, match="row 2"):
            values.take(2)


@pytest.mark.parametrize("wrong", [1, 7])
def test_numbers_are_taken_in_order(wrong):
    with Prefetcher(lambda number: number, 0, 3) as values, pytest.raises(ValueError, match="next"):
        values.take(wrong)


def test_the_thread_ends_with_the_block_however_it_is_left():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Prefetcher(lambda n: n, 0, 10**9) as values:
        values.take(0)
        raise KeyboardInterrupt
    with Prefetcher(lambda n: n, 5, 5):  # nothing to make
        pass
    assert threading.active_count() == before

"""Make the next values in a thread while the current one is used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Give `make(first)`, `make(first + 1)`, ... up to `last`, made in order by one thread.

    `depth` values are kept ready besides the one in use, so memory holds one more than that. An
    error of `make` surfaces in the `take` of its own number, after all values before it. Use it as
    a context manager: the thread ends with the block, once the value it is making is done.

    A thread and not a process: values need no copy and no pickle, and numpy and torch give up the
    interpreter lock in what takes long.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int, depth: int = 1) -> None:
        self._make, self._next, self._last, self._depth = make, first, last, depth
        self._made: deque[tuple[T | None, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        # A daemon: an interpreter that ends without `close` does not wait for it.
        self._thread = threading.Thread(target=self._work, args=(first,), daemon=True)

    def __enter__(self) -> Prefetcher[T]:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join()

    def take(self, number: int) -> T:
        """Return the value of a number; numbers are taken in order.

        Raises:
            ValueError: it is not the next number, or lies beyond the last.
            Exception: what `make` raised for this number.
        """
        if number != self._next or number >= self._last:
            raise ValueError(f"{number} was asked for, {self._next} of {self._last} is next")
        with self._changed:
            # A signal's handler runs in here and may raise: nothing is lost or locked then.
            self._changed.wait_for(lambda: bool(self._made))
            value, error = self._made.popleft()
            self._next += 1
            self._changed.notify_all()
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # None only beside an error

    def _work(self, first: int) -> None:
        for number in range(first, self._last):
            with self._changed:
                self._changed.wait_for(lambda: self._ended or len(self._made) < self._depth)
                if self._ended:
                    return
            value, error = None, None
            try:
                value = self._make(number)
            except BaseException as raised:  # the taker decides what it means
                error = raised
            with self._changed:
                self._made.append((value, error))
                self._changed.notify_all()
            if error is not None:
                return

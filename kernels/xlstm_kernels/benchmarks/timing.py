"""Clocks of the benchmark, and the rates that a device reaches."""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from xlstm_kernels.benchmarks.entries import Inputs

ROTATED_CACHES = 3  # decoding states together are this many times the size of the L2 cache
MOST_COPIES = 64


class OutOfTime(BaseException):
    """The budget is spent. No Exception: an entry that is being timed must not catch it."""


@contextlib.contextmanager
def alarm(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTime in this block after so many seconds, also in the middle of an entry."""

    def ring(*_: object) -> None:
        raise OutOfTime

    # Only the main thread gets signals.
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Rates(NamedTuple):
    """What this device reaches: operations/s of a large product, bytes/s of a large copy."""

    operations: float
    bytes: float


def milliseconds(
    run: Callable[[], object], repeats: int, device: torch.device, graph: bool = False
) -> float:
    """Return the median time of a call, after two calls that do not count.

    On CUDA this is Triton's timer: events, with the L2 cache cleared before each call. With
    `graph`, many calls are replayed from a CUDA graph, as a server decodes: that leaves out the
    launch from Python, and the cache stays as it is (`rotated`).
    """
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        timer = do_bench_cudagraph if graph else do_bench
        return float(timer(run, return_mode="median"))
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def measure_rates(device: torch.device, dtype: torch.dtype, repeats: int) -> Rates:
    """Measure a product of two n x n matrices and a copy of 1 GiB (256 and 16 MiB on a CPU)."""
    on_gpu = device.type == "cuda"
    n, size = (8192, 2**30) if on_gpu else (256, 2**24)
    a = torch.randn(n, n, device=device).to(dtype)
    product = milliseconds(lambda: a @ a, repeats, device)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), repeats, device)
    return Rates(2e3 * n**3 / product, 2e3 * size / copy)


def rotated(inputs: Inputs, cache: int) -> list[Inputs]:
    """Copy what decoding updates, until all copies together are well beyond a cache of this size.

    A server that decodes has the states of many layers: none is in the cache when its turn comes.
    """
    held = sum(x.numel() * x.element_size() for x in (*inputs.state, *inputs.ring))
    copies = min(MOST_COPIES, -(-ROTATED_CACHES * cache // held))
    return [inputs, *(inputs.copied() for _ in range(copies - 1))]


def cache_size(device: torch.device) -> int:
    """Return the bytes of a device's L2 cache; 0 on a CPU, where decoding is timed as it is."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)

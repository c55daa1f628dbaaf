"""Time the operators: `python -m xlstm_kernels.bench --batch 32 --tokens 256`.

Each operator is first checked against its float64 reference, outputs and gradients; one that fails is not timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xlstm_kernels.api import mlstm, sliding_window_attention
from xlstm_kernels.reference import mlstm_reference, sliding_window_reference
from xlstm_kernels.segments import document_runs, document_starts
from xlstm_kernels.testing import error_ratio, outputs_and_grads, random_inputs, random_segments, to_float64

BOUND = 1e-5  # RMS ratio of float32 outputs and gradients to the float64 reference
CHECKED_TOKENS = 128
DENSE_LIMIT = 4096  # the baseline holds T x T scores per head

Inputs = dict[str, Tensor]
Operator = Callable[[Inputs, Tensor], Tensor]


class Entry(NamedTuple):
    """One line of the table: an operator, the reference it must agree with, the inputs it reads, its longest row."""

    name: str
    run: Operator
    reference: Operator
    reads: tuple[str, ...]
    limit: int | None = None


def dense_window(x: Inputs, segment_ids: Tensor, window: int, sinks: int) -> Tensor:
    """Compute the same attention from a full T x T mask: the baseline, quadratic in T."""
    T, repeats = x["v"].shape[2], x["queries"].shape[1] // x["v"].shape[1]
    runs, t = document_runs(segment_ids), torch.arange(T, device=segment_ids.device)
    same = runs[:, :, None] == runs[:, None, :]
    start = document_starts(runs)
    near = (t[:, None] - t < window) | (t - start < sinks)[:, None, :]
    mask = (same & near & (t <= t[:, None])).unsqueeze(1)
    k, v = (x[n].repeat_interleave(repeats, dim=1) for n in ("keys", "v"))
    return F.scaled_dot_product_attention(x["queries"], k, v, attn_mask=mask)


def entries(window: int, sinks: int) -> list[Entry]:
    """List what is timed."""

    def recurrent(x: Inputs, ids: Tensor) -> Tensor:
        return mlstm(x["q"], x["k"], x["v"], x["i"], x["f"], segment_ids=ids)

    def recurrent_truth(x: Inputs, ids: Tensor) -> Tensor:
        return mlstm_reference(x["q"], x["k"], x["v"], x["i"], x["f"], segment_ids=ids)[0]

    def banded(x: Inputs, ids: Tensor) -> Tensor:
        return sliding_window_attention(x["queries"], x["keys"], x["v"], window=window, sinks=sinks, segment_ids=ids)

    def attention_truth(x: Inputs, ids: Tensor) -> Tensor:
        return sliding_window_reference(x["queries"], x["keys"], x["v"], window=window, sinks=sinks, segment_ids=ids)

    def dense(x: Inputs, ids: Tensor) -> Tensor:
        return dense_window(x, ids, window, sinks)

    attention = ("queries", "keys", "v")
    return [
        Entry("mlstm", recurrent, recurrent_truth, ("q", "k", "v", "i", "f")),
        Entry("sliding_window_attention", banded, attention_truth, attention),
        Entry("dense masked attention", dense, attention_truth, attention, DENSE_LIMIT),
    ]


def draw(B: int, T: int, options: argparse.Namespace) -> tuple[Inputs, Tensor]:
    """Draw inputs of the asked shape, packed with documents; attention has queries and keys of the values' width."""
    x = random_inputs(B, options.heads, T, options.key_dim, options.value_dim, options.groups)
    generator = torch.Generator().manual_seed(2)
    for name, heads in (("queries", options.heads), ("keys", options.groups)):
        x[name] = torch.randn(B, heads, T, options.value_dim, generator=generator).requires_grad_()
    return x, random_segments(B, T, mean_length=options.document)


def select(x: Inputs, entry: Entry) -> Inputs:
    """Pick the inputs that an entry reads."""
    return {name: x[name] for name in entry.reads}


def worst_ratio(entry: Entry, x: Inputs, segment_ids: Tensor) -> float:
    """Return the largest RMS ratio of an entry's output and gradients to its reference."""
    actual = outputs_and_grads(lambda **a: entry.run(a, segment_ids), x)
    expected = outputs_and_grads(lambda **a: entry.reference(a, segment_ids), to_float64(x))
    return max(error_ratio(actual[name], expected[name]) for name in expected)


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def main(arguments: list[str] | None = None) -> int:
    """Check and time every entry on the CPU; returns the exit status, 1 if an entry fails its check."""
    parser = argparse.ArgumentParser(prog="python -m xlstm_kernels.bench", description=__doc__.splitlines()[0])
    shape = {"batch": 32, "tokens": 256, "heads": 4, "groups": 2, "key-dim": 32, "value-dim": 32}
    rest = {"window": 32, "sinks": 4, "document": 33, "repeats": 11, "threads": 1}
    for name, default in (shape | rest).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    x, segment_ids = draw(options.batch, options.tokens, options)
    small = draw(1, min(options.tokens, CHECKED_TOKENS), options)
    failed = False
    for entry in entries(options.window, options.sinks):
        ratio = worst_ratio(entry, select(small[0], entry), small[1])
        if not ratio < BOUND:
            failed = True
            sys.stdout.write(
                f"{entry.name:26} not timed: RMS ratio {ratio:.1e} to the reference; allowed: {BOUND:.0e}\n"
            )
        elif entry.limit is None or options.tokens <= entry.limit:
            sys.stdout.write(timing_line(entry, select(x, entry), segment_ids, options.repeats) + "\n")
    return int(failed)


def timing_line(entry: Entry, x: Inputs, segment_ids: Tensor, repeats: int) -> str:
    """Time an entry forward, and forward with backward."""

    def both() -> None:
        h = entry.run(x, segment_ids)
        torch.autograd.grad(h, list(x.values()), torch.ones_like(h))

    forward = milliseconds(lambda: entry.run(x, segment_ids), repeats)
    return f"{entry.name:26} forward {forward:8.1f} ms   forward + backward {milliseconds(both, repeats):8.1f} ms"


if __name__ == "__main__":
    sys.exit(main())

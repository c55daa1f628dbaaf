"""Measure the store of targets on synthetic distributions: bytes, KL error and speed.

`python -m xlstm_distill.benchmarks.targets`; docs/targets.md has the results. There are two
families of logits over the vocabulary. `zipf s` is -s * ln(rank) plus normal noise of deviation
0.5; `normal s` is normal with deviation s. A range `a-b` draws s anew for every token, uniformly,
so that peaked and flat distributions mix as in text. Token ids are random, which is the worst case
for their coding.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from xlstm_distill.losses.sparse import SparseTargets
from xlstm_distill.targets.providers import to_targets
from xlstm_distill.targets.shard import Identity
from xlstm_distill.targets.store import Store, write_index
from xlstm_distill.targets.writer import write_shard

FAMILIES = (
    ("zipf", 1.5, 1.5),
    ("zipf", 2.0, 2.0),
    ("zipf", 2.5, 2.5),
    ("zipf", 3.0, 3.0),
    ("zipf", 1.2, 4.0),
    ("normal", 5.0, 5.0),
    ("normal", 8.0, 8.0),
    ("normal", 12.0, 12.0),
    ("normal", 2.0, 16.0),
)
"""Families as (kind, lowest s, highest s)."""
GOAL_BYTES, GOAL_KL = 160.0, 1e-3
"""The store's goal: bytes per token, and error of the KL divergence (nats)."""
# Without noise a zipf curve is a line over log rank, the very shape that the coding assumes.
NOISE = 0.5
CHUNK = 64
"""Tokens whose logits are drawn at once: 64 of a vocabulary of 128,256 take 33 MB."""
# The paper's k, and the store's cap.
TOP_K = 256


@dataclass(frozen=True)
class Sample:
    """Targets of a family, and the mean entropy (nats) of the distributions they are taken from."""

    name: str
    targets: SparseTargets
    entropy: float

    @property
    def top_1(self) -> float:
        """Mean mass of the most likely token."""
        return float(self.targets.log_probs[:, 0].exp().mean())


@dataclass(frozen=True)
class Measurement:
    """What one way of storing a sample costs; speeds are per second of one core."""

    sample: Sample
    mass: float | None
    min_k: int
    figures: dict[str, float]
    write_speed: float
    read_speed: float

    def line(self) -> str:
        """One line of the table."""
        sample, figures = self.sample, self.figures
        size, error = figures["bytes_per_token"], figures["mean_kl_error"]
        met = "yes" if size <= GOAL_BYTES and error <= GOAL_KL else "no"
        return (
            f"| {sample.name} | {sample.top_1:.2f} | {sample.entropy:.2f} | {self.mass} "
            f"| {figures['mean_k']:.1f} | {size:.1f} | {error:.1e} | {figures['mean_cut']:.1e} "
            f"| {met} | {self.write_speed / 1e3:.0f} | {self.read_speed / 1e3:.0f} "
            f"| {self.read_speed * size / 1e6:.0f} |"
        )


HEADER = (
    "| family | top-1 | entropy | mass | mean k | bytes/token | KL error | cut | goal "
    "| write k tokens/s | read k tokens/s | read MB/s |\n" + 12 * "|---" + "|"
)


def family_logits(
    kind: str, low: float, high: float, tokens: int, vocabulary: int, seed: int
) -> Tensor:
    """Draw logits (tokens, V) of a family; zipf's are in the order of their rank before noise."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(tokens, 1, generator=generator) * (high - low) + low
    noise = torch.randn(tokens, vocabulary, generator=generator)
    if kind == "normal":
        return scale * noise
    return NOISE * noise - scale * torch.arange(1, vocabulary + 1).log()


def draw(kind: str, low: float, high: float, tokens: int, vocabulary: int, seed: int) -> Sample:
    """Draw targets of a family."""
    generator = torch.Generator().manual_seed(seed)
    parts, entropy = [], 0.0
    for start in range(0, tokens, CHUNK):
        count = min(CHUNK, tokens - start)
        # A new seed for each chunk: one seed for all would repeat the same 64 distributions.
        chunk_seed = int(torch.randint(2**62, (), generator=generator))
        logits = family_logits(kind, low, high, count, vocabulary, chunk_seed)
        part = SparseTargets.from_logits(logits, TOP_K)
        # A zipf token's id is its rank: the shuffle makes ids random.
        shuffle = torch.randperm(vocabulary, generator=generator)
        parts.append(SparseTargets(shuffle[part.ids], part.log_probs, part.tail))
        log_probs = logits.log_softmax(-1)
        entropy -= float((log_probs.exp() * log_probs).sum())
    joined = SparseTargets(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.log_probs for part in parts]),
        torch.cat([part.tail for part in parts]),
    )
    name = f"{kind} {low:g}" if low == high else f"{kind} {low:g}-{high:g}"
    return Sample(name, joined, entropy / tokens)


def measure(
    sample: Sample, mass: float | None, min_k: int, vocabulary: int, context: int
) -> Measurement:
    """Write a sample through the store and read it back, row by row."""
    identity = Identity("bench", "", "", "", None, "float32", TOP_K, mass, min_k)
    tokens = len(sample.targets.tail)
    # Cut into rows as a store has them: a row is coded and decoded as a whole.
    counts = [min(context, tokens - start) for start in range(0, tokens, context)]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)

        def write(first_row: int = 1) -> None:
            with write_shard(directory, identity, vocabulary, 0, first_row) as writer:
                # The text's checksums are 0: a sample belongs to no text.
                writer.add(counts, [0] * len(counts), sample.targets)

        # The least of three: other work on the machine can only add time. The first row is none of
        # those on which the KL error is measured.
        write_seconds = best_time(write)
        # Row 0 is one. A sample of one row, as by default, is measured as a whole.
        write(first_row=0)
        figures = write_index(directory, identity).means()
        store = Store(directory, identity)

        def read() -> None:
            for row in range(len(counts)):
                to_targets([store.row(row)[0]])

        return Measurement(
            sample, mass, min_k, figures, tokens / write_seconds, tokens / best_time(read)
        )


def best_time(work: Callable[[], None], repeats: int = 3) -> float:
    """Return the least CPU time of some repetitions (seconds)."""
    best = math.inf
    for _ in range(repeats):
        started = time.process_time()
        work()
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.targets", description=__doc__
    )
    parser.add_argument("--tokens", type=int, default=1024, help="tokens drawn of each family")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="size of the vocabulary")
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens of a row, which are decoded at once"
    )
    parser.add_argument("--mass", type=float, nargs="+", default=[0.99, 0.999], help="mass to keep")
    parser.add_argument("--min-k", type=int, default=16, help="tokens to keep at least")
    parser.add_argument("--seed", type=int, default=0, help="seed of the distributions")
    options = parser.parse_args()
    # Speeds are given for one core.
    torch.set_num_threads(1)
    print(HEADER)
    for kind, low, high in FAMILIES:
        sample = draw(kind, low, high, options.tokens, options.vocabulary, options.seed)
        for mass in options.mass:
            found = measure(sample, mass, options.min_k, options.vocabulary, options.context)
            print(found.line(), flush=True)


if __name__ == "__main__":
    main()

"""Measure how fast rows are prepared, ordered and read.

`python -m xlstm_distill.benchmarks.data TOKENIZER`; docs/data.md has the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers

from xlstm_distill import embedded
from xlstm_distill.artifacts import Artifact, Run
from xlstm_distill.data.prepare import prepare_domain, tokenizer_hash
from xlstm_distill.data.rows import DomainRows, load_batch
from xlstm_distill.data.schedule import RowSchedule
from xlstm_distill.recipe import Recipe
from xlstm_distill.runtime.console import QuietConsole

CONTEXT, VALIDATION = 4096, 64
MEAN, SPREAD = 7.8, 1.1
"""Mean and standard deviation of the logarithm of a generated document's length (characters)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the preparation costs with each number of workers, and then what reading costs."""
    parser = argparse.ArgumentParser(prog="xlstm_distill.benchmarks.data", description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="folder of a tokenizer")
    parser.add_argument(
        "--data", type=Path, help="JSON-lines file with a column 'text'; default: generated text"
    )
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens to prepare")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers to compare"
    )
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        # About four characters make a token.
        characters = 4 * (options.tokens + VALIDATION * CONTEXT)
        data = options.data or _generate(Path(folder) / "text.jsonl", characters)
        # A run directory each: a second preparation in the same one would find the rows of the
        # first.
        for workers in options.workers:
            recipe = _recipe(options.tokenizer, data, options.tokens, workers)
            artifact = _prepare(recipe, Path(folder) / str(workers), tokenizer, workers)
        _read(artifact)
    return 0


def _generate(path: Path, characters: int) -> Path:
    """Write documents of the embedded conversations' text, of log-normal length."""
    rng, written = random.Random(0), 0
    domains = [embedded.documents(domain, 10**9, 0) for domain in embedded.DOMAINS]
    # Real words, so that the tokenizer works as it does on text. Random letters would become far
    # more tokens.
    texts = _contents(domains)
    with path.open("w") as file:
        while written < characters:
            # Log-normal, since document lengths spread over orders of magnitude and packing depends
            # on them.
            length, text = rng.lognormvariate(MEAN, SPREAD), ""
            while len(text) < length:
                text += "\n".join(itertools.islice(texts, 20)) + "\n"
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)
    return path


def _contents(domains: Sequence[Iterable[dict[str, Any]]]) -> Iterator[str]:
    """Yield the text of every message; the domains take turns."""
    # Endless for practical purposes: each generator is asked for a billion documents.
    for documents in zip(*domains, strict=True):
        for document in documents:
            for message in document["messages"]:
                yield message["content"]


def _recipe(tokenizer: Path, data: Path, tokens: int, workers: int) -> Recipe:
    source = {"path": str(data.resolve()), "text": "text"}
    phases = [{"domain": "x", "tokens": CONTEXT}]
    return Recipe.model_validate(
        {
            "name": "bench",
            "teacher": {"path": str(tokenizer)},
            "data": {
                "context": CONTEXT,
                "workers": workers,
                "validation_rows": VALIDATION,
                "domains": {"x": {"sources": [source]}},
            },
            "align": {"tokens": tokens, "batch": 1},
            "distill": {"batch": 1, "lr": 1e-5, "experts": {"x": {"phases": phases}}},
            "evaluate": {"tasks": [{"name": "none"}]},
        }
    )


def _prepare(recipe: Recipe, folder: Path, tokenizer: Any, workers: int) -> Artifact:
    """Prepare the rows once, and print speeds, sizes and peak memory."""
    run = Run.open(folder, recipe)
    # CPU time beside wall time: the figures must be comparable between busy and idle machines.
    started, before = time.monotonic(), os.times()
    artifact = prepare_domain(
        recipe, run, "x", tokenizer, tokenizer_hash(tokenizer), QuietConsole()
    )
    seconds, after = time.monotonic() - started, os.times()
    own = after.user + after.system - before.user - before.system
    # The workers' time counts once they have ended, which they have when `prepare_domain` returns.
    workers_before = before.children_user + before.children_system
    workers_cpu = after.children_user + after.children_system - workers_before
    results = artifact.manifest["results"]
    tokens = results["tokens"]
    # Of the main process, and of all numbers of workers so far: a process's maximum never falls.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"workers {workers}: {tokens / seconds:,.0f} tokens/s, "
        f"{tokens / (own + workers_cpu):,.0f} a CPU second "
        f"({tokens / own:,.0f} a CPU second of the main process), "
        f"{results['bytes_per_token']:.2f} bytes/token, fill {results['fill']:.2%}, "
        f"{results['rows']} rows, peak memory {peak:,.0f} MiB, load {os.getloadavg()[0]:.1f}",
    )
    return artifact


def _read(artifact: Artifact) -> None:
    """Measure reading, and the order of 5 million rows of four domains."""
    rows = {"x": DomainRows("x", artifact, VALIDATION)}
    # 64 rows a step is the paper's batch.
    schedule = RowSchedule(rows, {"x": 1.0}, 0, 100 * 64)
    started = time.process_time()
    for step in range(100):
        load_batch(rows, schedule.rows(step, 64))
    seconds = time.process_time() - started
    speed = 100 * 64 * CONTEXT / seconds
    print(f"reading: {speed:,.0f} tokens a CPU second, 64 rows of {CONTEXT} a batch")
    # 5 million rows of 4096 tokens are 20B tokens, the paper's largest budget.
    total, names = 5_000_000, "abcd"
    many = dict.fromkeys(names, _Many("many", artifact, VALIDATION))
    started = time.process_time()
    order = RowSchedule(many, dict.fromkeys(names, 1.0), 0, total)
    made = time.process_time() - started
    # The last step is the furthest from the start, where a resumed training may begin.
    order.rows(total // 64 - 1, 64)
    seconds = time.process_time() - started
    print(
        f"order of {total:,} rows: made in {made:.4f} s, the last step's rows after {seconds:.3f} s"
    )


class _Many(DomainRows):
    """Stands for a domain of more rows than there are."""

    def __len__(self) -> int:
        # A quarter of the 5 million rows: the schedule of four domains reads each about once.
        return 1_250_000


if __name__ == "__main__":
    sys.exit(main())

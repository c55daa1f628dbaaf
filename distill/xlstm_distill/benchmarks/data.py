"""Measure the preparation of rows and their order: `python -m xlstm_distill.benchmarks.data TOKENIZER`."""

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
from collections.abc import Sequence
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
"""Length of generated documents (characters): mean and standard deviation of its logarithm."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what the preparation costs with each number of workers, and what reading costs afterwards."""
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
        data = options.data or _generate(
            Path(folder) / "text.jsonl", 4 * (options.tokens + VALIDATION * CONTEXT)
        )
        for workers in options.workers:
            recipe = _recipe(options.tokenizer, data, options.tokens, workers)
            artifact = _prepare(recipe, Path(folder) / str(workers), tokenizer, workers)
        _read(artifact)
    return 0


def _generate(path: Path, characters: int) -> Path:
    """Write documents of the embedded conversations' text, of log-normal length."""
    rng, written = random.Random(0), 0
    domains = [embedded.documents(domain, 10**9, 0) for domain in embedded.DOMAINS]
    texts = (
        m["content"]
        for documents in zip(*domains, strict=True)
        for d in documents
        for m in d["messages"]
    )
    with path.open("w") as file:
        while written < characters:
            length, text = rng.lognormvariate(MEAN, SPREAD), ""
            while len(text) < length:
                text += "\n".join(itertools.islice(texts, 20)) + "\n"
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)
    return path


def _recipe(tokenizer: Path, data: Path, tokens: int, workers: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "bench",
            "teacher": {"path": str(tokenizer)},
            "data": {
                "context": CONTEXT, "workers": workers, "validation_rows": VALIDATION,
                "domains": {"x": {"sources": [{"path": str(data.resolve()), "text": "text"}]}},
            },
            "align": {"tokens": tokens, "batch": 1},
            "distill": {
                "batch": 1, "lr": 1e-5, "experts": {"x": {"phases": [{"domain": "x", "tokens": CONTEXT}]}},
            },
            "evaluate": {"tasks": [{"name": "none"}]},
        }
    )  # fmt: skip


def _prepare(recipe: Recipe, folder: Path, tokenizer: Any, workers: int) -> Artifact:
    run = Run.open(folder, recipe)
    started, before = time.monotonic(), os.times()
    artifact = prepare_domain(
        recipe, run, "x", tokenizer, tokenizer_hash(tokenizer), QuietConsole()
    )
    seconds, after = time.monotonic() - started, os.times()
    main_cpu = after.user + after.system - before.user - before.system
    cpu = (
        main_cpu
        + after.children_user
        + after.children_system
        - before.children_user
        - before.children_system
    )
    results = artifact.manifest["results"]
    peak, load = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, os.getloadavg()[0]
    print(
        f"workers {workers}: {results['tokens'] / seconds:,.0f} tokens/s, {results['tokens'] / cpu:,.0f} a CPU second "
        f"({results['tokens'] / main_cpu:,.0f} a CPU second of the main process), "
        f"{results['bytes_per_token']:.2f} bytes/token, fill {results['fill']:.2%}, {results['rows']} rows, "
        f"peak memory {peak:,.0f} MiB, load {load:.1f}",
    )
    return artifact


def _read(artifact: Artifact) -> None:
    """Measure reading, and the order of 5 million rows of four domains."""
    rows = {"x": DomainRows("x", artifact, VALIDATION)}
    schedule = RowSchedule(rows, {"x": 1.0}, 0, 100 * 64)
    started = time.process_time()
    for step in range(100):
        load_batch(rows, schedule.rows(step, 64))
    seconds = time.process_time() - started
    print(
        f"reading: {100 * 64 * CONTEXT / seconds:,.0f} tokens a CPU second, 64 rows of {CONTEXT} a batch"
    )
    total, names = 5_000_000, "abcd"
    started = time.process_time()
    order = RowSchedule(
        dict.fromkeys(names, _Many("many", artifact, VALIDATION)),
        dict.fromkeys(names, 1.0),
        0,
        total,
    )
    made = time.process_time() - started
    order.rows(total // 64 - 1, 64)
    seconds = time.process_time() - started
    print(
        f"order of {total:,} rows: made in {made:.4f} s, the last step's rows after {seconds:.3f} s"
    )


class _Many(DomainRows):
    """Stands for a domain of more rows than there are."""

    def __len__(self) -> int:
        return 1_250_000


if __name__ == "__main__":
    sys.exit(main())

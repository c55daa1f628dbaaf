"""RULER's needles (arXiv 2404.06654), as lm-eval makes them, at one length for each task.

lm-eval draws the items when it loads a task, sized by a tokenizer that it opens by its name, and
gives each length a metric of its own. Here a task is one length with one metric.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

METRIC = "recall"


def needle_settings(original: dict[str, Any], length: int, tokenizer: str) -> dict[str, Any]:
    """Return the settings of a task of lm-eval's with prompts of ``length`` tokens.

    The answer's 128 tokens count. ``tokenizer`` is a folder, since lm-eval opens it itself.
    """
    metadata = original.get("metadata") or {}
    return original | {
        "process_results": share_found,
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "metadata": metadata | {"max_seq_lengths": [length], "tokenizer": tokenizer},
    }


def share_found(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return the share of an item's values that occur in the answer, as RULER scores it."""
    answer = results[0].lower()
    values = doc["outputs"]
    return {METRIC: sum(value.lower() in answer for value in values) / len(values)}


@contextlib.contextmanager
def drawn_alike(name: str) -> Iterator[None]:
    """Let a task that draws its items as it is loaded draw the same in every process."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    random.seed(name)
    numpy.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


@contextlib.contextmanager
def tokenizer_folder(tokenizer: Any) -> Iterator[str | None]:
    """Save a tokenizer for the block: its name would mean another revision; None without one."""
    if tokenizer is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        yield folder

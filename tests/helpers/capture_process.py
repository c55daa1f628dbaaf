"""Capture a recipe's targets in shards of 1024 tokens, slowly where asked. For test_capture.py.

Arguments: recipe, run directory, share (I/N or -), seconds to wait before each shard.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from xlstm_distill.artifacts import Run
from xlstm_distill.recipe import load_recipe
from xlstm_distill.runtime.console import QuietConsole
from xlstm_distill.stages import capture
from xlstm_distill.stages.lineage import Lineage

SETTINGS = (
    "data.context=64", "data.validation_rows=8", "student.mixer.window=8",
    "align.tokens=16384", "align.batch=8", "align.warmup_steps=0",
    "distill.batch=8", "distill.warmup_steps=0",
    "distill.experts={math: {phases: [{domain: math, tokens: 8192}]},"
    " chat: {phases: [{domain: chat, tokens: 4096}]}}",
    "capture.batch=5", "capture.top_k=256", "capture.min_k=4",
)  # fmt: skip


def run_capture(
    recipe: str,
    directory: str,
    share: str | None = None,
    wait: float = 0.0,
    changes: tuple[str, ...] = (),
) -> list[str]:
    """Capture, with changed settings; returns what was said."""
    tokens, write = capture.SHARD_TOKENS, capture.DomainCapture._write_shard
    capture.SHARD_TOKENS = (1024, 1024)

    def slowly(*arguments: object) -> None:
        time.sleep(wait)
        write(*arguments)

    capture.DomainCapture._write_shard = slowly
    try:
        loaded, console = load_recipe(Path(recipe), SETTINGS + changes), QuietConsole()
        capture.capture(Lineage(loaded), Run.open(directory, loaded), console, share)
    finally:
        capture.SHARD_TOKENS, capture.DomainCapture._write_shard = tokens, write
    return console.lines


if __name__ == "__main__":
    for line in run_capture(
        sys.argv[1], sys.argv[2], None if sys.argv[3] == "-" else sys.argv[3], float(sys.argv[4])
    ):
        print(line)

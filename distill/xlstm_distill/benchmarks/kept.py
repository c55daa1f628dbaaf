"""Results of a benchmark in a file, so that a second start goes on after the first."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from xlstm_kernels.benchmarks.report import read_lines

# What does not change a result, or is a part of its key.
NO_SETTINGS = {"out", "budget_s", "json", "only", "repeats", "prompts", "batches"}


class Kept:
    """Results by their keys, each a line of JSON as soon as it is there; path None keeps none.

    Only results with the same settings are known; those with the entry "failed" are not.
    """

    def __init__(self, path: Path | None, options: argparse.Namespace) -> None:
        self.path = path
        given = {name: value for name, value in vars(options).items() if name not in NO_SETTINGS}
        self.settings = json.loads(json.dumps(given))  # as the file has them
        lines = [] if path is None else read_lines(path)
        self.lines = [x for x in lines if x.get("settings") == self.settings and "failed" not in x]

    def known(self, **key: Any) -> dict[str, Any] | None:
        """Return the result of an earlier start, None if there is none."""
        for line in self.lines:
            if all(line.get(name) == value for name, value in key.items()):
                return {name: value for name, value in line.items() if name != "settings"}
        return None

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, its key among it."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result | {"settings": self.settings}) + "\n")

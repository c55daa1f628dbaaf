"""Print what several runs say of ways to merge: `... merges RUN...`.

`python -m xlstm_distill.benchmarks.merges RUN...` reads finished runs, one or more for each seed,
and prints tables in Markdown: recovery by domain, the paper's metric, and the differences from the
uniform merge, with 95 % intervals. A run with a single expert is a row of that expert's name: a
generalist. Runs of one seed must have the same aligned student, and all must have answered the same
items. recipes/quickstart-merges.yaml makes such runs; docs/merging.md has what was found.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from xlstm_distill.errors import UserError
from xlstm_distill.stages.measuring.merges import merge_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.merges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a finished run")
    options = parser.parse_args(arguments)
    try:
        print(merge_tables(options.runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

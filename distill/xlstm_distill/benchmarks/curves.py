"""Draw what `decoding` measured: `python -m xlstm_distill.benchmarks.curves CASES OUT.svg`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

MIB = 2**20
PANELS = (
    ("prefill_tokens_per_second", "prefill, tokens/s", 1.0),
    ("decode_ms", "decode, ms a token", 1.0),
    ("peak", "peak memory of prefill, MiB", MIB),
    ("state_bytes", "decoding state, MiB", MIB),
)
COLOURS = {"student": "#2a6f97", "attention": "#c1666b"}


def value(case: dict[str, Any], model: str, what: str) -> float:
    """Return what a case says of a model."""
    place = case["memory"][model] if what == "peak" else case[model]
    return float(place[what])


def draw(cases: list[dict[str, Any]], out: Path) -> None:
    """Draw a panel for each figure over the context, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same picture for the same figures: no date, no random ids.
    mpl.rcParams["svg.hashsalt"] = "xlstm-distill"
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    cases = sorted(cases, key=lambda case: case["prompt"])
    contexts = [case["prompt"] for case in cases]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for axis, (what, title, unit) in zip(axes.flat, PANELS, strict=True):
        for model, colour in COLOURS.items():
            values = [value(case, model, what) / unit for case in cases]
            axis.plot(contexts, values, marker="o", color=colour, label=model)
        axis.set(xscale="log", yscale="log", title=title, xticks=contexts)
        axis.set_xticklabels([f"{context:,}" for context in contexts])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("tokens of context")
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draw the cases of one file that did not fail."""
    parser = argparse.ArgumentParser(
        prog="python -m xlstm_distill.benchmarks.curves", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "cases", type=Path, help="what `decoding --out` has written, one batch size"
    )
    parser.add_argument("out", type=Path, help="an .svg or .png to write")
    options = parser.parse_args(arguments)
    lines = options.cases.read_text(encoding="utf-8").splitlines()
    cases = [case for case in map(json.loads, lines) if "memory" in case]
    if not cases:
        parser.error(f"{options.cases}: no case with times and memory; there is nothing to draw")
    draw(cases, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

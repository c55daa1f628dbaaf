"""What the benchmark found, as Markdown, JSON and a plot of time over T."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888")
WIDTH, HEIGHT, LEFT, TOP, LEGEND = 640, 400, 70, 40, 230


class Row(NamedTuple):
    """A timed call: milliseconds, operations (1e12/s) and bytes (1e9/s), and the share of the roofline."""

    operator: str
    backend: str
    passes: str
    tokens: int
    milliseconds: float
    teraflops: float
    gigabytes: float
    roofline: float

    def text(self) -> str:
        """Write the measured part of a line."""
        return (
            f"{self.passes:18} {self.milliseconds:9.3f} ms {self.teraflops:8.2f} TFLOP/s {self.gigabytes:8.1f} GB/s "
            f"{self.roofline:6.1%} of the roofline"
        )


def ratio_to_ours(row: Row, rows: list[Row]) -> float | None:
    """How many times our kernel's time a call takes; ours is triton where it was timed, else torch."""
    same = [
        r
        for r in rows
        if (r.operator, r.passes, r.tokens) == (row.operator, row.passes, row.tokens)
    ]
    if row.operator == "causal":  # the attention that the window replaces
        same = [
            r
            for r in rows
            if (r.operator, r.passes, r.tokens) == ("window", row.passes, row.tokens)
        ]
    ours = {r.backend: r for r in same}
    base = ours.get("triton") or ours.get("torch")
    return row.milliseconds / base.milliseconds if base else None


def markdown(rows: list[Row], machine: Mapping[str, object], options: Mapping[str, object]) -> str:
    """Write the table."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    shape = ", ".join(
        f"{name} {value}" for name, value in options.items() if name not in ("report", "operators")
    )
    lines = [
        "# Kernel benchmark", "", f"{facts}; torch {torch.__version__}.", "", f"{shape}.", "",
        "| operator | backend | passes | T | ms | TFLOP/s | GB/s | roofline | time to ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        ratio = ratio_to_ours(row, rows)
        lines.append(
            f"| {row.operator} | {row.backend} | {row.passes} | {row.tokens} | {row.milliseconds:.3f} "
            f"| {row.teraflops:.2f} | {row.gigabytes:.1f} | {row.roofline:.1%} | {f'{ratio:.2f}' if ratio else ''} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> str:
    """Draw time over T, both on logarithmic axes, one line for each operator and backend (all passes that it has)."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.passes == "forward + backward":
            lines.setdefault(f"{row.operator}, {row.backend}", []).append(
                (row.tokens, row.milliseconds)
            )
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    x_low, x_high = (math.log2(bound(p[0] for p in points)) for bound in (min, max))
    y_low, y_high = math.log10(min(p[1] for p in points)), math.log10(max(p[1] for p in points))

    def place(tokens: int, taken: float) -> tuple[float, float]:
        x = LEFT + WIDTH * (math.log2(tokens) - x_low) / max(x_high - x_low, 1e-9)
        y = TOP + HEIGHT * (1 - (math.log10(taken) - y_low) / max(y_high - y_low, 1e-9))
        return round(x, 1), round(y, 1)

    parts = [f'<text x="{LEFT}" y="20">forward + backward, milliseconds over T</text>']
    parts.append(
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>'
    )
    for tokens in sorted({p[0] for p in points}):
        x, _ = place(tokens, 10**y_low)
        parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{tokens}</text>')
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        _, y = place(points[0][0], 10.0**power)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        label = f'<text x="{LEFT + WIDTH + 12}" y="{TOP + 14 + 18 * number}" fill="{color}">{name}</text>'
        parts.append(label)
    size = f'width="{LEFT + WIDTH + LEGEND}" height="{TOP + HEIGHT + 40}"'
    style = 'font-family="sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def write_report(
    folder: Path, rows: list[Row], machine: Mapping[str, object], options: Mapping[str, object]
) -> None:
    """Write kernels.md, kernels.json and, where gradients were timed, kernels.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.md").write_text(markdown(rows, machine, options))
    found = {
        "machine": machine,
        "options": {k: str(v) for k, v in options.items()},
        "rows": [r._asdict() for r in rows],
    }
    (folder / "kernels.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    if drawing := plot(rows):
        (folder / "kernels.svg").write_text(drawing)

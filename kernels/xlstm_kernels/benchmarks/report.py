"""Write what the benchmark found: Markdown, JSON and a plot of time over T."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORWARD, BOTH = "forward", "forward + backward"
# Colours that people with a colour vision deficiency can tell apart (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888")
WIDTH, HEIGHT, LEFT, TOP, LEGEND = 640, 400, 70, 40, 230


class Call(NamedTuple):
    """An entry at a shape."""

    operator: str
    backend: str
    batch: int
    heads: int
    tokens: int


class Row(NamedTuple):
    """A line of the table.

    Of a timed call: milliseconds, 1e12 operations/s, 1e9 bytes/s, share of the roofline, and error,
    its worst RMS ratio to the reference (None where there is none). status: timed, left out, wrong
    (over the bound), failed (it raised) or stopped (by the budget), with the reason. A row that is
    not timed is of the passes that it names, or of all if it names none.
    """

    operator: str
    backend: str
    passes: str
    tokens: int
    milliseconds: float = 0.0
    teraflops: float = 0.0
    gigabytes: float = 0.0
    roofline: float = 0.0
    batch: int = 1
    heads: int = 1
    error: float | None = None
    status: str = "timed"
    reason: str = ""

    def text(self) -> str:
        """Write the line."""
        label = f"{self.operator:12} {self.backend:30} H={self.batch * self.heads:<4} "
        label += f"T={self.tokens:<7}"
        if self.status != "timed":
            return f"{label} {self.status}: {self.reason}"
        error = "unchecked" if self.error is None else f"error {self.error:.1e}"
        return (
            f"{label} {self.passes:18} {self.milliseconds:9.3f} ms {self.teraflops:8.2f} TFLOP/s "
            f"{self.gigabytes:8.1f} GB/s {self.roofline:6.1%} of the roofline, {error}"
        )

    @property
    def call(self) -> Call:
        """What was called."""
        return Call(self.operator, self.backend, self.batch, self.heads, self.tokens)

    def replaces(self, earlier: Row) -> bool:
        """Say whether an earlier row is no longer true."""
        if self.call != earlier.call:
            return False
        if earlier.status == "timed":
            return earlier.passes == self.passes or (self.status == "wrong" and not self.passes)
        return not self.passes or earlier.passes in ("", self.passes)

    def same_call(self, operator: str) -> tuple[object, ...]:
        """Return what a call of another backend must share to be compared with this one."""
        return (operator, self.passes, self.batch, self.heads, self.tokens)


class Journal:
    """The rows so far, each on the disk as soon as it is there; folder None keeps none.

    A benchmark that is started again goes on after them: what is timed stays, and the rest is tried
    again. since: how many lines of the file are of earlier starts; default all.
    """

    def __init__(self, folder: Path | None, since: int | None = None) -> None:
        self.path = None if folder is None else folder / "rows.jsonl"
        found = [] if self.path is None else [Row(**line) for line in read_lines(self.path)]
        self.since = len(found) if since is None else since
        self.rows: list[Row] = []
        for row in found:
            self._keep(row)
        tried = [row for row in self.rows if row.status == "timed"] + found[self.since :]
        self.tried = {(row.call, row.passes) for row in tried}

    def add(self, row: Row) -> None:
        """Keep a row; it replaces those of earlier starts that said otherwise."""
        self._keep(row)
        self.tried.add((row.call, row.passes))
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row._asdict()) + "\n")

    def _keep(self, row: Row) -> None:
        self.rows = [earlier for earlier in self.rows if not row.replaces(earlier)] + [row]

    def untried(self, call: Call, passes: tuple[str, ...]) -> tuple[str, ...]:
        """Return the passes that are neither timed nor have been tried in this start."""
        if (call, "") in self.tried:
            return ()
        return tuple(name for name in passes if (call, name) not in self.tried)

    def failed_before(self, call: Call) -> bool:
        """Say whether there is a row that says why a call was not timed."""
        return any(row.call == call and row.status != "timed" for row in self.rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines to which more will be added; none if there is no file.

    The line in which its writer was killed is dropped, also from the file: what is added next would
    be a part of it. The file's folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return []
    found, whole, text = [], [], path.read_text()
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if line.endswith("\n"):
                found.append(json.loads(line))
                whole.append(line)
    if len(whole) < len(text.splitlines()):
        # In one step: whoever is stopped here loses nothing.
        mended = path.with_name(f"{path.name}.mended")
        mended.write_text("".join(whole))
        mended.replace(path)
    return found


def ratio_to_ours(row: Row, rows: list[Row]) -> float | None:
    """Return a call's time divided by our kernel's; None if ours was not timed.

    Ours is triton where it was timed, else torch. Full causal attention is compared with the window
    attention that replaces it.
    """
    wanted = row.same_call("window" if row.operator == "causal" else row.operator)
    timed = [r for r in rows if r.status == "timed"]
    ours = {r.backend: r for r in timed if r.same_call(r.operator) == wanted}
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
        "| operator | backend | passes | B | H | T | ms | TFLOP/s | GB/s | roofline | error "
        "| time to ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if row.status != "timed":
            continue
        ratio = ratio_to_ours(row, rows)
        to_ours = f"{ratio:.2f}" if ratio else ""
        lines.append(
            f"| {row.operator} | {row.backend} | {row.passes} | {row.batch} | {row.heads} "
            f"| {row.tokens} | {row.milliseconds:.3f} | {row.teraflops:.2f} "
            f"| {row.gigabytes:.1f} | {row.roofline:.1%} "
            f"| {'unchecked' if row.error is None else f'{row.error:.1e}'} | {to_ours} |"
        )
    untimed = [row for row in rows if row.status != "timed"]
    if untimed:
        lines += ["", "Not timed:", "", *(f"- {row.text()}" for row in untimed)]
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> str:
    """Draw time over T as SVG, both on logarithmic axes.

    One line for each operator and backend, of the calls with a backward pass; "" if there are none.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.passes == BOTH and row.status == "timed":
            line = lines.setdefault(f"{row.operator}, {row.backend}, {row.batch} x {row.heads}", [])
            line.append((row.tokens, row.milliseconds))
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    lengths, times = zip(*points, strict=True)
    x_low, x_high = math.log2(min(lengths)), math.log2(max(lengths))
    y_low, y_high = math.log10(min(times)), math.log10(max(times))

    def place(tokens: int, taken: float) -> tuple[float, float]:
        x = LEFT + WIDTH * (math.log2(tokens) - x_low) / max(x_high - x_low, 1e-9)
        y = TOP + HEIGHT * (1 - (math.log10(taken) - y_low) / max(y_high - y_low, 1e-9))
        return round(x, 1), round(y, 1)

    parts = [
        f'<text x="{LEFT}" y="20">forward + backward, milliseconds over T</text>',
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#999"/>',
    ]
    for tokens in sorted(set(lengths)):
        x, _ = place(tokens, 10**y_low)
        parts.append(f'<text x="{x}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{tokens}</text>')
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        _, y = place(lengths[0], 10.0**power)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for number, (name, line) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        places = [place(*point) for point in sorted(line)]
        path = " ".join(f"{x},{y}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        x, y = LEFT + WIDTH + 12, TOP + 14 + 18 * number
        parts.append(f'<text x="{x}" y="{y}" fill="{color}">{name}</text>')
    size = f'width="{LEFT + WIDTH + LEGEND}" height="{TOP + HEIGHT + 40}"'
    style = 'font-family="sans-serif" font-size="12"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([start, *parts, "</svg>"]) + "\n"


def write_report(
    folder: Path, rows: list[Row], machine: Mapping[str, object], options: Mapping[str, object]
) -> None:
    """Write kernels.md, kernels.json and, where gradients were timed, kernels.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.md").write_text(markdown(rows, machine, options))
    found = {
        "machine": machine,
        "options": {name: str(value) for name, value in options.items()},
        "rows": [row._asdict() for row in rows],
    }
    (folder / "kernels.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    if drawing := plot(rows):
        (folder / "kernels.svg").write_text(drawing)

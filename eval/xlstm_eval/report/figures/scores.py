"""Figures of scores: Win-and-Tie curves, differences with intervals, recovery by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xlstm_eval.metrics import required_tolerance
from xlstm_eval.records import Comparison
from xlstm_eval.report.figures.style import (
    DASHES,
    INK,
    MUTED,
    PAPER,
    SERIES,
    draw_legend,
    new_figure,
    to_svg,
)
from xlstm_eval.report.sentence import SIGNIFICANT
from xlstm_eval.score import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def win_and_tie_figure(comparisons: Sequence[Comparison], merged: str) -> str:
    """Draw C_alpha over alpha as an exact step function, the headline model's line thick.

    The band is the headline's 95 % interval, where its tasks have items.
    """
    figure, axes = new_figure(5.7, 3.9)
    limit = _tolerance_limit(comparisons)
    # C = 0.5 defines the critical tolerance (paper, section on the metric).
    axes.axhline(0.5, color=MUTED, lw=0.9, ls=(0, (2, 3)))
    axes.text(limit, 0.485, "C = 0.5", color=MUTED, fontsize=9, ha="right", va="top")
    for index, result in enumerate(comparisons):
        is_headline = result.name == merged
        if is_headline:
            _win_and_tie_band(axes, index, result, limit)
        _win_and_tie_line(axes, index, result, limit, is_headline)
    axes.set(xlim=(0, limit), ylim=(0, 1.02), xlabel="tolerance α", ylabel="Win-and-Tie rate C(α)")
    draw_legend(figure, axes)
    rates = []
    for result in comparisons:
        rate = result.win_and_tie.get("0.05", float("nan"))
        rates.append(f"{result.name}: C(0.05) {rate:.2f}")
    return to_svg(figure, "wat", f"Win-and-Tie rate over tolerance. {', '.join(rates)}.")


def _tolerance_limit(comparisons: Sequence[Comparison]) -> float:
    """Return where the axis of tolerances ends: behind all critical tolerances, at 1 at most."""
    # A student that loses nothing anywhere still needs an axis.
    largest = max(result.critical_tolerance_75 for result in comparisons)
    limit = max(0.1, 1.15 * largest)
    return min(1.0, round(limit + 0.05, 1))


def _win_and_tie_band(axes: Axes, index: int, result: Comparison, limit: float) -> None:
    """Shade between the ends of the intervals of C_alpha, which are step functions too."""
    bands = result.statistics.sorted_losses if result.statistics else None
    if bands is None:
        return
    ends = sorted({0.0, limit, *(end for band in bands for end in band if 0 < end < limit)})
    surely = [sum(high <= at for _, high in bands) / len(bands) for at in ends]
    perhaps = [sum(low <= at for low, _ in bands) / len(bands) for at in ends]
    color = SERIES[index % len(SERIES)]
    axes.fill_between(ends, surely, perhaps, step="post", color=color, alpha=0.16, lw=0, zorder=1)


def _win_and_tie_line(
    axes: Axes, index: int, result: Comparison, limit: float, is_headline: bool
) -> None:
    """Draw one model's steps; the headline model also gets a dot at its critical tolerance."""
    steps = sorted(float(required_tolerance(pair)) for pair in result.counted())

    def rate(tolerance: float) -> float:
        # Without a task that counts nothing wins.
        return sum(step <= tolerance for step in steps) / max(1, len(steps))

    color = SERIES[index % len(SERIES)]
    # The rate jumps at each task's required tolerance and holds until the next ("steps-post").
    # Unclipped, a thick line at 1.0 keeps its full width.
    x = [0.0, *(step for step in steps if step < limit), limit]
    axes.plot(
        x,
        [rate(at) for at in x],
        drawstyle="steps-post",
        color=color,
        lw=3.2 if is_headline else 1.5,
        ls="-" if is_headline else DASHES[index % len(DASHES)],
        label=result.name,
        zorder=4 if is_headline else 3,
        clip_on=False,
        solid_joinstyle="miter",
    )
    critical = result.critical_tolerance
    if is_headline and critical <= limit:
        height = rate(critical)
        style: dict[str, Any] = {"ms": 8, "color": color, "mec": PAPER, "mew": 1.6, "zorder": 6}
        axes.plot([critical], [height], "o", clip_on=False, **style)


def difference_figure(
    result: Comparison, short: Mapping[str, str], key: str, against: str = "teacher"
) -> str:
    """Draw each task's difference with its interval, the largest loss first.

    ``against`` names what the scores are compared with. In points; where scores are no shares, in
    percent of the other's. Filled dots are differences that noise does not explain (Holm's
    correction).
    """
    assert result.statistics is not None
    rows = []
    for pair in result.counted():
        found = result.statistics.tasks.get(pair.task)
        if found is None or found.difference_interval is None:
            continue
        is_share = pair.higher_is_better and max(pair.teacher, pair.student) <= 1
        scale = 100 / (1.0 if is_share else pair.teacher or 1.0)
        low, high = found.difference_interval
        values = (scale * found.difference, scale * low, scale * high)
        label = short[pair.task] if is_share else f"{short[pair.task]} (% of the {against}'s)"
        rows.append((*values, label, found.p_value_holm <= SIGNIFICANT))
    rows.sort(key=lambda row: (row[0], row[3]))
    figure, axes = new_figure(5.4, 0.8 + 0.23 * len(rows))
    axes.axvline(0, color=INK, lw=1.1, zorder=2)
    for place, (middle, low, high, _, is_shown) in enumerate(rows):
        color = MUTED if not is_shown else SERIES[1] if middle < 0 else SERIES[0]
        axes.plot([low, high], [place, place], color=color, lw=1.8, zorder=3)
        face = color if is_shown else PAPER
        axes.plot([middle], [place], "o", ms=6.5, color=color, mfc=face, mew=1.6, zorder=4)
    axes.set_yticks(range(len(rows)), [row[3] for row in rows])
    axes.set(
        ylim=(len(rows) - 0.4, -0.6), xlabel=f"student minus {against}, points (95 % interval)"
    )
    axes.grid(visible=False, axis="y")
    shown = sum(row[4] for row in rows)
    alt = f"Differences to the {against} on {len(rows)} tasks with intervals; {shown} beyond noise."
    return to_svg(figure, key, alt)


def recovery_figure(comparisons: Sequence[Comparison], merged: str) -> str:
    """Draw mean recovery per domain, a bar for each model; the line at 100 % is the teacher."""
    groups = [*comparisons[0].recovery_by_domain, "all tasks"]
    figure, axes = new_figure(5.7, 3.9)
    width = 0.8 / len(comparisons)
    highest, labels = 100.0, groups
    for index, result in enumerate(comparisons):
        rates = [*result.recovery_by_domain.values(), result.mean_recovery]
        places, heights = [], []
        for group, rate in enumerate(rates):
            # No bar where every task of a domain has a teacher's score of 0: there is no rate.
            if rate is not None:
                places.append(group - 0.4 + width * (index + 0.5))
                heights.append(100 * rate)
        highest = max([highest, *heights])
        is_headline = result.name == merged
        axes.bar(
            places,
            heights,
            width * 0.88,
            color=SERIES[index % len(SERIES)],
            alpha=1.0 if is_headline else 0.62,
            label=result.name,
            zorder=3,
        )
        if is_headline:
            pairs = zip(groups, rates, strict=True)
            labels = [f"{group}\n{percent(rate)}" for group, rate in pairs]
    axes.axhline(100, color=INK, lw=1.1, ls=(0, (4, 3)), zorder=4)
    axes.set(ylabel="recovery of the teacher's score (%)", ylim=(0, highest * 1.08))
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_xticks(range(len(groups)), labels)
    axes.grid(visible=False, axis="x")
    draw_legend(figure, axes)
    shown = [
        f"{result.name} {100 * result.mean_recovery:.0f} %"
        for result in comparisons
        if result.mean_recovery is not None
    ]
    alt = f"Mean recovery by domain. Over all tasks: {', '.join(shown)}."
    return to_svg(figure, "recovery", alt)

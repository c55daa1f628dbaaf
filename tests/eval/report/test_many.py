"""Many students on one page: the front, the sets, and what the files say."""

from __future__ import annotations

import itertools
import json
import re
from html import unescape

import pytest
from matplotlib.text import Text

from xlstm_eval.metrics import compare
from xlstm_eval.records import TaskPair
from xlstm_eval.report.entries import Entry, groups_of, pareto_front
from xlstm_eval.report.figures.labels import make_room, place_labels
from xlstm_eval.report.figures.style import INK, new_figure
from xlstm_eval.report.many import render_many
from xlstm_eval.report.published import published_entries
from xlstm_eval.statistics.measure import measure


def entry(name: str, worse: int, state: int | None, asked: str = "a", **more: object) -> Entry:
    teacher = [1] * 80 + [0] * 20
    student = [0] * worse + teacher[worse:]
    pair = TaskPair.model_validate(
        {"task": "add", "domain": "math", "teacher_items": teacher, "student_items": student}
    )
    values = {"role": "merged", "teacher": "T", "state_bytes": state, "asked": asked, "tokens": 1}
    compared = measure(compare(name, [pair]))
    return Entry.model_validate({"name": name, "comparison": compared, **values, **more})


def test_the_front_holds_what_none_beats_in_both() -> None:
    points = [(1, 5.0), (2, 3.0), (2, 4.0), (3, 3.0), (4, 1.0), (1, 6.0)]
    assert pareto_front(points) == [0, 1, 4]
    assert pareto_front([(1, 1.0)]) == [0]
    assert pareto_front([]) == []


def test_only_students_that_were_asked_the_same_share_a_set() -> None:
    entries = [entry("x", 1, 10), entry("y", 2, 20), entry("z", 3, 30, asked="b")]
    other = entry("w", 3, 30, teacher="another")
    assert list(groups_of([*entries, other]).values()) == ["set 1", "set 1", "set 2", "set 3"]


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    nasty = "<b>run</b> | $x$/merged"
    entries = [entry(nasty, 20, 70_000), entry("other", 2, 90_000), *published_entries()]
    return render_many("Students", entries)


def test_all_three_files_show_decision_worst_drop_and_metric(files: dict[str, str]) -> None:
    students = {row["name"]: row for row in json.loads(files["compare.json"])["students"]}
    first = students["<b>run</b> | $x$/merged"]
    assert (first["decision"], first["worst_drop"], first["state_bytes"]) == (
        "inferior",
        0.25,
        70_000,
    )
    assert first["intervals"]["critical_tolerance"][0] > 0
    page = files["compare.html"]
    assert "<b>run</b> |" not in page
    assert "Keeps 75 % of its teacher; loses 20 points on add." in unescape(page)
    assert "70.0 KB" in page
    assert "arXiv 2603.15590" in page
    assert page.count("<svg") == 4
    assert "mathdefault" not in page
    rows = [line for line in files["compare.md"].splitlines() if line.startswith("|")]
    assert len({len(re.split(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert len(rows) == 2 + len(students)


def test_published_rows_are_on_no_front(files: dict[str, str]) -> None:
    labels = re.findall(r'aria-label="([^"]*)"', files["compare.html"])
    state = next(label for label in labels if label.startswith("worst drop over state"))
    # The paper prints no sizes of states.
    assert "LoLCATs" not in state
    tokens = next(label for label in labels if label.startswith("worst drop over tokens"))
    assert "xLSTM-Olmo3-7B" in tokens


def test_names_lie_neither_on_each_other_nor_on_points() -> None:
    """Six points, two of them nearly equal: the case of the paper's rows."""
    places = [(5e9, 0.204), (2e10, 0.273), (2e10, 0.375), (2e10, 0.389), (2e10, 0.562), (3e6, 0.0)]
    names = {place: (f"a student of number {n}", INK) for n, place in enumerate(places)}
    figure, axes = new_figure(4.9, 3.9)
    axes.plot(*zip(*places, strict=True), "o")
    axes.set_xscale("log")
    axes.set_ylim(0, 2)  # crowded: a line of text is higher than the distance of two points
    make_room(axes, names)
    place_labels(axes, names, places)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
    assert len(boxes) == len(places)
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)
    frame = axes.get_window_extent()
    for box in boxes:
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1
        for place in places:
            assert not box.contains(*axes.transData.transform(place))

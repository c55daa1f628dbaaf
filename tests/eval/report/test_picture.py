"""The picture of a report: what is drawn, its size, and that equal reports give equal bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from xlstm_eval.records import EvalError
from xlstm_eval.report.page import ReportData, render
from xlstm_eval.report.picture import Scale, draw, main

DATA_FILE = Path(__file__).parent / "report_data.json"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    data = ReportData.model_validate_json(DATA_FILE.read_text(encoding="utf-8"))
    values: dict[str, Any] = json.loads(render(data)["report.json"])
    return values


def words(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_every_task_and_domain_is_drawn(report: dict[str, Any]) -> None:
    picture = draw(report)
    drawn = words(picture)
    assert {"Quickstart", "teacher", "student (merged)"} <= set(drawn)
    assert {task["domain"] for task in report["tasks"].values()} <= set(drawn)
    marks = list(ElementTree.fromstring(picture).iter(f"{SVG}circle"))
    in_the_key = 3
    assert len(marks) == 2 * len(report["tasks"]) + in_the_key
    scores = [*report["teacher"]["scores"].values(), *report["models"][0]["scores"].values()]
    for score in scores:
        assert f"{score:.2f}" in drawn


def test_it_is_small_and_loads_nothing(report: dict[str, Any]) -> None:
    picture = draw(report)
    assert len(picture.encode()) < 60_000
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]
    assert "href" not in picture


def test_the_command_writes_the_same_bytes_each_time(
    report: dict[str, Any], tmp_path: Path
) -> None:
    source = tmp_path / "report.json"
    source.write_text(json.dumps(report), encoding="utf-8")
    targets = [tmp_path / "images" / name for name in ("one.svg", "two.svg")]
    for target in targets:
        main([str(source), str(target)])
    assert targets[0].read_bytes() == targets[1].read_bytes() == draw(report).encode()
    with pytest.raises(SystemExit, match="usage"):
        main([str(source)])
    for text in ("{", "{}", "[]"):
        source.write_text(text)
        with pytest.raises(SystemExit, match=r"report\.json cannot be drawn: it is no report"):
            main([str(source), str(targets[0])])
    with pytest.raises(SystemExit, match="No such file"):
        main([str(tmp_path / "none"), str(targets[0])])


def test_names_are_escaped(report: dict[str, Any]) -> None:
    nasty = '<script>"&'
    assert nasty in words(draw(report | {"title": nasty}))


def test_tasks_without_a_scale_from_0_to_1_are_counted_below(report: dict[str, Any]) -> None:
    first, second = list(report["tasks"])[:2]
    tasks = report["tasks"] | {first: report["tasks"][first] | {"higher_is_better": False}}
    teacher = report["teacher"] | {"scores": report["teacher"]["scores"] | {second: 7.5}}
    drawn = words(draw(report | {"tasks": tasks, "teacher": teacher}))
    assert "Not shown: 2 tasks whose scores have no scale from 0 to 1." in drawn
    worse = {name: task | {"higher_is_better": False} for name, task in tasks.items()}
    with pytest.raises(EvalError, match="Nothing to draw"):
        draw(report | {"tasks": worse})


@pytest.mark.parametrize(
    ("low", "ticks"),
    [
        (0.8, [1.0, 0.9, 0.8]),
        (0.5, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]),
        (0.0, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
    ],
)
def test_the_axis_ends_at_1_and_has_few_labels(low: float, ticks: list[float]) -> None:
    scale = Scale(low, left=10, width=100)
    assert scale.ticks() == ticks
    assert (scale.place(low), scale.place(1.0), scale.place(1.1)) == (10, 110, 110)

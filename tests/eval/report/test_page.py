"""The report's three files: their content, their safety, and that writing is all or nothing."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError
from report_example import full_report, read_data, with_items

from xlstm_eval.report import environment as report
from xlstm_eval.report.data import Curve, ReportData, ReportModel
from xlstm_eval.report.page import render, write_report
from xlstm_eval.report.values import json_schema


@pytest.fixture(scope="module")
def data() -> ReportData:
    return read_data()


@pytest.fixture(scope="module")
def files(data: ReportData) -> dict[str, str]:
    return render(data)


class Outline(HTMLParser):
    """Collect ids, tags and attributes that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.links.append(value or "")
            if tag == "svg" and name == "aria-label":
                self.labels.append(value or "")


def test_json_lists_the_models_with_their_figures(data: ReportData, files: dict[str, str]) -> None:
    values = json.loads(files["report.json"])
    assert [model["name"] for model in values["models"]] == [
        "merged",
        "math",
        "code",
        "stem",
        "chat",
    ]
    merged = values["models"][0]
    teacher = {result.task: result.score for result in data.teacher_results}
    assert values["teacher"]["scores"] == teacher
    ratios = {task: merged["scores"][task] / teacher[task] for task in teacher}
    assert merged["recovery"] == pytest.approx(ratios)
    for alpha in (0.0, 0.05, 0.1):
        wins = sum(ratio >= 1 - alpha - 1e-12 for ratio in ratios.values())
        assert merged["win_and_tie"][str(alpha)] == pytest.approx(wins / len(ratios))
    middle = sorted(max(0.0, 1 - ratio) for ratio in ratios.values())[len(ratios) // 2]
    assert merged["critical_tolerance"] == pytest.approx(middle)
    assert merged["stderr"]["add"] == data.models[0].results[0].stderr
    assert set(merged["metrics"]) == set(values["teacher"]["metrics"]) == set(teacher)


def test_items_give_a_sentence_a_decision_and_intervals_everywhere(data: ReportData) -> None:
    files = render(with_items(data))
    merged = json.loads(files["report.json"])["models"][0]
    assert re.search(
        r"^Keeps 9\d % of its teacher; loses \d\d points on kvfar;", merged["sentence"]
    )
    assert merged["decision"] in ("inferior", "undecided", "non-inferior")
    low, high = merged["intervals"]["critical_tolerance"]
    assert low <= merged["critical_tolerance"] <= high
    assert merged["p_values_holm"]["kvfar"] < 1e-6
    for name in ("report.html", "report.md"):
        text = unescape(files[name])
        assert merged["sentence"] in text, name
        assert merged["decision"] in text.lower(), name
        assert "worst drop" in text.lower(), name
        assert "lossless (paper)" in text.lower(), name
    outline = Outline(files["report.html"])
    assert "differences" in outline.ids
    label = next(label for label in outline.labels if label.startswith("Differences"))
    assert "with intervals; 1 beyond noise" in label
    # The largest loss stands first.
    figure = files["report.html"].split('id="differences"')[1].split("</svg>")[0]
    names = [name for name in re.findall(r">([a-z]+)</text>", figure) if name in merged["scores"]]
    assert names[0] == "kvfar"
    assert len(names) == len(merged["scores"])


@pytest.fixture(scope="module")
def full() -> ReportData:
    return full_report(items=30, left_out=4988)


@pytest.fixture(scope="module")
def full_files(full: ReportData) -> dict[str, str]:
    return render(full)


def test_all_sections_are_there_in_html_and_in_markdown(
    full: ReportData, full_files: dict[str, str]
) -> None:
    page, text = full_files["report.html"], full_files["report.md"]
    outline = Outline(page)
    sections = {"differences", "merging", "items", "speed", "long-context", "gates", "losses"}
    assert sections <= set(outline.ids)
    assert outline.tags.count("svg") == 9 + len(full.losses)
    assert len(set(outline.ids)) == len(outline.ids)
    assert '<time datetime="2026-11-21T23:50:09Z">2026-11-21</time>' in page
    assert "<b>This page holds 30 of 5,018 items</b>" in page
    assert "both (5,000)" in page
    for part in ("Evaluated 2026-11-21T23:50:09Z.", "## Merging", "## Long context"):
        assert part in text
    assert "| 4096 | 6.3 MB | 98 | 259.0 KB | 150 |" in text
    assert_tables_are_well_formed(text, least=12)


def test_json_keeps_its_schema(
    full: ReportData, full_files: dict[str, str], files: dict[str, str]
) -> None:
    values = json.loads(full_files["report.json"])
    assert values["finished"] == full.finished
    assert values["items"] == full.items.counts
    assert values["merging"]["tasks"]["add"]["expert"] == "math"
    assert values["speed"]["merged"]["points"][0]["state_bytes"] == 258_984
    assert values["long_context"]["teacher"]["loss_by_position"][0]["from"] == 128
    for own in (values, json.loads(files["report.json"])):
        jsonschema.validate(own, json_schema())
    with pytest.raises(jsonschema.ValidationError, match="lossless"):
        del values["models"][0]["lossless"]
        jsonschema.validate(values, json_schema())


def test_the_schema_in_the_docs_is_that_of_the_file() -> None:
    file = Path(__file__).parents[3] / "docs" / "report.schema.json"
    assert json.loads(file.read_text(encoding="utf-8")) == json_schema()


def test_tasks_at_chance_are_listed_apart(data: ReportData) -> None:
    full = with_items(data)
    first = full.teacher_results[0]
    at_chance = first.model_copy(update={"chance": 0.9})
    files = render(
        full.model_copy(update={"teacher_results": (at_chance, *full.teacher_results[1:])})
    )
    merged = json.loads(files["report.json"])["models"][0]
    assert merged["apart"] == {first.task: "the teacher is at chance (0.90)"}
    for name in ("report.html", "report.md"):
        assert "Listed apart" in files[name]
        assert f"{first.task}" in files[name].split("Listed apart")[1][:200]


def test_html_is_self_contained_and_its_ids_are_unique(
    data: ReportData, files: dict[str, str]
) -> None:
    outline = Outline(files["report.html"])
    assert len(set(outline.ids)) == len(outline.ids)
    sections = {
        "win-and-tie",
        "recovery",
        "models",
        "scores",
        "gates",
        "losses",
        "timings",
        "provenance",
    }
    assert {"headline", *sections} <= set(outline.ids)
    assert not {"link", "iframe", "img", "object"} & set(outline.tags)
    inside = {link[1:] for link in outline.links if link.startswith("#")}
    assert inside <= set(outline.ids)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in outline.links)
    assert set(re.findall(r"url\(#([^)]+)\)", files["report.html"])) <= set(outline.ids)
    figures = 2 + 1 + len(data.losses)  # the gates of all models are one picture
    assert outline.tags.count("svg") == len(outline.labels) == figures
    assert all(outline.labels)


def test_each_figure_is_small_and_takes_its_colours_from_the_page(files: dict[str, str]) -> None:
    for svg in re.findall(r"<svg.*?</svg>", files["report.html"], flags=re.DOTALL):
        assert len(svg.encode()) < 200_000
        assert "var(--" in svg
        assert not re.search(r"#0[1-5]0[0-9a-f]0[0-9a-f]{2}\b", svg)
    defined = set(re.findall(r"(--[a-z0-9]+):", files["report.html"]))
    assert set(re.findall(r"var\((--[a-z0-9]+)", files["report.html"])) <= defined


def test_a_large_heat_map_stays_small(data: ReportData) -> None:
    def gates(layer: int) -> tuple[float, ...]:
        return tuple(0.5 + 0.4 * math.sin(layer * head) for head in range(64))

    rows = tuple(gates(layer) for layer in range(80))
    big = data.model_copy(update={"gates": {"merged": rows}})
    assert all(
        len(svg) < 200_000
        for svg in re.findall(r"<svg.*?</svg>", render(big)["report.html"], flags=re.DOTALL)
    )


def test_rendering_is_deterministic(data: ReportData, files: dict[str, str]) -> None:
    assert render(data) == files


def test_names_are_escaped(data: ReportData) -> None:
    nasty = '<script>alert("x")</script> | $a$ & co'
    model = ReportModel(name=nasty, role="merged", results=data.models[0].results)
    losses = {nasty: {nasty: Curve(step=(1, 2), value=(1.0, 0.5), unit=nasty)}}
    gates = {nasty: ((0.1, 0.9),)}
    files = render(
        ReportData(
            title=nasty,
            teacher=nasty,
            teacher_results=data.teacher_results,
            models=(model,),
            gates=gates,
            losses=losses,
            provenance={nasty: nasty},
            recipe=nasty,
        )
    )
    assert nasty not in files["report.html"]
    assert re.findall("<script[^>]*>", files["report.html"]) == ["<script>"]  # the page's own
    assert json.loads(files["report.json"])["title"] == nasty
    tables = [line for line in files["report.md"].splitlines() if line.startswith("|")]
    assert tables
    assert "<script" not in "".join(tables)


def test_a_dollar_is_a_dollar_in_every_figure(data: ReportData) -> None:
    names = ("US$ and C$", "cost_$\\frac$x", "$x_{$")
    results = tuple(
        result.model_copy(update={"domain": name, "task": f"{name} {result.task}"})
        for name, result in zip(names, data.teacher_results, strict=False)
    )
    models = tuple(ReportModel(name=name, role="expert", results=results) for name in names)
    curve = Curve(step=(1, 2), value=(1.0, 0.5), unit="US$ per $")
    report = ReportData(
        title="t",
        teacher="T",
        teacher_results=results,
        models=models,
        losses={"align": dict.fromkeys(names, curve)},
    )
    html = unescape(render(report)["report.html"])
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", html)
    for name in names:
        assert drawn.count(name) == 4, name  # a legend in three figures, and the domain
    assert "US$ per $" in drawn


def test_markdown_tables_are_well_formed(files: dict[str, str]) -> None:
    assert files["report.md"].startswith("# Quickstart\n")
    assert_tables_are_well_formed(files["report.md"], least=8)


def assert_tables_are_well_formed(text: str, least: int) -> None:
    lines = text.splitlines()
    tables, block = [], []
    for line in [*lines, ""]:
        if line.startswith("|"):
            block.append(line)
        elif block:
            tables.append(block)
            block = []
    assert len(tables) >= least
    for table in tables:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table}
        assert len(widths) == 1, table[0]
        assert re.fullmatch(r"\|(-+\|)+", table[1])


def test_a_report_with_the_least_data(data: ReportData) -> None:
    plain = [
        result.model_copy(update={"domain": None, "stderr": None})
        for result in data.teacher_results[:1]
    ]
    zero = plain[0].model_copy(update={"score": 0.0, "correct": 0})
    model = ReportModel(name="student", role="student", results=(zero,))
    files = render(
        ReportData(title="t", teacher="T", teacher_results=tuple(plain), models=(model,))
    )
    outline = Outline(files["report.html"])
    assert "gates" not in outline.ids
    assert "losses" not in outline.ids
    assert json.loads(files["report.json"])["models"][0]["critical_tolerance"] == 1.0


def test_times_are_summed_by_stage(data: ReportData, files: dict[str, str]) -> None:
    text = re.sub(r"<[^>]+>|\s+", " ", files["report.html"])
    assert "math 33 s, code 32 s, stem 32 s, chat 31 s 2 min 08 s" in re.sub(r" +", " ", text)
    assert json.loads(files["report.json"])["timings"] == data.timings


def test_the_table_names_every_task_in_full_under_its_domain(data: ReportData) -> None:
    names = [
        ("qs_math_add", "math"),
        ("qs_math_story", "math"),
        ("qs_code", "code"),
        ("qs_code_run", "code"),
    ]
    names += [("gpqa_main", "stem"), ("a", None), ("a_b", None), ("same_task", "chat")]
    base = data.teacher_results[0]
    results = tuple(
        base.model_copy(update={"task": task, "domain": domain}) for task, domain in names
    )
    model = ReportModel(name="student", role="student", results=results)
    text = render(ReportData(title="t", teacher="T", teacher_results=results, models=(model,)))[
        "report.html"
    ]
    rows = re.findall(r'<th scope="row" title="[^"]*">(.*?)</th>', text)
    assert [row.replace("<wbr>", "") for row in rows] == [task for task, _ in names]
    groups = re.findall(r'<th scope="rowgroup"[^>]*>([^<]*)</th>', text)
    assert groups == ["math", "code", "stem", "chat"]


def test_writing_replaces_the_old_report_as_a_whole(data: ReportData, tmp_path: Path) -> None:
    target = tmp_path / "run" / "report"
    assert write_report(data, target) == target / "report.html"
    (target / "stray.txt").write_text("old")
    write_report(data, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert [path.name for path in target.parent.iterdir()] == ["report"]


def test_a_failed_write_leaves_the_old_report(
    data: ReportData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report"
    write_report(data, target)
    before = (target / "report.html").read_bytes()
    real = Path.write_text

    def full_disk(self: Path, text: str, *rest: Any, **more: Any) -> int:
        if self.name == "report.json":
            raise OSError(28, "No space left on device")
        return real(self, text, *rest, **more)

    monkeypatch.setattr(report.Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report(data, target)
    assert (target / "report.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_bad_data_is_refused(data: ReportData) -> None:
    values = data.model_dump()
    with pytest.raises(ValidationError, match="rows of unequal length"):
        ReportData.model_validate(values | {"gates": {"merged": [[0.1], [0.1, 0.2]]}})
    with pytest.raises(ValidationError, match="'merged' appears twice"):
        ReportData.model_validate(values | {"models": [values["models"][0]] * 2})
    with pytest.raises(ValidationError, match="1 values for 2 steps"):
        Curve(step=(1, 2), value=(1.0,))
    with pytest.raises(ValidationError, match="finite"):
        Curve(step=(1,), value=(math.nan,))

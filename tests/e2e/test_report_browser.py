"""The report in a real browser: drawn, filtered, printed, by keyboard, and nothing fetched."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from report_example import HOSTILE, RARE, RECIPE, full_report

from xlstm_eval.report.data import ReportData
from xlstm_eval.report.page import write_report

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
FLAGS = (
    "--no-sandbox",  # Chromium has none for root, as whom containers run
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser's own traffic has nowhere to go either
)
ITEMS = 10_000
SLOWEST = 1.5
"""Seconds that a filter of 10,000 items may take on a busy machine; 0.05 on an idle one."""
PATIENCE = 120_000
"""Milliseconds for whatever the browser does: only a page that hangs reaches them."""
SECTIONS = [
    "differences",
    "win-and-tie",
    "recovery",
    "models",
    "scores",
    "merging",
    "items",
    "speed",
    "long-context",
    "gates",
    "losses",
    "timings",
    "provenance",
]
BOXES = """selector => [...document.querySelectorAll(selector)].map(e => {
  const box = e.getBoundingClientRect(); return [box.width, box.height]; })"""
# Sets a field as a user does and returns the seconds until the list has been drawn anew.
TIMED = """([name, value, event]) => new Promise(done => {
  const field = document.getElementById(name), list = document.getElementById("item-list");
  const began = performance.now();
  new MutationObserver((_, observer) => {
    observer.disconnect();
    list.getBoundingClientRect();
    done((performance.now() - began) / 1000);
  }).observe(list, { childList: true });
  field.value = value;
  field.dispatchEvent(new Event(event));
})"""

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH (chromium, chromium-browser, google-chrome)"
)


@dataclass
class Watched:
    """Hold an open page, what its console said, and what it asked of the network."""

    page: Any
    told: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        settings = {"executable_path": BROWSER, "args": list(FLAGS), "timeout": PATIENCE}
        opened = playwright.chromium.launch(**settings)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def data() -> ReportData:
    return full_report(ITEMS)


@pytest.fixture(scope="module")
def file(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(data, tmp_path_factory.mktemp("run") / "report")


@pytest.fixture(scope="module")
def wide(browser: Any, file: Path) -> Watched:
    watched = Watched(browser.new_page(viewport={"width": 1280, "height": 900}))
    watched.page.goto(file.as_uri())
    return watched


def count(watched: Watched) -> int:
    """Return how many items the list says it has."""
    found = re.search(r"([\d,]+) items$", watched.page.inner_text("#item-count"))
    assert found
    return int(found[1].replace(",", ""))


def wait_for_items(page: Any, number: int) -> None:
    """Wait until the list shows so many items; the search waits for the keyboard to rest."""
    from playwright.sync_api import expect

    expect(page.locator("#item-list > li")).to_have_count(number, timeout=PATIENCE)


def assert_drawn(watched: Watched, charts: int, smallest: int) -> None:
    page = watched.page
    ids = page.eval_on_selector_all("section", "all => all.map(e => e.id)")
    assert ids == SECTIONS
    boxes = page.evaluate(BOXES, "figure svg")
    assert len(boxes) == charts
    assert all(width > smallest and height > smallest / 2 for width, height in boxes), boxes
    assert all(height > 60 for _, height in page.evaluate(BOXES, "section"))
    assert watched.overflow() == 0
    assert watched.told == []
    assert watched.requests == [page.url]  # the file itself and nothing else


def test_everything_is_drawn_without_errors_and_nothing_is_fetched(
    wide: Watched, data: ReportData
) -> None:
    # Two of scores, differences, merging, two of speed, two of long context, the gates.
    assert_drawn(wide, charts=2 + 2 + 2 + 2 + 1 + len(data.losses), smallest=200)
    numbers = wide.page.eval_on_selector_all(
        "#headline dd.value", "all => all.map(e => e.innerText)"
    )
    # Decision, share kept, worst drop, α*, C at the recipe's tolerance, lossless: none alone.
    assert len(numbers) == 6
    assert all(numbers)
    rows = wide.page.eval_on_selector_all(
        "#scores tr:not(.domain)", "all => all.map(e => e.cells.length)"
    )
    # A head and 13 tasks; a name, the teacher and five students each.
    assert rows == [7] * (1 + len(data.teacher_results))
    shades = wide.page.eval_on_selector_all(
        "#scores td.below", "all => all.map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(shades)) > 5


def test_ten_thousand_items_are_filtered_at_once(wide: Watched, data: ReportData) -> None:
    page = wide.page
    page.reload()
    assert data.items is not None
    assert count(wide) == ITEMS
    assert "This page holds" not in page.inner_text("#items")  # it holds them all
    assert page.locator("#item-list > li").count() == 25  # a page of the list, not all of it
    assert page.inner_text("#item-list .badge >> nth=0") == "teacher only"
    times = {}
    for value, outcome in (("1", "student"), ("3", "both"), ("", None)):
        times[f"outcome {value}"] = page.evaluate(TIMED, ["item-outcome", value, "change"])
        assert count(wide) == (data.items.counts[outcome] if outcome else ITEMS)
    times["task"] = page.evaluate(TIMED, ["item-task", "2", "change"])
    name = page.eval_on_selector("#item-task", "e => e.selectedOptions[0].text")
    own = [item for item in data.items.items if item.task == name]
    assert count(wide) == len(own)
    assert page.inner_text("#item-list .where >> nth=0").startswith(f"{name} #")
    page.evaluate(TIMED, ["item-task", "", "change"])
    # The first search makes all texts ready.
    for words, found in ((RARE.upper(), 1), (f"question {RARE}", 1), ("no such words", 0)):
        times[words] = page.evaluate(TIMED, ["item-search", words, "input"])
        assert count(wide) == found
    print(f"seconds to filter {ITEMS} items: {times}")
    assert max(times.values()) < SLOWEST, times


def test_texts_of_models_are_shown_and_never_run(wide: Watched) -> None:
    page = wide.page
    page.reload()
    page.click("#item-list summary >> nth=0")
    shown = page.inner_text("#item-list .item >> nth=0")
    assert shown.count(HOSTILE) == 2  # the prompt and the teacher's answer
    assert page.title() == "Quickstart"
    assert page.locator("#items img").count() == 0
    assert wide.told == []


def test_the_list_is_used_by_keyboard_alone(wide: Watched) -> None:
    page = wide.page
    page.reload()
    page.focus("#item-search")
    page.keyboard.type(f"question {ITEMS - 7} ")
    wait_for_items(page, 1)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert RARE in page.inner_text("#item-list .item")
    page.fill("#item-search", "")
    wait_for_items(page, 25)
    page.focus("#item-next")
    for _ in range(2):
        page.keyboard.press("Enter")
    assert page.inner_text("#item-page") == f"Page 3 of {ITEMS // 25}"
    assert page.evaluate("document.activeElement.id") == "item-next"
    page.focus("#item-back")
    page.keyboard.press("Space")
    assert page.inner_text("#item-count").startswith("26 to 50 of ")


def test_on_a_phone_nothing_sticks_out(browser: Any, file: Path, data: ReportData) -> None:
    phone = Watched(browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True))
    phone.page.goto(file.as_uri())
    assert_drawn(phone, charts=9 + len(data.losses), smallest=150)
    # Every column of the scores is on the screen, and so is a long answer without a space.
    right = phone.page.evaluate(
        "Math.max(...[...document.querySelectorAll('#scores td, #models td')]"
        ".map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 390
    phone.page.click("#item-list summary >> nth=0")
    assert phone.overflow() == 0
    phone.page.close()


def test_dark_pages_have_light_letters(browser: Any, file: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(file.as_uri())
    colors = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
        # Numbers in the cells of the gates stand on colours of their own.
        " ...[...document.querySelectorAll('section:not(#gates) figure svg text')]"
        ".map(text => getComputedStyle(text).fill)]"
    )
    dark, light, *charts = ([int(n) for n in re.findall(r"\d+", color)[:3]] for color in colors)
    assert max(dark) < 60
    assert min(light) > 200
    assert all(min(chart) > 120 for chart in charts), charts
    page.close()


def test_paper_loses_nothing(wide: Watched, data: ReportData, tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed")
    wide.page.reload()
    target = tmp_path / "report.pdf"
    wide.page.pdf(path=target, format="A4")
    pages = pypdf.PdfReader(target).pages
    # Lines break where the paper ends.
    text = re.sub(r"\s+", "", "".join(page.extract_text() for page in pages))
    for result in data.teacher_results:
        assert result.task in text
    lines = [re.sub(r"\s+", "", line) for line in RECIPE.splitlines()]
    assert [line for line in lines if line not in text] == []
    for key, value in data.provenance.items():
        assert re.sub(r"\s+", "", value) in text, key
    for model in data.models:
        scores = "".join(f"{result.score:.3f}" for result in model.results[:1])
        assert scores in text


def test_what_the_page_would_refuse_is_noticed(browser: Any, file: Path) -> None:
    """Neither a script that is not the page's own nor an image may load; the watch sees both."""
    faulty = file.with_name("faulty.html")
    image = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "taken over"</script>'
    text = file.read_text(encoding="utf-8").replace("<main>", f"<main>{image}")
    faulty.write_text(text, encoding="utf-8")
    watched = Watched(browser.new_page())
    watched.page.goto(faulty.as_uri())
    refusals = [line for line in watched.told if "Content Security Policy" in line]
    assert len(refusals) == 2, watched.told
    assert watched.page.title() == "Quickstart"
    # The page's own script still runs.
    assert count(watched) == ITEMS
    watched.page.close()

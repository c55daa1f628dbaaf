"""Open a report in headless Chromium: what is rendered, and that nothing is fetched."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from xlstm_eval.report.page import ReportData, write_report

DATA_FILE = Path(__file__).parents[1] / "eval" / "report" / "report_data.json"
BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser's own traffic has nowhere to go either
)
# Reads the layout of a page in a frame and tells the page around it.
PROBE = """<script>addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const all = selector => [...document.querySelectorAll(selector)];
  const requests = performance.getEntriesByType("resource").map(e => e.name);
  parent.postMessage({ page: location.pathname.split("/").pop(), values: {
    heads: all("h2").map(e => e.textContent),
    sections: Object.fromEntries(all("section").map(e => [e.id, box(e)])),
    figures: all("figure svg").map(box),
    numbers: all("#headline dd.value").map(e => e.textContent),
    rows: all("#scores tbody tr").map(e => e.cells.length),
    page: [document.documentElement.scrollWidth, innerWidth],
    shades: all("#scores td.below").map(e => getComputedStyle(e).backgroundColor),
    requests: requests.filter(name => !name.startsWith("data:")),
  } }, "*");
});</script></body>"""
# Holds a frame for each page, and keeps what the probes tell where --dump-dom shows it.
AROUND = """<!doctype html><meta charset="utf-8"><body><output id="probes">{}</output><script>
addEventListener("message", event => {
  const out = document.getElementById("probes");
  const told = JSON.parse(out.textContent);
  told[event.data.page] = event.data.values;
  out.textContent = JSON.stringify(told);
});</script>FRAMES</body>"""
IMAGE = '<img src="http://127.0.0.1:9/x.png">'
WIDTHS = {"report.html": 1280, "wide.html": 1280, "narrow.html": 500, "blocked.html": 1280}
WIDTHS |= {"loading.html": 1280}

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH (chromium, chromium-browser, google-chrome)"
)


@dataclass
class Visit:
    """Hold what one visit left: the values of each page's probe and the console's lines."""

    probes: dict[str, dict[str, Any]]
    console: list[str]

    def lines_of(self, page: str) -> list[str]:
        """Return the console's lines about one page."""
        return [line for line in self.console if page in line]


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    """Open the report, copies with a probe, and two pages with faults: one start of the browser."""
    data = ReportData.model_validate_json(DATA_FILE.read_text(encoding="utf-8"))
    folder = tmp_path_factory.mktemp("run") / "report"
    text = write_report(data, folder).read_text(encoding="utf-8")
    # The copies may run scripts; the report itself may not.
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert allowed != text
    pages = {
        "wide.html": allowed.replace("</body>", PROBE),
        "narrow.html": allowed.replace("</body>", PROBE),
        "blocked.html": text.replace("<main>", f"<main>{IMAGE}"),
        "loading.html": f"<!doctype html><body>{IMAGE}<script>nothing()</script>{PROBE}",
    }
    for name, content in pages.items():
        (folder / name).write_text(content, encoding="utf-8")
    frames = "".join(
        f'<iframe src="{name}" width="{width}" height="900" style="border:0"></iframe>'
        for name, width in WIDTHS.items()
    )
    around = folder / "around.html"
    around.write_text(AROUND.replace("FRAMES", frames), encoding="utf-8")
    return open_page(around, folder / "profile")


def open_page(page: Path, profile: Path) -> Visit:
    assert BROWSER is not None
    flags = [*FLAGS, f"--user-data-dir={profile}", "--window-size=1400,900"]
    # Frames tell their values after the page around them has loaded; the budget waits for them.
    command = [BROWSER, *flags, "--virtual-time-budget=10000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'<output id="probes">(.*?)</output>', done.stdout, flags=re.DOTALL)
    assert found, "the page around the frames did not open"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(json.loads(html.unescape(found[1])), console)


def test_the_report_opens_without_a_line_on_the_console(visit: Visit) -> None:
    # Its content policy forbids every request, and a forbidden one would be told on the console.
    assert "Win-and-Tie curves" in visit.probes["wide.html"]["heads"]
    for page in ("report.html", "wide.html", "narrow.html", "around.html"):
        assert visit.lines_of(page) == []


def test_these_checks_notice_a_request_and_an_error(visit: Visit) -> None:
    assert any("Content Security Policy" in line for line in visit.lines_of("blocked.html"))
    assert any("nothing is not defined" in line for line in visit.lines_of("loading.html"))
    assert visit.probes["loading.html"]["requests"] == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("page", ["wide.html", "narrow.html"])
def test_sections_and_figures_are_laid_out(visit: Visit, page: str) -> None:
    seen = visit.probes[page]
    names = [
        "win-and-tie",
        "recovery",
        "models",
        "scores",
        "gates",
        "losses",
        "timings",
        "provenance",
    ]
    assert list(seen["sections"]) == names
    assert all(width > 200 and height > 60 for width, height in seen["sections"].values())
    assert len(seen["figures"]) == 2 + 3 + 5
    assert all(width > 150 and height > 80 for width, height in seen["figures"])
    assert seen["rows"] == [14] * 6  # the teacher and five students; a name and 13 scores each
    # Decision, share kept, worst drop, α*, C at the recipe's tolerance, lossless: none alone.
    assert len(seen["numbers"]) == 6
    assert all(seen["numbers"])
    assert len(set(seen["shades"])) > 5
    assert seen["requests"] == []
    page_width, window_width = seen["page"]
    assert window_width == WIDTHS[page]
    assert page_width <= window_width  # wide tables scroll inside, the page does not

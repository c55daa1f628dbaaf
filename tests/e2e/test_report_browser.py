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
# Reads the page's layout and leaves it in the page, where --dump-dom shows it.
PROBE = """<script>addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const out = document.createElement("output");
  out.id = "probe";
  out.textContent = JSON.stringify({
    sections: Object.fromEntries(
      [...document.querySelectorAll("section")].map(e => [e.id, box(e)])),
    figures: [...document.querySelectorAll("figure svg")].map(box),
    numbers: [...document.querySelectorAll("#headline dd.value")].map(e => e.textContent),
    rows: [...document.querySelectorAll("#scores tbody tr")].map(e => e.cells.length),
    page: [document.documentElement.scrollWidth, innerWidth],
    shades: [...document.querySelectorAll("#scores td.below")].map(
      e => getComputedStyle(e).backgroundColor),
    requests: performance.getEntriesByType("resource")
      .map(e => e.name).filter(name => !name.startsWith("data:")),
  });
  document.body.append(out);
});</script></body>"""

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on PATH (chromium, chromium-browser, google-chrome)"
)


@dataclass
class Visit:
    """Hold what one visit left: the rendered DOM and the console's lines."""

    dom: str
    console: list[str]

    def probe(self) -> dict[str, Any]:
        found = re.search(r'<output id="probe">(.*?)</output>', self.dom, flags=re.DOTALL)
        assert found, "the probe did not run"
        values: dict[str, Any] = json.loads(html.unescape(found[1]))
        return values


def visit(page: Path, folder: Path, size: str = "1280,900") -> Visit:
    assert BROWSER is not None
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={size}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = ReportData.model_validate_json(DATA_FILE.read_text(encoding="utf-8"))
    return write_report(data, tmp_path_factory.mktemp("run") / "report")


def probed(page: Path, folder: Path) -> Path:
    """Write a copy with the probe in it; the copy may run scripts, the report itself may not."""
    text = page.read_text(encoding="utf-8")
    # The probe is a script, and the report's own policy forbids every script.
    allowed = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert allowed != text
    copy = folder / "probed.html"
    copy.write_text(allowed.replace("</body>", PROBE), encoding="utf-8")
    return copy


def test_the_report_opens_without_a_line_on_the_console(page: Path, tmp_path: Path) -> None:
    # Its content policy forbids every request, and a forbidden one would be told on the console.
    seen = visit(page, tmp_path)
    assert "<h2>Win-and-Tie curves</h2>" in seen.dom
    assert seen.console == []


def test_these_checks_notice_a_request_and_an_error(page: Path, tmp_path: Path) -> None:
    image = '<img src="http://127.0.0.1:9/x.png">'
    blocked = tmp_path / "blocked.html"
    blocked.write_text(
        page.read_text(encoding="utf-8").replace("<main>", f"<main>{image}"), encoding="utf-8"
    )
    assert any("Content Security Policy" in line for line in visit(blocked, tmp_path).console)
    loading = tmp_path / "loading.html"
    loading.write_text(
        f"<!doctype html><body>{image}<script>nothing()</script>{PROBE}", encoding="utf-8"
    )
    seen = visit(loading, tmp_path)
    assert any("nothing is not defined" in line for line in seen.console)
    assert seen.probe()["requests"] == ["http://127.0.0.1:9/x.png"]


@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_sections_and_figures_are_laid_out(page: Path, tmp_path: Path, size: str) -> None:
    seen = visit(probed(page, tmp_path), tmp_path, size).probe()
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
    assert len(seen["numbers"]) == 4
    assert all(seen["numbers"])
    assert len(set(seen["shades"])) > 5
    assert seen["requests"] == []
    page_width, window_width = seen["page"]
    assert page_width <= window_width  # wide tables scroll inside, the page does not

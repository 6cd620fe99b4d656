"""The page in a real browser: no error, hover and keys tell of tokens, nothing foreign runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offramp.report.page import write_page
from offramp.report.read import read_run
from offramp.report.sections import arrange
from tests.conftest import CHROMIUM
from tests.runs import FULL, evaluated, generated, saved, trace_of
from tests.test_report import EVIL

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, once."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page of results in a browser, and all that it complained of."""

    def __init__(self, browser: Browser, path: Path, **options: object) -> None:
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def panel(self) -> str:
        """What the panel tells; empty when it is not there."""
        panel = self.page.locator("#panel")
        return panel.inner_text() if panel.is_visible() else ""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything: its trace and full depth, hostile words, a slow-down."""
    folder = tmp_path_factory.mktemp("report")
    run = generated(["Why?", "شرح", EVIL[0]], [" the", " cat", *EVIL, " sat\n"])
    full = generated(
        ["Why?", "شرح", EVIL[0]], [" the", " dog", *EVIL, " sat\n"], plan=FULL, seconds=1
    )
    files = saved(folder, run=run, full=full, trace=trace_of(run, EVIL[1]))
    page = folder / "report.html"
    write_page(page, arrange([(file.name, read_run(file)) for file in files]))
    return page


def test_hover_tells_of_a_token(browser: Browser, path: Path) -> None:
    """Exit, confidence, the full model's choice, every exit; from strip and grid; no complaint."""
    opened = Opened(browser, path)
    assert "Slower than full depth" in opened.page.locator(".alert:visible").inner_text()
    tokens = opened.page.locator(".strip").first.locator(".t")
    tokens.nth(1).hover()
    told = opened.panel()
    assert "“ cat”, token 2 of 11" in told
    assert "of 12 layers" in told or "all 12 layers" in told
    assert "The full model would have said" in told
    assert opened.page.locator("#panel tbody tr").count() == 12
    tokens.nth(4).hover()
    assert "token 5 of 11" in opened.panel()
    opened.page.locator(".wide svg").first.hover(position={"x": 44 + 16 * 6 + 8, "y": 40})
    assert "token 7 of 11" in opened.panel()
    assert opened.page.locator("svg .mark").count() == 1
    assert opened.complaints == []
    assert opened.asked == [path.as_uri()]


def test_every_token_can_be_reached_by_keys(browser: Browser, path: Path) -> None:
    """Tab enters a strip, arrows walk in it, Tab leaves it, Escape closes the panel."""
    page = (opened := Opened(browser, path)).page
    page.locator("#theme").focus()
    page.keyboard.press("Tab")
    while page.evaluate("!document.activeElement.matches('.t')"):
        page.keyboard.press("Tab")
    assert "token 1 of 11" in opened.panel()
    seen = []
    for _ in range(10):
        page.keyboard.press("ArrowRight")
        seen.append(page.locator("#panel .word").inner_text())
    assert [line.split("token ")[-1] for line in seen] == [f"{t} of 11" for t in range(2, 12)]
    page.keyboard.press("Home")
    assert "token 1 of 11" in opened.panel()
    strip = "document.activeElement.closest('.strip')"
    page.evaluate(f"window.before = {strip}")
    page.keyboard.press("Tab")
    assert page.evaluate(f"{strip} !== window.before")
    page.keyboard.press("Escape")
    assert opened.panel() == ""
    assert opened.complaints == []


def test_nothing_foreign_runs(browser: Browser, path: Path) -> None:
    """Not from the data; and the policy stops what is put there afterwards."""
    opened = Opened(browser, path)
    assert opened.page.locator("script").count() == 2
    assert opened.page.locator("img").count() == 0
    opened.page.evaluate(
        "const s = document.createElement('div');"
        "s.innerHTML = '<img src=x onerror=\"document.title=1\">'; document.body.append(s)"
    )
    opened.page.wait_for_timeout(100)
    assert opened.page.title() == "offramp: run.json"
    assert any("Content Security Policy" in line for line in opened.complaints)


def test_errors_of_the_script_are_seen(browser: Browser, path: Path) -> None:
    """The page says that something does not work."""
    page = Opened(browser, path).page
    assert page.locator("#error").is_hidden()
    page.evaluate("setTimeout(() => { throw new Error('on purpose') })")
    page.locator("#error").wait_for(state="visible")
    assert "on purpose" in page.locator("#error").inner_text()


def test_a_broken_page_says_so(browser: Browser, path: Path) -> None:
    """A file cut in its data, too, with pictures and tooltips left."""
    cut = path.with_name("cut.html")
    cut.write_text(path.read_text().replace('id="data">{', 'id="data">'))
    page = Opened(browser, cut).page
    assert "does not work" in page.locator("#error").inner_text()
    assert "Left early" in page.locator(".strip .t[title]:not(.full)").first.get_attribute("title")  # type: ignore[operator]


def test_without_scripts_all_is_there(browser: Browser, path: Path) -> None:
    """Strips with their words, pictures, figures."""
    opened = Opened(browser, path, java_script_enabled=False)
    assert opened.page.locator("noscript").count() == 1
    assert "token 2 of 11" in str(opened.page.locator(".t").nth(8).get_attribute("title"))
    assert opened.page.locator("svg[role=img]").count() >= 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_both_themes(browser: Browser, path: Path, scheme: str) -> None:
    """Text against what is behind it: a contrast of 4.5 (WCAG 2.2, 1.4.3), tokens included."""
    opened = Opened(browser, path, color_scheme=scheme)
    found = opened.page.evaluate(_CONTRASTS)
    assert {kind for kind, _ in found} >= {"d2", "d4", "full", "alert", "small"}
    assert {kind: ratio for kind, ratio in found if ratio < 4.5} == {}
    opened.page.locator("#theme").click()
    other = opened.page.evaluate("getComputedStyle(document.documentElement).colorScheme")
    assert other == ("dark" if scheme == "light" else "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_comparison_can_be_read(browser: Browser, tmp_path: Path, scheme: str) -> None:
    """Its tables beside its pictures, as wide as there is room, in both themes; no complaint."""
    [file] = saved(tmp_path, result=evaluated({"koala": 1.2, "vicuna": 0.8}))
    page = tmp_path / "r.html"
    write_page(page, arrange([(file.name, read_run(file))]))
    opened = Opened(browser, page, color_scheme=scheme)
    found = opened.page.evaluate(_CONTRASTS)
    assert {kind for kind, _ in found} >= {"alert", "bad", "TD", "TH"}
    assert {kind: ratio for kind, ratio in found if ratio < 4.5} == {}
    figure = opened.page.locator("figure").first
    picture, table = (figure.locator(name).bounding_box() for name in ("svg", "table"))
    assert picture is not None
    assert table is not None
    assert picture["x"] + picture["width"] <= table["x"]
    wide = "[...document.querySelectorAll('.wide')].every((el) => el.scrollWidth <= el.clientWidth)"
    assert opened.page.evaluate(wide)
    assert opened.complaints == []


_CONTRASTS = """() => {
  const rgb = (css) => css.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (at) => {
    for (let el = at; el; el = el.parentElement) {
      const found = rgb(getComputedStyle(el).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
  };
  const kinds = ".legend .t, .alert:not([hidden]), .small, .prompt, h1, .about, .facts :is(th, td)";
  return [...document.querySelectorAll(kinds)].map((el) => {
    const both = [light(rgb(getComputedStyle(el).color)), light(behind(el))];
    const [a, b] = both.sort((x, y) => y - x);
    return [el.className.split(" ").pop() || el.tagName, (a + 0.05) / (b + 0.05)];
  });
}"""


def test_a_page_of_fifty_answers_opens_at_once(browser: Browser, tmp_path: Path) -> None:
    """Every exit of 50 answers of 100 tokens: under 2 s of the page's thread.

    Its own time, not the clock's: other work on the machine is not the page's.
    """
    run = generated([f"prompt {i}" for i in range(50)], tokens=100)
    files = saved(tmp_path, run=run, trace=trace_of(run), full=run | {"plan": FULL})
    page = tmp_path / "r.html"
    write_page(page, arrange([(file.name, read_run(file)) for file in files]))
    tab = browser.new_page()
    meter = tab.context.new_cdp_session(tab)
    meter.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(page.as_uri())
    measured = meter.send("Performance.getMetrics")["metrics"]
    assert {m["name"]: m["value"] for m in measured}["TaskDuration"] < 2
    tab.close()
    opened = Opened(browser, page)
    opened.page.locator(".strip .t").nth(20).hover()
    assert "token 21 of 100" in opened.panel()
    assert opened.complaints == []

"""Reports in a real browser: silent, self-contained, inert, usable with mouse, finger and keyboard."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.console import Console
from pipeline.reporting.build import ReportOptions, build_report
from tests.pipeline.reporting.browser import Browser

COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


@pytest.fixture(scope="module")
def pages(attacked_cache: Path, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of both kinds of report."""
    folder = tmp_path_factory.mktemp("pages")
    for name, source in (("cache", attacked_cache), ("run", run_folder)):
        build_report(ReportOptions(str(source), folder / f"{name}.html"), Console(quiet=True))
    return {name: (folder / f"{name}.html").as_uri() for name in ("cache", "run")}


@pytest.mark.parametrize("kind", ["cache", "run"])
def test_no_complaint_no_request_no_injected_code(browser: Browser, pages: dict[str, str], kind: str) -> None:
    browser.events.clear()
    browser.look(width=1400)
    browser.open(pages[kind])
    assert browser.run("document.readyState") == "complete"
    assert list(browser.heard(*COMPLAINTS)) == []
    requests = [e["request"]["url"] for e in browser.heard("Network.requestWillBeSent")]
    assert requests == [pages[kind]]
    assert browser.run("window.attacked === undefined") is True
    assert browser.run("document.querySelectorAll('svg.chart').length") >= 5


def test_the_policy_stops_what_escaping_would_miss(browser: Browser, pages: dict[str, str]) -> None:
    browser.open(pages["cache"])
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.attacked=9>')")
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.attacked = 8';"
        "document.body.append(s); return new Promise(done => setTimeout(done, 100)); })()"
    )
    assert browser.run("window.attacked === undefined") is True


@pytest.mark.parametrize("kind", ["cache", "run"])
@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_window(
    browser: Browser, pages: dict[str, str], kind: str, width: int
) -> None:
    browser.look(width=width)
    browser.open(pages[kind])
    assert browser.run("document.documentElement.scrollWidth") <= width
    smallest = browser.run(
        "Math.min(...[...document.querySelectorAll('svg.chart text')].map(t => "
        "parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a))"
    )
    assert smallest >= 8.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(browser: Browser, pages: dict[str, str], scheme: str) -> None:
    """WCAG contrast of at least 4.5 for body, muted and coloured text in both schemes."""
    browser.look(width=1000, scheme=scheme)
    browser.open(pages["run"])
    found = browser.run(CONTRASTS)
    assert found.keys() >= {"body", "lead", "strongest", "tick", "name"}
    assert {name: value for name, value in found.items() if value < 4.5} == {}


CONTRASTS = """(() => {
  const parse = (text) => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  const css = (selector, name) => parse(getComputedStyle(document.querySelector(selector))[name]);
  const ground = css('body', 'backgroundColor'), paper = css('figure', 'backgroundColor');
  const heat = getComputedStyle(document.querySelector('.key .v9')).backgroundColor;
  const names = [...document.querySelectorAll('.chart .name')];
  return {
    body: ratio(css('body', 'color'), ground),
    lead: ratio(css('.lead p', 'color'), ground),
    strongest: ratio(css('body', 'color'), over(parse(heat), paper)),
    tick: ratio(css('.chart .tick', 'fill'), paper),
    name: Math.min(...names.map(e => ratio(parse(getComputedStyle(e).fill), paper))),
  };
})()"""


def centre(browser: Browser, index: int) -> tuple[float, float]:
    return middle(browser, f"document.querySelectorAll('[data-i]')[{index}]")


def middle(browser: Browser, element: str) -> tuple[float, float]:
    """Scrolls to an element; where its first line is in the window."""
    script = (
        f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}});"
        "const r = e.getClientRects()[0]; return [r.left + r.width / 2, r.top + r.height / 2]; })()"
    )
    x, y = browser.run(script)
    return x, y


def mouse(browser: Browser, kind: str, x: float, y: float) -> None:
    pressed: dict[str, Any] = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
    browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)


def tip(browser: Browser) -> str:
    return str(
        browser.run("document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText")
    )


def inside(browser: Browser) -> bool:
    script = (
        "(() => { const r = document.getElementById('tip').getBoundingClientRect(); "
        "return r.left >= 0 && r.top >= 0 && r.right <= innerWidth && r.bottom <= innerHeight; })()"
    )
    return bool(browser.run(script))


@pytest.mark.parametrize("width", [360, 1000])
def test_pointing_shows_both_expectations(browser: Browser, pages: dict[str, str], width: int) -> None:
    browser.look(width=width, height=800)
    browser.open(pages["run"])
    assert tip(browser) == ""
    mouse(browser, "mouseMoved", *centre(browser, 20))
    shown = tip(browser)
    assert "the teacher expected" in shown
    assert "the student expected" in shown
    assert "divergence" in shown
    assert inside(browser)
    mouse(browser, "mouseMoved", 1, 1)
    assert tip(browser) == ""


def test_a_click_keeps_it_and_another_ends_it(browser: Browser, pages: dict[str, str]) -> None:
    browser.look(width=1000)
    browser.open(pages["cache"])
    spot = centre(browser, 10)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        mouse(browser, kind, *spot)
    kept = tip(browser)
    assert "the teacher expected" in kept
    mouse(browser, "mouseMoved", 1, 1)
    assert tip(browser) == kept
    for kind in ("mousePressed", "mouseReleased"):
        mouse(browser, kind, 1, 1)
    assert tip(browser) == ""


def test_arrow_keys_walk_along_the_text(browser: Browser, pages: dict[str, str]) -> None:
    browser.look(width=1000)
    browser.open(pages["cache"])
    assert browser.run("document.querySelectorAll('[data-i][tabindex=\"0\"]').length") == 1
    browser.run("document.querySelector('[data-i][tabindex=\"0\"]').focus()")
    first = tip(browser)
    assert first
    for _ in range(2):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
    assert browser.run("document.activeElement.dataset.i") == "2"
    assert tip(browser) not in ("", first)
    assert browser.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape")
    assert tip(browser) == ""


def test_points_of_charts_say_their_figures(browser: Browser, pages: dict[str, str]) -> None:
    browser.look(width=1000)
    browser.open(pages["run"])
    mouse(browser, "mouseMoved", *middle(browser, "document.querySelector('circle.hit')"))
    assert "at iteration" in tip(browser)

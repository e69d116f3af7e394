"""The report in a real browser: headless Chromium, light and dark, on a desk and on a phone."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_grid import play
from PIL import Image

from fedmutual.cli import main

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
DESK, PHONE = 1200, 390


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of this machine: $FEDMUTUAL_BROWSER, one on the PATH, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="no browser: pip install playwright")
    named = os.environ.get("FEDMUTUAL_BROWSER")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(
                executable_path=found, args=["--no-sandbox"], timeout=120_000
            )
        except api.Error as error:
            if named:
                raise
            reason = str(error).strip().splitlines()[0]
            pytest.skip(f"no browser: apt-get install chromium, or playwright install chromium ({reason})")
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs side by side, each shown whole below."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run = play(folder / f"seed-{seed}", "rounds=2", f"seed={seed}", "data.pool_size=80")
        assert run.error is None
    file = folder / "both.html"
    assert main(["report", str(folder / "seed-0"), str(folder / "seed-1"), "-o", str(file)]) == 0
    return file


class Opened:
    """The page in a window, with everything that it asked for or complained of."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str, scale: int = 1) -> None:
        size = {"width": width, "height": 844}
        self.context = browser.new_context(
            viewport=size, color_scheme=scheme, device_scale_factor=scale, offline=True
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(file.as_uri(), timeout=120_000)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def colour(self, selector: str, of: str) -> tuple[int, ...]:
        script = "([s, p]) => getComputedStyle(document.querySelector(s)).getPropertyValue(p)"
        text = self.page.evaluate(script, [selector, of])
        return tuple(int(value) for value in text.removeprefix("rgb(").removesuffix(")").split(","))


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [DESK, PHONE, 320])
def test_it_fits_and_asks_for_nothing(browser: Any, page_file: Path, width: int) -> None:
    with Opened(browser, page_file, width, "light") as opened:
        page = opened.page
        assert [url for url in opened.requests if not url.startswith("data:")] == [page_file.as_uri()]
        assert opened.complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("h1").first.inner_text() == "2 runs side by side"
        charts = page.locator("section.chart svg")
        assert charts.count() == 4 + 2 * 8
        for index in range(charts.count()):
            box = charts.nth(index).bounding_box()
            assert box["width"] > 200
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        loaded = "Array.from(document.images).map(i => i.complete && i.naturalWidth)"
        widths = page.evaluate(loaded)
        assert len(widths) > 0
        assert all(value == 20 for value in widths)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_either_light(browser: Any, page_file: Path, scheme: str) -> None:
    with Opened(browser, page_file, DESK, scheme) as opened:
        card = opened.colour(".card", "background-color")
        dark = luminance(card) < 0.2
        assert dark == (scheme == "dark")
        assert contrast(opened.colour("body", "color"), card) > 7
        assert contrast(opened.colour(".note", "color"), card) > 4.5
        assert contrast(opened.colour("section.chart svg text", "fill"), card) > 4.5
        for index in range(7):  # graphics need 3:1
            probe = (
                f"p => {{ document.body.insertAdjacentHTML('beforeend', '<i class=c{index} id=p{index}>') }}"
            )
            opened.page.evaluate(probe)
            assert contrast(opened.colour(f"#p{index}", "color"), card) >= 3, f"c{index}"


def test_text_of_charts_is_large_enough_on_a_phone(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, PHONE, "light", scale=2) as opened:
        every = "(s, f) => Array.from(document.querySelectorAll(s)).map(f)"
        height = "t => t.getBoundingClientRect().height"
        heights = opened.page.evaluate(f"({every})('section.chart svg text', {height})")
        assert min(heights) >= 10
        size = "e => parseFloat(getComputedStyle(e).fontSize)"
        assert min(opened.page.evaluate(f"({every})('td, p, .voter', {size})")) >= 12


def test_the_picture_is_not_empty(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, PHONE, "dark") as opened:
        picture = Image.open(io.BytesIO(opened.page.screenshot(full_page=True, timeout=120_000))).convert(
            "RGB"
        )
        assert picture.width == PHONE
        assert picture.height > 3000
        colours = picture.getcolors(maxcolors=1 << 24)
        assert colours is not None
        assert len(colours) > 500  # thumbnails, curves, text
        found = "document.querySelector('section.chart svg path[style*=\"--c0\"]')"
        line = opened.page.evaluate(f"getComputedStyle({found}).stroke")
        assert tuple(int(v) for v in line[4:-1].split(",")) in {colour for _, colour in colours}


def test_settings_unfold_and_links_lead_to_the_runs(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, PHONE, "light") as opened:
        page = opened.page
        row = page.locator("details").first.get_by_text("strategy.kl_weight")
        assert not row.is_visible()
        page.locator("summary").first.click()
        assert row.is_visible()
        page.locator("nav a").nth(1).click()
        assert page.evaluate("location.hash") == "#run-2"
        assert page.evaluate("scrollY") > 1000

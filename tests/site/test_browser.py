"""The built site in a real browser: nothing from elsewhere, no script error, sliders and folds that work."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools import book, vendor

SITE = Path(os.environ.get("NBLIB_SITE", book.BUILD / "html"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = [f"{page}.html" for page in book.pages()]

if not CHROMIUM and os.environ.get("CI") != "true":
    pytest.skip("no Chromium on this machine: install it to run the browser tests", allow_module_level=True)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, base: str) -> Iterator[Any]:
    """A page, and what went wrong on it: requests to elsewhere (blocked), HTTP errors, script errors."""
    page = browser.new_page(viewport={"width": 1250, "height": 900})
    page.trouble = []

    def gate(route: Any) -> None:
        if route.request.url.startswith((base, "data:")):
            route.continue_()
        else:
            page.trouble.append(f"external: {route.request.url}")
            route.abort()

    page.route("**/*", gate)
    page.on("pageerror", lambda error: page.trouble.append(f"script: {error}"))
    page.on("response", lambda r: page.trouble.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    yield page
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_from_elsewhere_and_raises_no_error(opened: Any, base: str, name: str) -> None:
    opened.goto(base + name)
    opened.wait_for_load_state("networkidle")
    opened.wait_for_timeout(500)
    own_mathjax = (vendor.CACHE / "vendor" / "mathjax" / "tex-chtml.js").is_file()
    trouble = opened.trouble if own_mathjax else [t for t in opened.trouble if "mathjax" not in t]
    assert trouble == []
    if own_mathjax and name.removesuffix(".html").removeprefix("book/") in book.notebooks():
        assert opened.locator("mjx-container").count() > 20
        assert opened.locator("mjx-merror").count() == 0


@pytest.mark.parametrize("chapter", book.notebooks())
def test_sliders_move_and_play_without_a_kernel(opened: Any, base: str, chapter: str) -> None:
    opened.goto(f"{base}book/{chapter}.html")
    sliders = opened.locator(".nb-slider")
    assert sliders.count() >= 1
    for i in range(sliders.count()):
        slider = sliders.nth(i)
        image, handle, text = slider.locator("img"), slider.locator("input"), slider.locator("output")
        before, said = image.get_attribute("src"), text.inner_text()
        handle.focus()
        opened.keyboard.press("ArrowRight")
        moved = image.get_attribute("src")
        assert moved != before
        assert text.inner_text() != said
        assert len(image.get_attribute("alt")) > 20
        slider.locator("button").click()
        opened.wait_for_timeout(900)
        assert image.get_attribute("src") != moved
        slider.locator("button").click()
        paused = image.get_attribute("src")
        opened.wait_for_timeout(600)
        assert image.get_attribute("src") == paused


@pytest.mark.parametrize("chapter", book.notebooks())
def test_solutions_and_long_proofs_are_folded_and_open(opened: Any, base: str, chapter: str) -> None:
    opened.goto(f"{base}book/{chapter}.html")
    opened.wait_for_timeout(500)
    folded = opened.locator("div.solution.dropdown")
    assert folded.count() >= 4
    first = folded.first
    assert first.bounding_box()["height"] < 80
    first.locator("button.toggle-button, .admonition-title").first.click()
    opened.wait_for_timeout(400)
    assert first.bounding_box()["height"] > 80


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_phone(browser: Any, base: str, name: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto(base + name)
    page.wait_for_timeout(800)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_weighs_at_most_three_megabytes(name: str) -> None:
    assert (SITE / name).stat().st_size < 3e6

"""One server and one browser for all tests of the site."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from built import CHROMIUM, EXTRA, PAGES, SITE


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def base() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One window with a cache, from which nothing but this machine can be reached."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        options.append("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
        started = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield started.new_context(viewport={"width": 1250, "height": 900})
        started.close()


def open_page(browser: Any, base: str) -> Any:
    """A page, and what goes wrong on it: requests to elsewhere, HTTP errors, script errors."""
    page = browser.new_page()
    page.trouble = []

    def note(request: Any) -> None:
        if not request.url.startswith((base, "data:", "blob:")):
            page.trouble.append(f"external: {request.url}")

    page.on("request", note)
    page.on("pageerror", lambda error: page.trouble.append(f"script: {error}"))
    page.on("response", lambda r: page.trouble.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    return page


@pytest.fixture
def opened(browser: Any, base: str) -> Iterator[Any]:
    page = open_page(browser, base)
    yield page
    page.close()


@pytest.fixture(scope="module", params=PAGES + EXTRA)
def visited(request: Any, browser: Any, base: str) -> Iterator[Any]:
    """Every page in turn, loaded once for all tests of a module, with its formulas set."""
    page = open_page(browser, base)
    page.name = request.param
    page.goto(base + request.param)
    page.evaluate("window.MathJax?.startup?.promise.then(() => 0)")
    page.wait_for_timeout(200)  # what a script asks for late
    yield page
    page.close()

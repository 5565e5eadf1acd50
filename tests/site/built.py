"""The site under test, for every test of this folder: where it is, its pages, what a browser needs."""

from __future__ import annotations

import os
import shutil
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tools import book

SITE = Path(os.environ.get("NBLIB_SITE", book.BUILD / "html")).resolve()
PAGES = [f"{page}.html" for page in book.pages()]
NOTEBOOKS = book.notebooks()
CHAPTERS = book.chapters()
EXTRA = ["genindex.html", "search.html"]  # pages without a source that a reader reaches
CI = os.environ.get("CI") == "true"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM and not CI, reason="no Chromium: install it to run the browser tests")
needs_java = pytest.mark.skipif(not shutil.which("java") and not CI, reason="no Java: install it to validate the HTML")


class Page(HTMLParser):
    """What a page points to, as (tag, attribute, address), and what on it can be pointed to."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.links: set[tuple[str, str, str]] = set()
        self.targets = {"", "top"}
        self.text = (SITE / name).read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.targets.add(value or "")
            elif (name in ("href", "src") or (name == "data" and tag == "object")) and value is not None:
                self.links.add((tag, name, value))


@cache
def read(name: str) -> Page:
    return Page(name)

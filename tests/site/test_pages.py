"""The built site: every page is there, executed, and shows no trace of a failure."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tools import book

SITE = Path(os.environ.get("NBLIB_SITE", book.BUILD / "html"))


@pytest.mark.parametrize("page", book.pages())
def test_every_page_of_the_contents_has_its_html(page: str) -> None:
    assert (SITE / f"{page}.html").stat().st_size > 2000


@pytest.mark.parametrize("page", book.pages())
def test_no_page_shows_a_failure(page: str) -> None:
    text = (SITE / f"{page}.html").read_text()
    for trace in ("Traceback (most recent call last)", "(???)", "{glue", "{nbval}", "[?]"):
        assert trace not in text, trace


@pytest.mark.parametrize("chapter", book.notebooks())
def test_every_chapter_was_executed(chapter: str) -> None:
    text = (SITE / "book" / f"{chapter}.html").read_text()
    assert "This page was executed on" in text
    assert re.search(r"class=\"output", text)

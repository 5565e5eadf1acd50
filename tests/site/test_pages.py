"""The built site: every page is there, executed, with its outputs and its record."""

from __future__ import annotations

import re

import pytest
from built import NOTEBOOKS, PAGES, SITE


@pytest.mark.parametrize("name", PAGES)
def test_every_page_of_the_contents_has_its_html(name: str) -> None:
    assert (SITE / name).stat().st_size > 2000


@pytest.mark.parametrize("chapter", NOTEBOOKS)
def test_every_chapter_was_executed(chapter: str) -> None:
    text = (SITE / "book" / f"{chapter}.html").read_text()
    assert "This page was executed on" in text
    assert re.search(r"class=\"output", text)

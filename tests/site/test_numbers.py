"""The numbers in the prose of a built page are those of the record of its run."""

from __future__ import annotations

import json
import re

import pytest
from bs4 import BeautifulSoup
from built import SITE

from tools import book, ledger
from tools.site import VALUE, fill


def shown(chapter: str) -> str:
    page = BeautifulSoup((SITE / "book" / f"{chapter}.html").read_text(), "html.parser")
    article = page.find("article")
    assert article is not None
    return " ".join(article.get_text().split())


@pytest.mark.parametrize("chapter", book.notebooks())
def test_numbers_in_the_prose_equal_the_record(chapter: str) -> None:
    text = shown(chapter)
    footer = r"executed on (\S+) in profile (\w+): (\d+) s .*?, (\d+) checks? passed, peak memory (\d+) MB"
    match = re.search(footer, text)
    assert match is not None
    record = json.loads(book.record(chapter, match[2]).read_text())
    assert match[1] == record["date"]
    assert int(match[3]) == round(record["seconds"])
    assert int(match[4]) == len(record["checks"])
    assert int(match[5]) == round(record["peak_mb"])
    prose = ledger.prose(chapter)
    for role in VALUE.finditer(prose):
        # With the plain words before it, so that the same digits elsewhere do not count.
        lead = re.search(r"(?:[A-Za-z ,]|\n(?!\n))*\Z", prose[: role.start()])
        assert lead is not None
        assert " ".join((lead[0] + fill(role[0], record["values"], chapter)).split()) in text, role[0]

"""The search of the site works by itself, without a server or a network."""

from __future__ import annotations

from typing import Any

import pytest
from built import SITE, needs_chromium

pytestmark = needs_chromium
QUERIES = [
    ("reparameterization", "book/foundations/reparameterization.html"),
    ("importance weights", "book/vae/vae-experiments.html"),
    ("image_grid", "book/api/viz.html"),  # a name of the package
]


@pytest.mark.parametrize(("query", "page"), QUERIES)
def test_a_search_finds_the_page(opened: Any, base: str, query: str, page: str) -> None:
    opened.goto(f"{base}search.html?q={query}")
    opened.wait_for_selector(f"#search-results a[href*='{page}']", timeout=5000)
    assert opened.trouble == []


def test_a_search_without_result_says_so(opened: Any, base: str) -> None:
    opened.goto(f"{base}search.html?q=zzqqxxyy")
    opened.wait_for_function("document.querySelector('#search-results')?.innerText.includes('did not match')")
    assert opened.trouble == []


def test_the_index_of_the_search_is_small() -> None:
    assert (SITE / "searchindex.js").stat().st_size < 2e6

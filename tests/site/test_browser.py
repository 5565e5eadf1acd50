"""The built site in a real browser: nothing from elsewhere, no script error, sliders and folds that work."""

from __future__ import annotations

from typing import Any

import pytest
from built import CHAPTERS, PAGES, SITE, needs_chromium

from tools import vendor

pytestmark = needs_chromium


def test_a_page_needs_nothing_from_elsewhere_and_raises_no_error(visited: Any) -> None:
    own_mathjax = (vendor.CACHE / "vendor" / "mathjax" / "tex-chtml.js").is_file()
    trouble = visited.trouble if own_mathjax else [t for t in visited.trouble if "mathjax" not in t]
    assert trouble == []
    if own_mathjax:
        assert visited.locator("mjx-merror").count() == 0
        if visited.name.removesuffix(".html").removeprefix("book/") in CHAPTERS:
            assert visited.locator("mjx-container").count() > 20


def test_a_page_fits_a_phone(visited: Any) -> None:
    visited.set_viewport_size({"width": 390, "height": 844})
    assert visited.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_printed_page_has_no_sidebar_and_cuts_no_text(visited: Any) -> None:
    visited.set_viewport_size({"width": 720, "height": 1000})  # A4 less its margins, at 96 dpi
    visited.emulate_media(media="print")
    for part in (".bd-sidebar-primary", ".bd-header-article"):
        assert not visited.locator(part).first.is_visible(), part
    wide = """[...document.querySelectorAll(".bd-article :is(p, li, pre, h1, h2, h3, table)")].filter((e) =>
      e.offsetParent && (e.scrollWidth > e.clientWidth + 8 || e.getBoundingClientRect().right > innerWidth + 1))
      .map((e) => e.tagName + ": " + e.textContent.trim().slice(0, 60))"""
    assert visited.evaluate(wide) == []


@pytest.mark.parametrize("chapter", CHAPTERS)
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
        changed = "([image, before]) => image.getAttribute('src') !== before"
        opened.wait_for_function(changed, arg=[image.element_handle(), moved], timeout=5000)
        slider.locator("button").click()
        paused = image.get_attribute("src")
        opened.wait_for_timeout(600)
        assert image.get_attribute("src") == paused


@pytest.mark.parametrize("chapter", CHAPTERS)
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
def test_a_page_weighs_at_most_three_megabytes(name: str) -> None:
    assert (SITE / name).stat().st_size < 3e6

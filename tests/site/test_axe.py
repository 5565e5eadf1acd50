"""Accessibility of every page, in light and in dark, by axe-core: WCAG 2.2, levels A and AA."""

from __future__ import annotations

import re
from typing import Any

import pytest
from built import CI, EXTRA, PAGES, needs_chromium

from tools import vendor

pytestmark = needs_chromium
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
# What the theme's colours decide; everything else is the same in dark.
COLOURS = ["color-contrast", "link-in-text-block"]
# Faults of the packages that write the pages: (rule, HTML of the element, reason). One that no longer occurs must go.
ALLOWED: tuple[tuple[str, str, str], ...] = ()
RUN = """([only]) => axe.run(document, {runOnly: only, resultTypes: ["violations"]}).then((result) =>
  result.violations.flatMap((v) => v.nodes.map((n) => [v.id, n.html.slice(0, 300), n.failureSummary.slice(0, 300)])))"""
# A formula's inside is MathJax's and has the colour of the text round it; one token of a kind shows its colour for all.
# Together they are nine tenths of a chapter's elements.
THIN = """() => {
  for (const formula of document.querySelectorAll("mjx-container")) formula.replaceChildren();
  const kinds = new Set();
  for (const token of document.querySelectorAll(".highlight pre span[class]"))
    kinds.has(token.className) ? token.replaceWith(token.textContent) : kinds.add(token.className);
}"""
seen: dict[str, list[tuple[str, str, str]]] = {}


@pytest.fixture(scope="session")
def axe() -> str:
    folder = vendor.tool("axe-core")
    if folder is None:
        assert not CI, "CI must check the accessibility"
        pytest.skip("axe-core cannot be fetched")
    return (folder / "axe.min.js").read_text()


@pytest.mark.parametrize("name", PAGES + EXTRA)
def test_a_page_is_accessible_in_light_and_dark(opened: Any, base: str, axe: str, name: str) -> None:
    opened.emulate_media(color_scheme="light", reduced_motion="reduce")
    opened.goto(base + name)
    opened.evaluate("window.MathJax?.startup?.promise.then(() => 0)")
    opened.evaluate(THIN)
    opened.evaluate(axe)
    found = [("light", *one) for one in opened.evaluate(RUN, [{"type": "tag", "values": TAGS}])]
    opened.emulate_media(color_scheme="dark", reduced_motion="reduce")
    opened.wait_for_selector("html[data-theme=dark]", state="attached")
    found += [("dark", *one) for one in opened.evaluate(RUN, [{"type": "rule", "values": COLOURS}])]
    seen[name] = [one[1:] for one in found]
    unknown = [o for o in found if not any(o[1] == rule and re.search(what, o[2]) for rule, what, _ in ALLOWED)]
    assert unknown == []


def test_every_allowed_fault_still_occurs() -> None:
    if set(seen) == set(PAGES + EXTRA):  # not where only some pages were asked for
        everything = [one for found in seen.values() for one in found]
        for rule, what, reason in ALLOWED:
            assert any(o[0] == rule and re.search(what, o[1]) for o in everything), f"take it out: {reason}"

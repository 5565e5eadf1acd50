"""The HTML is valid, and shows no trace of something that was not filled in, not found or not run."""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict

import pytest
from built import CI, EXTRA, NOTEBOOKS, PAGES, SITE, needs_java, read

from tools import vendor

# Faults of the packages that write the pages: (message, reason). One that no longer occurs must be taken out.
ALLOWED = (
    (
        r"Element “p” not allowed as child of element “summary”",
        "MyST-NB titles the fold of a cell (hide-input) with paragraphs that its own style sheet needs.",
    ),
)
TRACES = (
    r"Traceback \(most recent call last\)",
    r"\(\?\?\?\)",
    r"\[\?\]",
    r"\{nbval\}",
    r"\{glue[:}]",
    r"\{(?:prf:ref|eq|cite(?::[pt])?|doc|ref|numref)\}`",
    r"(?:href|src)=\"[^\"]*\bundefined\b",
    r"class=\"problematic\"",
    r"<!-- made by the build -->",
)


@pytest.fixture(scope="session")
def messages() -> dict[str, list[str]]:
    """What the Nu HTML checker has to say about each page."""
    folder = vendor.tool("vnu-jar")
    if folder is None:
        assert not CI, "CI must validate the HTML"
        pytest.skip("the HTML checker cannot be fetched")
    command = [
        "java",
        "-Xss4m",
        "-jar",
        str(folder / "vnu.jar"),
        "--errors-only",
        "--exit-zero-always",
        "--format",
        "json",
    ]
    done = subprocess.run([*command, *(str(SITE / name) for name in PAGES + EXTRA)], capture_output=True, text=True)
    found = defaultdict(list)
    for one in json.loads(done.stderr)["messages"]:
        name = one["url"].split(f"{SITE.as_posix()}/", 1)[-1]
        found[name].append(f"{one['message']} | line {one.get('lastLine')}: {one.get('extract', '')[:120]!r}")
    assert set(found) <= set(PAGES + EXTRA)
    return found


@needs_java
@pytest.mark.parametrize("name", PAGES + EXTRA)
def test_the_html_is_valid(messages: dict[str, list[str]], name: str) -> None:
    assert [m for m in messages.get(name, []) if not any(re.search(known, m) for known, _ in ALLOWED)] == []


@needs_java
@pytest.mark.parametrize(("known", "reason"), ALLOWED)
def test_every_allowed_fault_still_occurs(messages: dict[str, list[str]], known: str, reason: str) -> None:
    assert any(re.search(known, m) for found in messages.values() for m in found), f"take it out: {reason}"


@pytest.mark.parametrize("name", PAGES)
def test_no_page_shows_what_was_not_filled_in_or_found(name: str) -> None:
    text = re.sub(r'="data:[^"]*"', "", read(name).text)
    for trace in TRACES:
        assert not re.search(trace, text), trace


@pytest.mark.parametrize("chapter", NOTEBOOKS)
def test_every_code_cell_of_a_chapter_was_executed(chapter: str) -> None:
    """The notebook that the page offers for download is the executed one."""
    notebook = json.loads((SITE / "_sources" / "book" / f"{chapter}.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
    unexecuted = [cell["id"] for cell in cells if cell["execution_count"] is None]
    assert unexecuted == []

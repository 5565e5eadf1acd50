"""What every chapter must obey, read from its source."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

import nblib
from tools import api, book, coverage, ledger
from tools.ledger import prose

CHAPTERS = book.chapters()
NOTEBOOKS = book.notebooks()


def cells(chapter: str, kind: str) -> list[book.Notebook]:
    return [cell for cell in book.read(book.source(chapter)).cells if cell.cell_type == kind]


def code(chapter: str) -> str:
    return "\n".join(cell.source for cell in cells(chapter, "code"))


def lines(cell: book.Notebook) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_every_notebook_of_the_book_is_in_the_contents() -> None:
    found = {
        str(path.relative_to(book.ROOT / "book").with_suffix("")) for path in (book.ROOT / "book").rglob("*.ipynb")
    }
    assert {name for name in found if ".ipynb_checkpoints" not in name} == set(NOTEBOOKS)


@pytest.mark.parametrize("chapter", NOTEBOOKS)
def test_notebooks_are_committed_without_outputs(chapter: str) -> None:
    for cell in cells(chapter, "code"):
        assert not cell.outputs
        assert cell.execution_count is None
    raw = json.loads(book.source(chapter).read_text())
    assert set(raw["metadata"]) <= {"kernelspec", "language_info"}
    assert raw["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("chapter", NOTEBOOKS)
def test_the_first_cells_are_imports_and_parameters(chapter: str) -> None:
    first, second, third = cells(chapter, "code")[:3]
    assert "import nblib as nb" in first.source
    assert second.source == "profile = None"
    assert set(second.metadata.tags) == {"parameters", "remove-cell"}
    assert "nb.profile(profile)" in third.source


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_one_title_first_and_the_order_of_a_chapter(chapter: str) -> None:
    headings = re.findall(r"^(#+) (.+)$", re.sub(r"```.*?```", "", prose(chapter), flags=re.S), flags=re.M)
    assert [level for level, _ in headings].count("#") == 1
    assert headings[0][0] == "#"
    titles = [title for _, title in headings]
    order = ["Play", "Break it", "Exercises", "On your own data", "Summary", "Notes and sources"]
    assert [title for title in titles if title in order] == order
    assert titles[-1] == order[-1]
    assert ":class: tip" in prose(chapter), "a box of objectives"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cells_and_prose_stay_within_their_sizes(chapter: str) -> None:
    every = [lines(cell) for cell in cells(chapter, "code")]
    hidden = {"hide-input", "remove-cell"}
    shown = [lines(c) for c in cells(chapter, "code") if not hidden & set(c.metadata.get("tags", []))]
    assert max(every) <= 40, "the longest code cell"
    assert sorted(shown)[len(shown) // 2] <= 24, "the median code cell that a reader sees"
    assert 15 <= len(every) <= 40
    words = len(re.sub(r"\$\$?[^$]+\$\$?|```.*?```", " ", prose(chapter), flags=re.S).split())
    assert 2000 <= words <= 4500


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_claim_has_a_check_in_its_own_chapter(chapter: str) -> None:
    claims = {claim.label for claim in ledger.claims(chapter) if claim.kind in ledger.THEOREMS}
    checked = coverage.checks(chapter)
    assert claims
    assert claims - checked == set()


@pytest.mark.parametrize("chapter", NOTEBOOKS)
def test_every_check_names_a_label_of_the_book(chapter: str) -> None:
    assert coverage.checks(chapter) <= labels()


def labels() -> set[str]:
    return set().union(*(coverage.labels(name) for name in NOTEBOOKS))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_exercise_has_a_folded_solution(chapter: str) -> None:
    text = prose(chapter)
    exercises = re.findall(r"\{exercise\}[^\n]*\n:label: (\S+)", text)
    solutions = re.findall(r"\{solution(?:-start)?\} (\S+)\n:class: dropdown", text)
    assert 4 <= len(exercises) <= 8
    assert sorted(exercises) == sorted(solutions)


@pytest.mark.parametrize("chapter", NOTEBOOKS)
def test_every_figure_has_alt_text(chapter: str) -> None:
    draws = re.compile(r"plt\.(figure|subplots)|nb\.viz\.(image_grid|density|field|latent_scatter|curves)\(|\.plot\(\)")
    for cell in cells(chapter, "code"):
        if draws.search(cell.source) and "nb.viz.slider" not in cell.source:
            assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 20, cell.source[:80]
        if "nb.viz.slider" in cell.source:
            assert "alt=" in cell.source


@pytest.mark.parametrize("chapter", NOTEBOOKS)
def test_no_reference_that_sphinx_cannot_resolve_and_no_local_path(chapter: str) -> None:
    text = prose(chapter) + code(chapter)
    for bad in (r"\label{", r"\eqref", r"\begin{equation}", "/home/", "/root/", "/tmp/", "TODO"):
        assert bad not in text, bad


def test_claim_labels_that_the_package_quotes_exist() -> None:
    known = labels()
    for path in sorted((book.ROOT / "nblib").rglob("*.py")):
        quoted = set(api.LABEL.findall(path.read_text()))
        assert quoted <= known, f"{Path(path).name}: {quoted - known}"


def test_every_erratum_is_followed_by_its_check() -> None:
    run = book.read(book.source("appendix/errata")).cells
    entries = 0
    for cell, after in itertools.pairwise(run):
        for label, _ in ledger.ERRATUM.findall(cell.source if cell.cell_type == "markdown" else ""):
            assert f'nb.check_erratum(\n    "{label}"' in after.source or f'nb.check_erratum("{label}"' in after.source
            assert "**Printed.**" in cell.source
            assert "**Correct.**" in cell.source
            entries += 1
    assert entries > 60


def test_every_module_has_its_page_in_the_reference() -> None:
    assert {f"book/api/{name}" for name in api.MODULES} < set(book.pages())
    assert set(nblib._MODULES) <= set(api.MODULES)

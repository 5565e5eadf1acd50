"""Equations and code know each other on the built pages; neighbours say what they answer."""

from __future__ import annotations

import json

import pytest
from bs4 import BeautifulSoup
from built import SITE

from tools import api, book, export


def links(page: str, selector: str) -> set[str]:
    soup = BeautifulSoup((SITE / f"{page}.html").read_text(), "html.parser")
    return {str(link.get("href")) for link in soup.select(f"{selector} a")}


def test_an_equation_names_its_function_and_the_function_its_equation() -> None:
    assert "../api/vae.html#nblib.vae.VAE" in links("book/vae/variational-autoencoder", "p.nb-code")
    assert "../vae/variational-autoencoder.html#equation-eq-elbo" in links("book/api/vae", "dl.py")


def test_every_label_that_a_docstring_cites_is_linked_in_the_reference() -> None:
    found = set().union(*(links(f"book/api/{name}", "dl.py") for name in api.MODULES))
    targets = {target.split("#")[-1].removeprefix("equation-") for target in found}
    assert set(api.by_label()) <= targets


@pytest.mark.parametrize("chapter", book.chapters())
def test_neighbours_say_what_they_answer(chapter: str) -> None:
    soup = BeautifulSoup((SITE / "book" / f"{chapter}.html").read_text(), "html.parser")
    area = soup.select_one(".prev-next-area")
    assert area is not None
    following = area.select_one("a.right-next")
    assert following is not None
    if chapter != book.chapters()[-1]:
        said = following.select_one(".nb-promise")
        assert said is not None
        assert len(said.get_text()) > 40


def test_the_site_is_built_within_a_minute() -> None:
    assert json.loads((SITE / "build.json").read_text())["seconds"] < 60


def test_the_built_site_numbers_every_label_that_it_shows() -> None:
    found = export.numbers(SITE)
    assert found["thm-elbo-identity"].startswith("Theorem ")
    assert found["eq-evidence"].startswith("Eq. ")
    assert found["ex-vae-1"].startswith("Exercise ")
    shown = (SITE / "book/vae/variational-autoencoder.html").read_text()
    assert f'href="#equation-eq-evidence">{found["eq-evidence"]}</a>' in shown
    assert f'href="#thm-elbo-identity">{found["thm-elbo-identity"]}</a>' in shown


def test_a_copy_of_every_page_is_offered_and_exists() -> None:
    for chapter in book.notebooks():
        folder = (SITE / "book" / f"{chapter}.html").parent
        offered = {
            link for link in links(f"book/{chapter}", ".nb-ways") if link.endswith(".ipynb") and "//" not in link
        }
        assert len(offered) == 1 + (chapter in book.chapters())
        for link in offered:
            assert json.loads((folder / link).read_text())["cells"]

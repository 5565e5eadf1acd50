"""Every link of the site leads somewhere: files, fragments, notebooks of the repository; every page can be reached."""

from __future__ import annotations

import re
from posixpath import dirname, join, normpath
from urllib.parse import unquote, urlsplit

import pytest
from built import EXTRA, PAGES, SITE, read

from tools import book

# A path of this repository behind a link to its forge, to Colab or to Binder.
IN_REPOSITORY = re.compile(r"/(?:blob|edit|raw|tree)/main/([^?#]+)|urlpath=(?:lab/tree|tree)/([^&#]+)")


def internal(name: str) -> list[tuple[str, str]]:
    """The file below the site and the fragment of every link of a page that stays on the site."""
    found = []
    for _, _, address in sorted(read(name).links):
        parts = urlsplit(address)
        if not parts.scheme and not parts.netloc:
            path = normpath(join(dirname(name), unquote(parts.path))) if parts.path else name
            found.append((path, unquote(parts.fragment)))
    return found


@pytest.mark.parametrize("name", PAGES + EXTRA)
def test_every_internal_link_and_fragment_resolves(name: str) -> None:
    broken = []
    for path, fragment in internal(name):
        target = SITE / path
        if not (target.is_file() and target.resolve().is_relative_to(SITE)):
            broken.append(f"no file {path}")
        elif fragment and path.endswith(".html") and fragment not in read(path).targets:
            broken.append(f"nothing is called #{fragment} in {path}")
    assert broken == []


@pytest.mark.parametrize("name", PAGES + EXTRA)
def test_external_links_are_well_formed(name: str) -> None:
    repository = book.repository()
    for tag, _, address in sorted(read(name).links):
        parts = urlsplit(address)
        if parts.scheme in ("data", "mailto") or not (parts.scheme or parts.netloc):
            continue
        assert parts.scheme == "https", address
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), address
        assert not re.search(r"[\s<>\"{}|\\^`]|%7B", parts.path + parts.query), address
        assert not re.search(r"//$|[.,;]$", parts.path), address
        assert tag == "a" or (tag == "link" and address), f"<{tag}> loads {address}"
        if repository and urlsplit(repository).path in address and (path := IN_REPOSITORY.search(address)):
            file = unquote(path[1] or path[2])
            assert (book.ROOT / file).exists(), f"the repository has no {file}"


def test_every_page_can_be_reached_from_the_first() -> None:
    reached, todo = {"index.html"}, ["index.html"]
    while todo:
        for path, _ in internal(todo.pop()):
            if path.endswith(".html") and path not in reached and (SITE / path).is_file():
                reached.add(path)
                todo.append(path)
    assert set(PAGES) <= reached


def test_every_page_was_meant() -> None:
    """Nothing is left of another build, nothing slips in beside the contents."""
    found = {str(path.relative_to(SITE)) for path in SITE.rglob("*.html")}
    generated = {"genindex.html", "search.html", "prf-prf.html", "py-modindex.html"}
    assert {name for name in found if not name.startswith("_static/")} - generated == set(PAGES)

"""Every claim of the book has a broken variant that its check is shown to catch."""

from __future__ import annotations

import pytest

from tools import book, ledger


def claims(chapter: str) -> set[str]:
    return {claim.label for claim in ledger.claims(chapter) if claim.kind in ledger.THEOREMS}


@pytest.mark.parametrize("chapter", book.chapters())
def test_every_claim_has_a_broken_variant_that_is_caught(chapter: str) -> None:
    assert claims(chapter)
    assert claims(chapter) - set(ledger.broken_variants()) == set()


def test_the_place_of_a_broken_variant_is_that_of_its_check() -> None:
    for label, place in ledger.broken_variants().items():
        file, line = place.split(":")
        text = (book.ROOT / file).read_text().splitlines()
        assert any(f'"{label}"' in part for part in text[int(line) - 1 : int(line) + 1]), place
